"""LoRA on GSM8K with the settings of the published runs: r=8, α=16, dropout 0.1, no biases, lr 2e-4, 3 epochs, 90/10.

Give the model: `python -m jaxft.train --config gsm8k_published.py --model.name FOLDER_OR_HUB_ID`, and rows on disk as
`--data.files gsm8k_train.jsonl`. Any Llama checkpoint fits; on a laptop CPU one of up to some ten million parameters.
"""

from jaxft.config import Config, Data, Eval, Lora, Model, Optim

config = Config(
    model=Model(name="meta-llama/Llama-3.2-1B"),
    lora=Lora(rank=8, alpha=16, dropout=0.1, bias="none", targets="all-linear"),
    data=Data(name="openai/gsm8k", subset="main", validation_fraction=0.1, max_length=1024),
    optim=Optim(learning_rate=2e-4, epochs=3, batch_size=8, accumulation_steps=1),
    eval=Eval(every_steps=50, patience=5),
)
