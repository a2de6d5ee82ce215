"""Qwen2 1.5B on GSM8K, with the published run's settings: r=8, α=16, dropout 0.1, lr 2e-4, 3 epochs, 90/10, patience 5.

Hardware: one v5e or v6e chip; a GPU of 12 GB and more. Memory: 3.1 GB of bfloat16 weights. Work: 3.8 million real tokens,
24 PFLOP; at half of a v5e-1's peak that is 4 minutes of steps. That is arithmetic: the run itself has not been made here.
Planned 2026-11-21 by `jaxft.plan --batch auto`, not run: v6e-1 is cheapest (16 rows, dots, 25.4 of 31.24 GiB): 1.3 min, $0.06;
v6e-8 is fastest: 10 s, $0.06. What the published run paid is not published.
"""

from jaxft.config import Config, Data, Eval, Lora, Model, Optim

config = Config(
    model=Model(name="Qwen/Qwen2-1.5B", dtype="bfloat16"),
    lora=Lora(rank=8, alpha=16, dropout=0.1, bias="none", targets="all-linear"),
    data=Data(name="openai/gsm8k", subset="main", validation_fraction=0.1, max_length=1024),
    optim=Optim(learning_rate=2e-4, epochs=3, batch_size=8, accumulation_steps=1),
    eval=Eval(every_steps=20, patience=5),
)
