"""The embedded default: the shipped 0.9 M parameter base learns generated word problems in GSM8K's format.

Hardware: two CPU cores, 2 GB of memory, no network. Time: about a minute and a half. Cost: none.
Score: exact match by generation on 200 held-out problems rises from 0 to about 90 %. Model and data are generated: the
run shows that everything works and really learns, and says nothing about other models.

The learning rate is that of a very small model; the published runs' 2e-4 teaches this one nothing (see gemma2_9b.py).
"""

from jaxft.config import Config, Data, Eval, Lora, Model, Optim

config = Config(
    model=Model(name="builtin:tiny", dtype="float32"),
    lora=Lora(rank=8, alpha=16, dropout=0.1, targets="all-linear"),
    data=Data(name="generated:word_problems", test_split="test", max_length=256, validation_fraction=0.05),
    optim=Optim(learning_rate=1e-2, schedule="cosine", epochs=100, max_steps=240, batch_size=8),
    eval=Eval(every_steps=60, tasks=("final_answer",), max_new_tokens=128),
)
