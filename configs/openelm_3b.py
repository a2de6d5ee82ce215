"""OpenELM 3B on GSM8K, with the published run's settings: r=8, α=16, dropout 0.1, lr 2e-4, 3 epochs, 90/10, patience 5.

Hardware: v5e-4, v6e-1 or larger; a GPU of 24 GB and more. Memory: 6.1 GB of bfloat16 weights, split over the chips of a slice.
Work: 4.1 million real tokens, 50 PFLOP; at half of a v6e-1's peak that is two minutes of steps. That is arithmetic:
the run itself has not been made here. No base score is published. Apple's repository brings no tokenizer: the model was trained
with Llama 2's, which is gated: accept its licence at https://huggingface.co/meta-llama/Llama-2-7b-hf and run `hf auth login`.
Planned 2026-11-21 by `jaxft.plan --batch auto`, not run: v6e-8 is cheapest and fastest (32 rows, dots, 17.9 of 31.24 GiB a
chip): 20 s, $0.12. What the published run paid is not published.
"""

from jaxft.config import Config, Data, Eval, Lora, Model, Optim

config = Config(
    model=Model(name="apple/OpenELM-3B", tokenizer="meta-llama/Llama-2-7b-hf", dtype="bfloat16"),
    lora=Lora(rank=8, alpha=16, dropout=0.1, bias="none", targets="all-linear"),
    data=Data(name="openai/gsm8k", subset="main", validation_fraction=0.1, max_length=1024),
    optim=Optim(learning_rate=2e-4, epochs=3, batch_size=8, accumulation_steps=1),
    eval=Eval(every_steps=20, patience=5),
)
