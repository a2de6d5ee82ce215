"""The verbs as users type them, and the Python names that notebooks rely on."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxft
from jaxft import config
from jaxft.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ASKED = "Question: Mia has 4 apples.\nAnswer:"


def run(*command, **options):
    """A verb in a process of its own, as in a shell: one device, no flags of the tests."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    words = [sys.executable, "-m", *command]
    return subprocess.run(words, capture_output=True, text=True, timeout=1200, env=environment, **options)


def test_generate_prints_what_the_python_api_gives():
    model, tokenizer = jaxft.load("builtin:tiny")
    (said,) = jaxft.generate(model, tokenizer, [ASKED], max_new_tokens=12)
    shown = run(
        "jaxft.generate", "--model", "builtin:tiny", "--dtype", "float32", "--prompt", ASKED, "--max-new-tokens", "12"
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == said + "\n"


def test_generate_stays_a_function_after_its_verb_is_imported():
    import jaxft.generate

    model, tokenizer = jaxft.load("builtin:tiny")
    assert len(jaxft.generate(model, tokenizer, [ASKED, "Tom"], max_new_tokens=3)) == 2
    with pytest.raises(UserError, match="list of texts"):
        jaxft.generate(model, tokenizer, "Tom")


def test_a_model_is_called_with_tokens_positions_and_segments():
    model, _ = jaxft.load("builtin:tiny")
    tokens = [[5, 6, 7, 5, 6, 7]]
    logits = np.asarray(model(tokens))
    assert (logits.shape, logits.dtype) == ((1, 6, model.arch.vocab_size), np.float32)
    packed = model(tokens, positions=[[0, 1, 2, 0, 1, 2]], segment_ids=[[1, 1, 1, 2, 2, 2]])
    np.testing.assert_allclose(packed[0, 3:], logits[0, :3], atol=1e-4)


def test_sampling_differs_by_seed_and_repeats_by_seed():
    model, tokenizer = jaxft.load("builtin:tiny")
    first, again, other = (
        jaxft.generate(model, tokenizer, ["Tom"], max_new_tokens=24, temperature=2.0, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("jaxft.generate --prompt x", "--model"),
        ("jaxft.generate --model builtin:huge --prompt x", "built in: builtin:tiny"),
        ("jaxft.generate --model builtin:tiny --prompt x --max-new-tokens 600", "512 positions"),
        ("jaxft.generate --model builtin:tiny --template chat --prompt x", "chat template"),
        ("jaxft.generate --model builtin:tiny --promt x", "--promt"),
        ("jaxft trian --config x", "verbs are"),
        ("jaxft.report nowhere", "nowhere"),
    ],
)
def test_a_verbs_mistake_is_one_line_and_exit_2(command, said):
    ended = run(*shlex.split(command))
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert said in ended.stderr


def commands():
    """Every `python -m jaxft…` of the README's shell blocks."""
    blocks = (ROOT / "README.md").read_text().split("```bash\n")[1:]
    lines = [line for block in blocks for line in block.split("```")[0].replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if "python -m jaxft" in part]


def test_the_readmes_training_commands_name_configs_and_keys_that_exist():
    found = [shlex.split(c)[3:] for c in commands() if "jaxft.train" in c]
    assert len(found) >= 2
    for words in found:
        assert words[0] == "--config"
        config.load(words[1], words[2:])


def needs_no_network(command):
    """Whether the model is the embedded one."""
    words = shlex.split(command)
    return "--config" not in words or config.load(words[words.index("--config") + 1]).model.name.startswith("builtin:")


@pytest.mark.slow
def test_the_readmes_commands_run_as_written_and_the_default_learns(tmp_path):
    """In order, in an empty folder: train the default, then ask its adapter, then report."""
    import json

    for command in filter(needs_no_network, commands()):
        ended = run(*shlex.split(command)[2:], cwd=tmp_path)
        assert ended.returncode == 0, (command, ended.stderr)
        if "jaxft.generate " in command:
            assert "#### 17" in ended.stdout
    report = json.loads((tmp_path / "runs/tiny_cpu/report.json").read_text())
    sides = report["tasks"]["final_answer"]
    assert sides["base"]["exact_match"] == 0
    assert sides["tuned"]["exact_match"] >= 0.7
    assert sides["tuned"]["problems"] == 200
