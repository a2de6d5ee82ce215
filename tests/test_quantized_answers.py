"""Generating and evaluating on a quantised base: what a base of the decoded weights gives."""

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import load, reload, save
from evaluated import TINY, adapted, evaluated, with_tokenizer, written
from marked import exhaustive, slow
from test_quantize import SCHEMES, with_decoded

import jaxft
import jaxft.generate
from jaxft.errors import UserError
from jaxft.evals.harness import JaxftLM
from jaxft.evals.subject import open_subject
from jaxft.models import decoder
from jaxft.tiny import problems

ASKED = ["Tom has 3 apples.", "Zoe has 12 pens. Tom gives Zoe"]


def decoded(settings, folder):
    """A checkpoint of what the codes of the embedded model decode to."""
    return with_tokenizer(save(with_decoded(reload(TINY), load(TINY, **settings)), folder))


def options(settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not True]


@pytest.mark.parametrize("scheme", [slow("int8"), exhaustive("nf4, double")])
def test_answers_and_scores_are_those_of_the_decoded_weights(scheme, tmp_path, capsys):
    settings = SCHEMES[scheme]
    base = decoded(settings, tmp_path / "decoded")
    (model, tokenizer), (want, _) = jaxft.load("builtin:tiny", **settings), jaxft.load(str(base))
    assert jaxft.generate(model, tokenizer, ASKED, max_new_tokens=12) == jaxft.generate(want, tokenizer, ASKED, 12)
    rows = written(tmp_path / "rows.jsonl", problems.rows("test", 4))
    adapter = adapted(tmp_path / "adapter", "q_proj", "down_proj")
    words = ["--adapter", adapter, "--dtype", "float32", "--tasks", "final_answer", "--max-new-tokens", 16]
    words += ["--test-files", rows]
    double = ["--quantize-double"] if settings.get("quantize_double") else []
    capsys.readouterr()
    ours, lines = evaluated("--model", TINY, *words, *options(settings), *double, out=tmp_path / "ours")
    printed = capsys.readouterr().out
    _, wanted = evaluated("--model", base, *words, out=tmp_path / "theirs")
    for side in ("base", "tuned"):
        assert [line[side] for line in lines["final_answer"]] == [line[side] for line in wanted["final_answer"]]
    assert ours["model"]["quantize"] == settings["quantize"] and f"held as {ours['model']['held_as']}" in printed
    assert ours["model"]["parameters"] == open_subject(str(TINY), adapter, dtype="float32").origin["parameters"]
    assert ours["model"]["held_as"].startswith(f"{settings['quantize']} with a scale per")


def test_the_generate_verb_says_what_the_base_is_held_as_and_how_fast_it_was(capsys):
    words = ["--model", "builtin:tiny", "--max-new-tokens", "6", "--compilation-cache", "None", "--prompt", ASKED[0]]
    jaxft.generate.main([*words, "--quantize", "int4", "--quantize-group", "32", "--quantize-tables", "True"])
    shown = capsys.readouterr()
    model, tokenizer = jaxft.load("builtin:tiny", quantize="int4", quantize_group=32, quantize_tables=True)
    assert model.embed[...].dtype == jnp.int8
    assert shown.out == jaxft.generate(model, tokenizer, ASKED[:1], max_new_tokens=6)[0] + "\n"
    held = "int4 with a scale per 32 inputs, embedding and head in int8"
    assert f"held as {held}: 6 tokens in" in shown.err and "tokens/s" in shown.err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantize": "int8", "quantize_double": True}, "quantize_double: is for nf4 alone, and quantize is int8"),
        ({"quantize_tables": True}, "quantize_tables: needs quantize int8, int4 or nf4, which is none"),
        ({"quantize": "int3"}, "quantize: 'int3' is unknown; schemes are none, int8, nf4, int4"),
        ({"quantize": "int4", "quantize_group": 48}, "quantize_group: 48 is none of 32, 64, 128"),
    ],
)
def test_a_scheme_that_there_is_not_is_one_line(settings, said):
    with pytest.raises(UserError, match=said):
        jaxft.load("builtin:tiny", **settings)


@pytest.mark.slow
def test_a_dora_adapter_switched_off_is_its_quantised_base(tmp_path):
    from checkpoints import peft_model

    peft_model(reload(TINY), target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path / "adapter")
    held = {"dtype": "float32", "quantize": "nf4"}
    both = open_subject(str(TINY), str(tmp_path / "adapter"), sides=("base", "tuned"), **held)
    plain = open_subject(str(TINY), **held)
    ids = jnp.array([[5, 9, 11, 40]])

    def logits(subject, side):
        graphdef, _, frozen = decoder.split(subject.model)
        return np.asarray(decoder.join(graphdef, subject.sides[side], frozen)(ids))

    np.testing.assert_allclose(logits(both, "base"), logits(plain, "base"), atol=1e-4)
    assert np.abs(logits(both, "base") - logits(both, "tuned")).max() > 1e-2


@pytest.mark.slow
def test_the_harnesss_model_takes_the_same_choice():
    pytest.importorskip("lm_eval")
    model = JaxftLM("builtin:tiny", dtype="float32", quantize="int8")
    assert model.get_model_info()["held_as"] == "int8 with a scale per output"
