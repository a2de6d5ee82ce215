"""Config files, typed overrides, and what is said of mistakes in them."""

import dataclasses
import subprocess
import sys

import pytest

from jaxft import command_line, config
from jaxft.errors import UserError, one_line

MINIMAL = """
from jaxft.config import *
config = Config(model=Model(name="builtin:tiny"), data=Data(name="generated:word_problems"))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINIMAL)
    return path


def test_a_config_is_found_by_path_and_by_name_and_names_its_run_folder(file):
    assert config.load(file).run.dir == "runs/mine"
    by_name = config.load("tiny_cpu.py")
    assert by_name == config.load("tiny_cpu")
    assert by_name.run.dir == "runs/tiny_cpu"


def test_every_field_can_be_overridden_with_hyphens_or_underscores(file):
    optim = "--optim.learning-rate 1e-3 --optim.max_steps 7 --run.seed 3"
    data = "--data.files a.jsonl b.jsonl --data.packing false"
    lora = "--lora.rank=4 --lora.targets q_proj v_proj --eval.patience none --lora.rank-pattern v_proj 2 q_proj 3"
    made = config.load(file, f"{optim} {data} {lora}".split())
    assert made.optim.learning_rate == 1e-3
    assert made.optim.max_steps == 7
    assert made.data.files == ("a.jsonl", "b.jsonl")
    assert made.data.packing is False
    assert made.eval.patience is None
    assert (made.lora.rank, tuple(made.lora.targets)) == (4, ("q_proj", "v_proj"))
    assert made.lora.rank_pattern == {"v_proj": 2, "q_proj": 3}
    assert made.run.seed == 3


def test_a_pattern_of_the_file_is_kept_or_replaced_whole(file):
    file.write_text(MINIMAL.replace("Config(", "Config(lora=Lora(rank_pattern={'v_proj': 2}), "))
    assert config.load(file, ["--lora.rank", "4"]).lora == config.Lora(rank=4, rank_pattern={"v_proj": 2})
    assert config.load(file, ["--lora.rank_pattern", "q_proj", "5"]).lora.rank_pattern == {"q_proj": 5}


def test_fields_of_every_type_survive_their_own_text():
    base = config.Config(model=config.Model(name="m"), data=config.Data(name="d"))
    for section, record in config.SECTIONS.items():
        for field in dataclasses.fields(record):
            value = getattr(getattr(base, section), field.name)
            words = [str(v) for v in value] if isinstance(value, (tuple, dict)) else [str(value)]
            assert command_line.apply(base, [f"--{section}.{field.name}", *words]) == base, field.name


def test_lora_none_trains_every_weight_and_a_lora_field_brings_it_back(file):
    assert config.load(file, ["--lora", "none"]).lora is None
    file.write_text(MINIMAL.replace("Config(", "Config(lora=None, "))
    assert config.load(file).lora is None
    assert config.load(file, ["--lora.rank", "4"]).lora == config.Lora(rank=4)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--optim.learnin_rate", "1"], "did you mean optim.learning_rate?"),
        (["--per_device_train_batch_size", "1"], "did you mean optim.batch_size?"),
        (["--lora.lora-alpha", "1"], "did you mean lora.alpha?"),
        (["--optim.learning_rate", "fast"], "learning"),
        (["--optim.learning_rate", "nan"], "finite"),
        (["--optim.batch_size", "1.5"], "batch"),
        (["--optim.batch_size", "0"], "optim.batch_size"),
        (["--optim.schedule", "cosin"], "cosine"),
        (["--optim.accumulation_steps", "3"], "does not divide"),
        (["--lora.dropout", "1.5"], "lora.dropout"),
        (["--run.profile", "3"], "expected two steps"),
        (["--run.profile", "4", "2"], "first and last"),
        (["--run.profile", "0", "2"], "counted from 1"),
        (["--model.name", ""], "model.name"),
        (["stray"], "stray"),
        (["--lora", "4"], "--lora.rank"),
        (["--model.quantize", "int8", "--lora", "none"], "int8 weights are frozen"),
        (["--model.quantize", "fp4"], "model.quantize"),
        (["--model.quantize_tables", "True"], "needs model.quantize"),
        (["--model.quantize", "int4", "--model.quantize_double", "True"], "for nf4 alone"),
        (["--lora.rank_pattern", "v_proj", "0"], "lora.rank_pattern: 'v_proj': 0 is outside 1 to 65536"),
        (["--lora.rank_pattern", "v_proj", "many"], "rank-pattern"),
        (["--mesh.coordinator", "host:1234"], "mesh.num_processes: missing"),
        (["--mesh.process_id", "0"], "mesh.coordinator: missing"),
        (["--mesh.coordinator", "host", "--mesh.num_processes", "2", "--mesh.process_id", "0"], "expected host:port"),
        (["--mesh.coordinator", "a:0", "--mesh.num_processes", "2", "--mesh.process_id", "0"], "expected host:port"),
        (["--mesh.coordinator", "a:1", "--mesh.num_processes", "2", "--mesh.process_id", "2"], "counted from 0"),
    ],
)
def test_a_wrong_override_is_one_line_that_says_what_is_wrong(file, overrides, said):
    with pytest.raises(UserError) as caught:
        config.load(file, overrides)
    assert said in one_line(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("config = 3", "must bind `config = Config(...)`"),
        ("x = 1\nconfig = (", "mine.py:2"),
        ("import nothing_of_that_name", "nothing_of_that_name"),
        ("from jaxft.config import *\nconfig = Config(optim=Optim(lr=1))", "did you mean optim.learning_rate?"),
        ("from jaxft.config import *\nconfig = Config(optims=3)", "unknown key optims"),
        (
            MINIMAL.replace("Config(model", 'Config(optim=Optim(learning_rate="x"), model'),
            "optim.learning_rate: expected",
        ),
        (MINIMAL.replace("Config(model", "Config(optim=3, model"), "optim: expected Optim"),
    ],
)
def test_a_wrong_config_file_is_one_line_that_says_where(file, text, said):
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        config.load(file)
    assert said in one_line(caught.value)


def test_a_config_that_is_not_there_names_those_that_are():
    with pytest.raises(UserError, match=r"nowhere\.py.*tiny_cpu\.py"):
        config.load("nowhere.py")


def test_help_shows_every_key_with_the_files_values_and_needs_no_jax():
    code = "import sys, jaxft.train as t\ntry: t.main(sys.argv[1:])\nfinally: assert 'jax' not in sys.modules"
    command = [sys.executable, "-c", code, "--config", "tiny_cpu.py", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    for section, record in config.SECTIONS.items():
        for field in dataclasses.fields(record):
            assert f"--{section}.{field.name}".replace("_", "-") in shown.stdout.replace("_", "-")
    assert "generated:word_problems" in shown.stdout
