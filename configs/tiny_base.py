"""The embedded base model, trained from a random start on generated text: every weight, no adapter.

Hardware: two CPU cores, 1 GB of memory. Time: about ten minutes (4,500 steps of 16 x 112 tokens). Cost: none.
Makes: runs/tiny_base/model/, from which jaxft/tiny/base/model.safetensors was copied in bfloat16 (1.7 MB).
Score: exact match 0 on generated:word_problems, whose format it has never seen; sums and products are right.

    python -m jaxft.train --config tiny_base.py
"""

from jaxft.config import Config, Data, Eval, Model, Optim, Run

config = Config(
    model=Model(name="builtin:tiny", init="random", dtype="float32"),
    lora=None,
    data=Data(
        name="generated:corpus",
        format="text",
        template="plain",
        max_length=112,
        packing=True,
        validation_fraction=0.005,
    ),
    optim=Optim(
        learning_rate=3e-3,
        schedule="cosine",
        warmup=100,
        epochs=2.0,
        max_steps=4500,
        batch_size=16,
    ),
    eval=Eval(every_steps=600, patience=None),
    run=Run(log_every=50),
)
