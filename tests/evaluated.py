"""What tests of evaluations share: the embedded model, an adapter of it, rows in files, and the verb's results."""

import json
from pathlib import Path

import pytest
from checkpoints import peft_model, reload

import jaxft.evaluate
import jaxft.tiny

TINY = Path(jaxft.tiny.__path__[0]) / "base"
IGNORED = ["ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning", "ignore::ResourceWarning"]
of_harness = [pytest.mark.filterwarnings(line) for line in IGNORED]  # the harness's and its libraries' own


def written(path, rows):
    """A file of JSON lines; its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def adapted(folder, *modules):
    """An adapter of the embedded model, of random values, which is enough to change every answer; its folder's name."""
    peft_model(reload(TINY), target_modules=list(modules)).save_pretrained(folder)
    return str(folder)


def with_tokenizer(folder):
    """A folder with a checkpoint, and now with the embedded model's tokenizer too."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    return folder


def evaluated(*words, out):
    """results.json, and each task's samples."""
    jaxft.evaluate.main([*map(str, words), "--out", str(out), "--compilation-cache", "None"])
    found = json.loads((out / "results.json").read_text())
    lines = {
        task: [json.loads(line) for line in (out / told["samples"]).read_text().splitlines()]
        for task, told in found["tasks"].items()
        if told["samples"]
    }
    return found, lines
