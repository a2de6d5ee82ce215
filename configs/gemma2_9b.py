"""Gemma 2 9B on GSM8K, with the published run's settings: r=8, α=16, dropout 0.1, lr 2e-4, 3 epochs, 90/10, patience 5.

Hardware: v5e-8 or larger; a GPU of 40 GB and more. Memory: 18.5 GB of bfloat16 weights, split over the chips of a slice;
on v5e-8 the step takes 7.0 of a chip's 15.75 GiB (compiled, not run).
Work: 3.8 million real tokens, 0.14 EFLOP; at half of a v5e-8's peak that is 3 minutes of steps. That is arithmetic: the
run itself has not been made here. Base, as published: 68.6 % (5 examples in the prompt; another protocol than this one).
The repository is gated: accept the licence at https://huggingface.co/google/gemma-2-9b and run `hf auth login`.
Planned 2026-11-21 by `jaxft.plan --batch auto`, not run: v6e-8 is cheapest and fastest (32 rows, dots, 19.7 of 31.24 GiB a
chip): 46 s, $0.27; v5e-8 (16 rows, 11.0 of 15.75 GiB) 3.9 min, $0.62. The published run paid $5.95.
"""

from jaxft.config import Config, Data, Eval, Lora, Model, Optim

config = Config(
    model=Model(name="google/gemma-2-9b", dtype="bfloat16"),
    lora=Lora(rank=8, alpha=16, dropout=0.1, bias="none", targets="all-linear"),
    data=Data(name="openai/gsm8k", subset="main", validation_fraction=0.1, max_length=1024),
    optim=Optim(learning_rate=2e-4, epochs=3, batch_size=8, accumulation_steps=1),
    eval=Eval(every_steps=20, patience=5),
)
