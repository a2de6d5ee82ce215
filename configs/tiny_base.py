"""The embedded base model, trained from a random start on generated text: every weight, no adapter.

Hardware: two CPU cores, 1 GB of memory. Time: about ten minutes (4,500 steps of 16 x 112 tokens). Cost: none.
Makes: runs/tiny_base/model/, whose weights the second command copies into the package in bfloat16 (1.7 MB).
Score: sums, differences, products and quotients within 100 are exact; exact match on generated:word_problems is 0 of
200, because it has never seen their format.

    python -m jaxft.train --config tiny_base.py
    python -m jaxft.tiny.make jaxft/tiny/base runs/tiny_base/model
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
