"""What a plan says before chips are rented: memory, FLOPs, bytes between chips, time, money; and what it says of mistakes."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from test_report import finished, lines

from jaxft import chips, config, plan, report
from jaxft.errors import OutOfResources, UserError
from jaxft.learn import recompute
from jaxft.parallel import topology
from jaxft.parallel.mesh import make_mesh
from jaxft.plans import estimate, pages, place, program, reading, roofline, row, sweep, table, work
from jaxft.reports import plots
from jaxft.weights import model

GIB = 2**30
# Small enough to compile in a few seconds, and with layers enough that their weights are most of what travels.
SMALL = dict(
    model_type="llama", hidden_size=256, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=2,
    num_key_value_heads=2, head_dim=128, vocab_size=512, tie_word_embeddings=True, torch_dtype="bfloat16",
    max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(SMALL))
    return config.Config(
        model=config.Model(name=str(folder), remat="dots"),
        lora=config.Lora(rank=4, dropout=0.0, targets=("v_proj",)),
        data=config.Data(name="rows", max_length=256),
        optim=config.Optim(batch_size=8),
    )


# --- a small step, compiled for slices ---


@pytest.fixture(scope="module")
def planned(settings):
    """Rows of a small model on one slice and on two."""
    known = reading.Reading(1e6, 1e5, 0.98, "given")
    places = [place.parse(name) for name in ("v5e-4", "2xv5e-4")]
    with_price = replace(settings, optim=replace(settings.optim, epochs=2.0))
    return {each["topology"]: each for each in sweep.rows(with_price, places, None, known, lambda line: None)}


def test_weights_go_round_twice_and_nothing_leaves_a_slice(planned, settings):
    found, source = planned["v5e-4"], model.sketch(settings.model, settings.lora)
    weights = 2 * source.arch.flops_per_token(frozen=True) / 4
    assert found["network_source"] == "the compiled program"
    moved = sum(found["collectives"].get(kind, {"bytes": 0})["bytes"] for kind in ("all-gather", "collective-permute"))
    assert 1 <= moved / (2 * weights * 3 / 4) < 1.05  # each chip lacks three quarters, forward and backward
    assert found["dcn_bytes_per_chip"] == 0


def test_between_slices_only_gradients_of_what_is_trained_travel(planned):
    one, two = planned["v5e-4"], planned["2xv5e-4"]
    assert two["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1} and two["slices"] == 2
    trained = two["lora_bytes_per_chip"]
    assert 0 < two["dcn_bytes_per_chip"] < 8 * trained + 2**16
    assert two["ici_bytes_per_chip"] == pytest.approx(one["ici_bytes_per_chip"], rel=0.1)
    assert two["dcn_seconds"] == two["dcn_bytes_per_chip"] / 3.125e9


def test_a_rows_figures_add_up(planned):
    for found in planned.values():
        assert found["fits"] and found["method"] == "compiled" and found["policy"] == "dots"
        assert sum(found[part] for part in row.PARTS) == found["total_bytes_per_chip"]
        assert found["free_bytes_per_chip"] == found["hbm_bytes_per_chip"] - found["total_bytes_per_chip"] > 0
        assert found["optimizer_bytes_per_chip"] >= 2 * found["lora_bytes_per_chip"] > 0
        assert 1 <= found["flops_over_ideal"] < 1.1
        needs = [found[f"{name}_seconds"] for name in ("compute", "hbm", "ici", "dcn")]
        assert found["roofline_seconds"] == max(needs)
        assert found["expected_step_seconds"] == max(needs) / roofline.EFFICIENCY
        assert found["steps"] == math.ceil(2 * 1e6 / 0.98 / (256 * 8))
        hours = found["steps"] * found["expected_step_seconds"] / 3600
        assert found["training_hours"] == pytest.approx(hours)
        assert found["usd"] == pytest.approx(found["hours"] * found["chips"] * 1.2)
        assert found["hours"] == found["training_hours"] + found["evaluation_hours"] > found["training_hours"]
        json.dumps(found, allow_nan=False)


def test_a_plan_is_a_block_for_one_place_and_a_table_for_several(planned):
    said = table.block(planned["2xv5e-4"])
    for words in ("8 × v5e, mesh data=2, fsdp=4", "weights", "LoRA", "optimizer", "activations", "of 15.75 GiB: fits, by",
                  "of the ideal 4N + 4DV", "bound by", "assumed, not measured", "USD a chip-hour",
                  "not: reading weights"):  # fmt: skip
        assert words in said
    shown = table.table(list(planned.values()))
    assert len(shown.splitlines()) == 3 and "2xv5e-4" in shown and "\x1b" not in shown
    assert table.markdown(list(planned.values())).count("\n") == 3


# --- arithmetic ---


@pytest.mark.parametrize("policy", ["dots", "qkv", "full"])
def test_arithmetics_flops_are_those_of_the_traced_step(settings, policy):
    everywhere = replace(settings, lora=config.Lora(rank=8, dropout=0.0))
    source, mesh, steps, batch = program.prepare(everywhere, "v5e-4")
    found = recompute.traceable(everywhere, source, mesh, steps, batch, policy)
    step = row.described(everywhere, source, policy, dict(mesh.shape))
    assert program.flops_per_token(found) == pytest.approx(estimate.flops_per_token(step), rel=0.02)
    assert work.ideal(source.arch, 10) == 10 * (
        source.arch.flops_per_token(frozen=True) + source.arch.head_flops_per_token(frozen=True)
    )


def nine(rows, policy="dots", base="none", **mesh):
    settings = config.load("gemma2_9b.py", ["--model.quantize", base])
    source = model.sketch(settings.model, settings.lora)
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, **mesh}
    return row.described(program.with_batch(settings, rows), source, policy, sizes)


@pytest.mark.parametrize(
    ("rows", "policy", "fsdp", "gib"),
    [(8, "dots", 8, 6.96), (16, "dots", 8, 11.25), (32, "qkv", 8, 10.73), (32, "full", 8, 4.82), (4, "full", 1, 19.61)],
)
def test_arithmetics_memory_is_near_the_compilers(rows, policy, fsdp, gib):
    """Beside what the compiler said of Gemma 2 9B (tests/benchmarks/step.py, 2026-11-21)."""
    assert sum(estimate.memory(nine(rows, policy, fsdp=fsdp)).values()) / GIB == pytest.approx(gib, rel=0.2)


@pytest.mark.parametrize(("base", "gib", "weights"), [("int8", 10.40, 9.47), ("int4", 7.17, 6.07), ("nf4", 7.17, 6.07)])
def test_a_quantised_bases_memory_and_what_decoding_it_moves(base, gib, weights):
    """Beside what the compiler said (README, 2026-11-29)."""
    step, plain = nine(1, "full", base), nine(1, "full")
    less = replace(step, policy="nested")
    inputs = 29 * 1024 * 3584 * 2 / GIB  # of 42 layers 13 are held at once; 10.39 and 10.18 by the compiler
    assert sum(estimate.memory(step).values()) / GIB - sum(estimate.memory(less).values()) / GIB == pytest.approx(
        inputs, rel=0.01
    )
    found = estimate.memory(step)
    assert found["weights_bytes_per_chip"] / GIB == pytest.approx(weights, abs=0.02)
    assert sum(found.values()) / GIB == pytest.approx(gib, rel=0.1)
    assert estimate.flops_per_token(step) == estimate.flops_per_token(plain)
    # int8 is read as it lies, half of bfloat16; four bits are decoded first, which is written and read again.
    moved = estimate.hbm_bytes(step) - estimate.hbm_bytes(plain)
    assert moved < 0 if base == "int8" else moved > 0


@pytest.mark.parametrize(
    ("name", "dtype", "where", "gib", "ici_gb"),
    [
        ("llama32_3b.py", "float32", "v5e-8", 7.79, 19.44), ("llama32_3b.py", "bfloat16", "v5e-8", 6.40, 19.44),
        ("gemma2_9b.py", "float32", "v5p-8", 43.10, None), ("gemma2_9b.py", "bfloat16", "v6e-8", 17.76, None),
    ],
)  # fmt: skip
def test_every_weight_trained_on_paper(name, dtype, where, gib, ici_gb):
    """Beside what the compiler said (`tpu_scripts/plan_matrix.sh full`, 2026-11-22)."""
    settings, chips = config.load(name, ["--lora", "none", "--model.param_dtype", dtype]), place.parse(where)
    source = model.sketch(settings.model, settings.lora)
    step = row.described(settings, source, "dots", place.sizes(settings.mesh, chips))
    found = estimate.memory(step)
    assert sum(found.values()) / GIB == pytest.approx(gib, rel=0.1)
    assert found["optimizer_bytes_per_chip"] == found["weights_bytes_per_chip"] * (2 if dtype == "float32" else 4)
    assert row.base(settings) == f"{dtype}, trained"
    if ici_gb is not None:
        assert estimate.ici_bytes(step) / 1e9 == pytest.approx(ici_gb, rel=0.15)


def test_the_9bs_bytes_on_paper():
    step = nine(8, fsdp=8)
    assert step.weights == pytest.approx(8.32e9, rel=0.01)
    weights = 2 * step.weights * 2  # twice, in bfloat16: 33.3 GB
    assert weights * 7 / 8 < estimate.ici_bytes(step) < 1.15 * weights
    assert estimate.dcn_bytes(step) == 0
    assert estimate.dcn_bytes(replace(step, data=2, slices=2)) == step.trained * 4 / 8
    assert estimate.hbm_bytes(step) > 4 * step.weights * 2  # written and read, forward and backward
    once = estimate.flops_per_token(step)
    for policy, times in (("full", 1.45), ("nested", 1.90)):  # as the traced steps have it
        assert estimate.flops_per_token(replace(step, policy=policy)) / once == pytest.approx(times, abs=0.01)
    attention = [
        estimate.attention_flops_per_token(replace(step, policy=policy)) for policy in ("dots", "full", "nested")
    ]
    assert attention == [attention[0], attention[0] * 18 / 14, attention[0] * 22 / 14]


def test_the_slowest_resource_decides_and_is_named():
    where = place.parse("v5e-8")
    assert where.ici_bytes_per_second == 100e9  # two links of 50 GB/s one way, of the chip at a corner
    demand = roofline.Demand(8192, 197e12, 819e9 / 2, 100e9 / 4, 0)
    found = roofline.times(demand, where)
    assert (found.compute_seconds, found.hbm_seconds, found.ici_seconds, found.dcn_seconds) == (1, 0.5, 0.25, 0)
    assert (found.roofline_seconds, found.bound_by, found.expected_step_seconds) == (1, "compute", 2)
    assert roofline.times(replace(demand, ici_bytes=300e9), where).bound_by == "network (ICI)"
    assert roofline.times(replace(demand, dcn_bytes=3.125e9 * 5), place.parse("2xv5e-4")).bound_by == "network (DCN)"
    assert roofline.times(replace(demand, hbm_bytes=1e13), where).bound_by == "HBM"
    unknown = roofline.times(replace(demand, dcn_bytes=1e12), place.parse("2xv4-8"))
    assert unknown.dcn_seconds is None and unknown.bound_by == "compute"


@pytest.mark.parametrize(
    ("name", "count", "slices", "links"),
    [
        ("v5e-1", 1, 1, 0), ("v5e-8", 8, 1, 2), ("v5e-256", 256, 1, 4), ("v6e-16", 16, 1, 2), ("v5p-8", 4, 1, 2),
        ("v4-8", 4, 1, 2), ("v5p-16", 8, 1, 3), ("v5p-128", 64, 1, 6), ("2xv5e-16", 32, 2, 2),
    ],
)  # fmt: skip
def test_names_are_googles(name, count, slices, links):
    found = place.parse(name)
    assert (found.chips, found.slices, found.topology.links) == (count, slices, links)
    assert np.prod(found.topology.shape) * slices == count


def test_a_running_job_finds_its_place():
    assert place.of_devices("TPU v5 lite", 8).name == "v5e-8"
    assert place.of_devices("TPU v5", 4).name == "v5p-8"
    assert place.of_devices("TPU v6 lite", 32, 2).name == "2xv6e-16"
    assert place.of_devices("NVIDIA H200", 1).name == "H200" and place.of_devices("NVIDIA H200", 8).chips == 8
    assert place.of_devices("cpu", 8) is None and place.of_devices("TPU v5 lite", 7) is None


# --- the whole run ---


def test_a_runs_length_is_its_rows_where_they_are_here_and_known_counts_elsewhere(tmp_path):
    tiny = config.load("tiny_cpu.py", ["--data.cache", str(tmp_path)])
    arch = model.sketch(tiny.model, tiny.lora).arch
    found = reading.of_run(tiny, arch.family, arch.vocab_size, arch.max_positions)
    assert "the rows themselves" in found.source and found.steps(tiny, 256) == 240
    assert found.evaluations(tiny, 240) == 5 and 0.9 < found.fill <= 1
    nine_b = config.load("gemma2_9b.py")
    known = reading.of_run(nine_b, "gemma2", 256000, 8192)
    assert known.tokens * 3 == pytest.approx(3.79e6, rel=0.01) and "estimated" in known.source
    assert known.steps(nine_b, 1024) == math.ceil(known.tokens * 3 / 0.985 / 8192)
    given = reading.of_run(nine_b, "gemma2", 256000, 8192, tokens=900)
    assert (given.tokens, given.held_out_tokens) == (900, pytest.approx(100))
    own = replace(nine_b, data=replace(nine_b.data, name="me/mine"))
    assert reading.of_run(own, "gemma2", 256000, 8192) is None


@pytest.mark.slow
def test_the_known_lengths_are_those_of_the_rows(shared):
    """GSM8K with the two tokenizers that are here."""
    for name, folder, vocab in (("llama32_3b.py", "llama3", 128256), ("openelm_3b.py", "llama2", 32000)):
        overrides = ["--data.files", str(shared / "data/gsm8k_train.jsonl"), "--data.cache", "none"]
        settings = config.load(name, [*overrides, "--model.tokenizer", str(shared / "tokenizers" / folder)])
        family = model.sketch(settings.model, settings.lora).arch.family
        real = reading.of_run(settings, family, vocab, 4096)
        known = reading.of_run(config.load(name), family, vocab, 4096)
        assert known.tokens == pytest.approx(real.tokens, rel=0.01)
        assert known.held_out_tokens == pytest.approx(real.held_out_tokens, rel=0.05)
        assert known.fill == pytest.approx(real.fill, abs=0.01)


def test_a_batch_is_chosen_by_arithmetic_before_anything_is_compiled():
    settings = config.load("gemma2_9b.py")
    known = reading.of_run(settings, "gemma2", 256000, 8192)
    found = sweep.ranked(settings, place.parse("v5e-8"), known)
    assert (found[0].rows, found[0].policy) == (16, "dots")  # the network decides below, recomputing above
    assert max(step.rows for step in found) <= 3760 / sweep.LEAST_STEPS
    assert all(step.rows % 8 == 0 for step in found)
    best, *_ = sweep.ranked(settings, place.parse("v6e-1"), known)
    assert sum(estimate.memory(best).values()) < 1.1 * 31.24 * GIB
    parts = replace(settings, optim=replace(settings.optim, batch_size=32, accumulation_steps=4))
    assert all(step.rows % 32 == 0 for step in sweep.ranked(parts, place.parse("v5e-8"), known))


def test_a_batch_that_the_compiler_refuses_gives_way_to_the_next(monkeypatch):
    asked = []

    def refusing(settings, place, known):
        asked.append((settings.optim.batch_size, settings.model.remat))
        return {"fits": asked[-1][1] == "qkv", "topology": place.name}

    monkeypatch.setattr(row, "plan", refusing)
    found = sweep.best_batch(config.load("gemma2_9b.py"), place.parse("v5e-8"), None, lambda line: None)
    assert found["fits"] and found["programs_compiled"] == len(asked) <= sweep.COMPILES
    assert asked[0] == (16, "dots") and asked[-1][1] == "qkv"
    refused = [rows for rows, policy in asked if policy == "dots"]
    assert refused == sorted(refused, reverse=True)  # nothing as large as what was refused is asked again


def test_the_cheapest_and_the_fastest_are_named():
    def made(name, usd, speed, fits=True):
        return {"topology": name, "fits": fits, "usd": usd, "usd_per_million_tokens": usd, "tokens_per_second": speed}

    rows = [made("a", 2.0, 10), made("b", 1.0, 5), made("c", None, 20), made("d", 0.1, 99, fits=False)]
    assert sweep.recommended(rows) == {"cheapest": "b", "fastest": "c"}
    assert sweep.recommended(rows[3:]) == {"cheapest": None, "fastest": None}


# --- as typed ---


def typed(*words):
    plan.main(["--config", "gemma2_9b.py", *words])


def test_gpus_are_planned_from_arithmetic_and_say_so(capsys, tmp_path):
    files = {name: str(tmp_path / f"plan.{name}") for name in ("json", "png")}
    typed("--topology", "H200,8xH100,L4", "--batch", "auto", "--json", files["json"], "--plot", files["png"],
          "--run.usd-per-chip-hour", "3.5")  # fmt: skip
    said = capsys.readouterr().out
    assert "* arithmetic, not compiled" in said and "L4, 1 rows: the training step does not fit" in said
    whole = json.loads((tmp_path / "plan.json").read_text())
    h200, h100, l4 = whole["rows"]
    assert h200["method"] == h100["method"] == row.ARITHMETIC and h100["chips"] == 8
    assert h200["usd"] == pytest.approx(h200["hours"] * 3.5) and h200["price_source"] == "run.usd_per_chip_hour"
    assert not l4["fits"] and l4["error_kind"] == "memory" and l4["free_bytes_per_chip"] < 0
    assert whole["fastest"] == "8xH100" and {"jax", "libtpu", "jaxft", "optimization_level"} == set(whole["versions"])
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    assert pages.runs([whole]).count("\n") == 4 and "paid" in pages.runs([whole])
    assert "8xH100" in pages.lines([whole]) and "$5.95" in pages.lines([whole])
    assert pages.growth([whole]).count("\n") == 4


def test_without_a_price_there_is_no_cost_and_without_rows_no_length(capsys):
    typed("--topology", "H200", "--data.name", "me/mine")
    said = capsys.readouterr().out
    assert "no price is known; give --run.usd_per_chip_hour" in said and "give --tokens" in said
    typed("--topology", "H200", "--data.name", "me/mine", "--tokens", "1000000", "--run.usd-per-chip-hour", "2")
    assert "3.0" in re.search(r"run .*? steps, ([\d.]+) million tokens", capsys.readouterr().out)[1]


def test_a_sweep_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    file, calls, real = tmp_path / "plan.json", [], row.plan
    monkeypatch.setattr(
        row, "plan", lambda settings, place, known: calls.append(place.name) or real(settings, place, known)
    )
    typed("--topology", "H200", "--json", str(file))
    more = ["--topology", "H200,H100", "--json", str(file), "--resume"]
    typed(*more)
    assert calls == ["H200", "H100"]
    assert [each["topology"] for each in json.loads(file.read_text())["rows"]] == ["H200", "H100"]
    typed(*more)
    assert calls == ["H200", "H100"]
    typed(*more, "--optim.batch_size", "16")  # other settings are planned anew
    assert calls == ["H200", "H100"] * 2
    file.write_text("[]")
    with pytest.raises(UserError, match="not a plan's file"):
        typed(*more)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", r"--topology NAMES is missing"),
        ("--topology v99-8", r"kinds are v4, v5e, v5p, v6e; GPUs: H200"),
        ("--topology v5e-9", r"there are v5e-1, v5e-4, v5e-8"),
        ("--topology 9xH100", r"1 to 8 of them"),
        ("--topology T4", r"GPUs: H200, H100"),
        ("--topology ,", r"no name in it"),
        ("--topology v5e-8 --plot plan.doc", r"ends in .png or .svg or .pdf"),
        ("--topology v5e-8 --json nowhere/plan.json", r"there is no folder nowhere"),
        ("--topology v5e-8 --batch few", r"--batch few: expected a whole number above 0, or auto"),
        ("--topology v5e-8 --tokens -1", r"--tokens"),
        ("--topology v5e-8 --mesh.fsdp 3", r"mesh.fsdp=3.* does not multiply to 8"),
        ("--topology v5e-8 --batch 12", r"12 .*does not split over data·fsdp=8"),
        ("--topology v5e-8 --mesh.tensor 8 --mesh.fsdp 1 --batch auto --model.name Qwen/Qwen2-1.5B", r"tensor=8"),
        ("--topology 8xH100 --batch 12", r"do not split over data·fsdp=8"),
        ("--topology 2xH100 --mesh.fsdp 3", r"does not multiply to 2"),
        ("--topology v5e-8,v5e-4 --mesh.fsdp 3", r"none of the 2 places can run this"),
    ],
)
def test_a_mistake_is_one_line(words, said):
    with pytest.raises(UserError, match=said) as told:
        typed(*words.split())
    assert "\n" not in str(told.value)


def test_what_cannot_fit_is_exit_3_alone_and_a_row_among_others(capsys):
    with pytest.raises(OutOfResources, match=r"does not fit the 15.8 GiB of a device"):
        typed("--topology", "v5e-1", "--batch", "4")  # by the least that it must hold: nothing is compiled
    typed("--topology", "v5e-1,H200", "--batch", "4")
    assert "v5e-1, 4 rows: the training step does not fit" in capsys.readouterr().out


def test_the_compilers_own_verdict_is_a_size(settings, monkeypatch):
    """A step that arithmetic lets pass and the compiler refuses."""

    class Refused:
        def lower(self, *inputs):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 29.50G of 15.75G hbm."
            )

    real = recompute.traceable
    monkeypatch.setattr(recompute, "traceable", lambda *a: real(*a)._replace(step=Refused()))
    found = row.plan(settings, place.parse("v5e-4"), None)
    assert not found["fits"] and found["error_kind"] == "memory"
    assert found["total_bytes_per_chip"] == int(29.5 * GIB)
    assert found["free_bytes_per_chip"] == 15.75 * GIB - int(29.5 * GIB)


def test_a_missing_compiler_is_one_line_that_names_the_extra():
    script = (
        "import sys; sys.modules['libtpu'] = None; from jaxft import plan; from jaxft.errors import run_verb; "
        "sys.argv[1:] = ['--config', 'gemma2_9b.py', '--topology', 'v5e-8']; run_verb(plan.main)"
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("TPU_")
    }  # where JAX notes it
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert "pip install 'jaxft[plan]'" in ended.stderr


def test_every_tpu_has_what_a_plan_needs():
    for kind in topology.SHAPES:
        chip = chips.named(kind)
        assert chip.flops and chip.ici_links and chip.usd_per_chip_hour and chip.price_source
        assert (chip.dcn_bytes_per_second is None) == (chip.dcn_source is None)


def test_a_v4_chip_is_one_device():
    assert len(topology.devices("v4-8")) == len(topology.devices("v5p-8")) == 4


# --- beside what was measured ---


def test_a_report_shows_planned_against_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "png", lambda chart, theme: b"")
    told = {"seconds_per_step": 0.25, "device_memory_gib": 7.5, "tokens_per_second": 4000.0}
    folder = finished(tmp_path / "run", metrics=[r | told if "loss" in r else r for r in lines()])
    results = json.loads((folder / "results.json").read_text())
    nothing = report.write(folder)
    assert nothing["planned_and_measured"] == [] and "Planned against" not in (folder / "report.md").read_text()
    settings = config.load("gemma2_9b.py")
    source, mesh, _, (_, length) = program.prepare(settings, "v5e-8")
    results["planned"] = row.expected(settings, source, mesh, "dots", length)
    results["program"] = {"device_bytes": 7 * GIB}
    (folder / "results.json").write_text(json.dumps(results))
    found = {each["what"]: each for each in report.write(folder)["planned_and_measured"]}
    step = results["planned"]["seconds_per_step"]
    assert results["planned"]["topology"] == "v5e-8" and 0.3 < step < 1.5
    assert found["Seconds per step"]["ratio"] == 0.25 / step
    assert found["Seconds per step, roofline"]["planned"] == step * roofline.EFFICIENCY
    assert found["Memory of a device"]["ratio"] == pytest.approx(7.5 / 7)
    assert found["Tokens per second"]["planned"] == pytest.approx(8192 / step * 0.9)  # its rows fill 0.9 of positions
    assert found["In training steps"]["planned"] == 20 * step
    said = (folder / "report.md").read_text()
    assert "## Planned against measured" in said and "bound by `network (ICI)`" in said
    assert row.expected(settings, source, make_mesh(devices=jax.devices()), "dots", length) is None


@pytest.mark.exhaustive
def test_the_9b_gathers_its_weights_twice_on_v5e_8():
    found = row.plan(config.load("gemma2_9b.py"), place.parse("v5e-8"), None)
    weights = 2 * nine(8).weights * 2
    assert found["fits"] and found["policy"] == "dots"
    assert found["total_bytes_per_chip"] / GIB <= 8.0
    assert found["ici_bytes_per_chip"] <= 1.35 * weights
