"""Llama 3.2 3B on GSM8K, with the published run's settings: r=8, α=16, dropout 0.1, lr 2e-4, 3 epochs, 90/10, patience 5.

Hardware: v5e-4, v6e-1 or larger; a GPU of 24 GB and more. Memory: 6.4 GB of bfloat16 weights, split over the chips of a slice.
Work: 3.3 million real tokens, 43 PFLOP; at half of a v6e-1's peak that is a minute and a half of steps. That is arithmetic: the
run itself has not been made here. No base score is published in this protocol.
The repository is gated: accept the licence at https://huggingface.co/meta-llama/Llama-3.2-3B and run `hf auth login`.
Planned 2026-11-21 by `jaxft.plan --batch auto`, not run: v6e-8 is cheapest and fastest (32 rows, dots, 7.9 of 31.24 GiB a
chip): 14 s, $0.08; v5e-1 (4 rows, 13.2 of 15.75 GiB) 14 min, $0.27. What the published run paid is not published.
"""

from jaxft.config import Config, Data, Eval, Lora, Model, Optim

config = Config(
    model=Model(name="meta-llama/Llama-3.2-3B", dtype="bfloat16"),
    lora=Lora(rank=8, alpha=16, dropout=0.1, bias="none", targets="all-linear"),
    data=Data(name="openai/gsm8k", subset="main", validation_fraction=0.1, max_length=1024),
    optim=Optim(learning_rate=2e-4, epochs=3, batch_size=8, accumulation_steps=1),
    eval=Eval(every_steps=20, patience=5),
)
