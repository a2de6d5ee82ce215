"""Gemma 2B on Alpaca-GPT4, with the published run's settings: r=8, α=16, dropout 0.1, lr 2e-4, 3 epochs, 90/10, patience 5.

Hardware: one v6e chip, v5e-4 or larger; a GPU of 16 GB and more. Memory: 5.0 GB of bfloat16 weights. Work: 27.4 million real
tokens, 0.28 EFLOP; at half of a v6e-1's peak that is 10 minutes of steps. That is arithmetic: the run itself has not been made
here. Another LoRA of this model on these rows lost 5.5 points of MMLU and 6.2 of GSM8K against the base: look at both sides.
The repository is gated: accept the licence at https://huggingface.co/google/gemma-2b and run `hf auth login`.
Planned 2026-11-21 by `jaxft.plan --batch auto`, not run: v6e-8 is cheapest and fastest (128 rows, dots, 26.1 of 31.24 GiB a
chip): 1.4 min, $0.51; v6e-1 (8 rows, 17.3 GiB) 17 min, $0.77. What the published run paid is not published.
"""

from jaxft.config import Config, Data, Eval, Lora, Model, Optim

config = Config(
    model=Model(name="google/gemma-2b", dtype="bfloat16"),
    lora=Lora(rank=8, alpha=16, dropout=0.1, bias="none", targets="all-linear"),
    data=Data(name="vicgalle/alpaca-gpt4", validation_fraction=0.1, max_length=1024),
    optim=Optim(learning_rate=2e-4, epochs=3, batch_size=8, accumulation_steps=1),
    eval=Eval(every_steps=100, patience=5),
)
