"""The report of a run folder: its figures, what it makes of hostile text, and of folders with something missing."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jaxft import config, report
from jaxft.analysis.gsm8k.answers import score, summary
from jaxft.errors import UserError
from jaxft.reports import document, markdown, plots

TAGS = '</pre><script>alert(1)</script><img src="http://evil.example/x.png">'
HOSTILE = TAGS + " | `a` ```` \x1b[31m\u202e\ud800 & **b** [c](d)"
REFERENCE = "2 + 2 = 4\n#### 4"
EVALUATIONS = ((0, 2.0, 0.40), (10, 0.8, 0.70), (20, 0.9, 0.75))  # step, eval_loss, token accuracy; best at 10
FILES = ("report.json", "report.md", "report.html")


def lines(evaluations=EVALUATIONS, steps: int = 20) -> list[dict]:
    """Metrics of a run whose train loss falls from 1.9 by 0.07 a line."""
    train = [
        {"step": s, "epoch": s / 10, "loss": 1.9 - 0.07 * s, "mean_token_accuracy": 0.4 + 0.02 * s,
         "learning_rate": 1e-3, "grad_norm": 1.0, "num_tokens": 100 * s, "tokens_per_second": 50.0}
        for s in range(1, steps + 1)
    ]  # fmt: skip
    held_out = [
        {"step": s, "epoch": s / 10, "eval_loss": loss, "eval_mean_token_accuracy": right, "eval_seconds": 0.1}
        for s, loss, right in evaluations
    ]
    return sorted(train + held_out, key=lambda r: r["step"])


def finished(
    folder: Path, price: float | None = 1.5, hostile: str = HOSTILE, metrics: list[dict] | None = None
) -> Path:
    """A finished run with one task, whose texts are `hostile`."""
    settings = config.Config(
        model=config.Model(name=f"org/{hostile}"),
        data=config.Data(name="generated:word_problems"),
        eval=config.Eval(tasks=("final_answer",)),
        run=config.Run(usd_per_chip_hour=price),
    )
    prompts = [f"{i} {hostile}" for i in range(10)]
    base = summary(score(prompts, [REFERENCE] * 10, [hostile] * 9 + ["#### 4"]))
    tuned = summary(score(prompts, [REFERENCE] * 10, [f"{hostile} #### 4"] * 8 + ["#### 5"] * 2))
    results = {
        "jaxft": "0.1.0",
        "versions": {"jax": "0.10.0", "flax": "0.12.4", "python": "3.11.9"},
        "started": "2026-03-01T12:00:00+00:00",
        "state": "finished",
        "ended": "all 20 steps done",
        "device": {"platform": "cpu", "kind": hostile, "count": 4, "processes": 1},
        "mesh": {"data": 1, "fsdp": 4, "tensor": 1},
        "model": {"family": "llama", "parameters": 1000, "trainable": 50, "dtype": "float32", "name": "m"},
        "data": {"format": "gsm8k", "template": "plain", "train_rows": 90, "validation_rows": 10, "cut": 3,
                 "dropped": 2, "train_tokens": 12345, "longest": 77, "fill": 0.9, "length": 128},
        "steps": 20, "step": 20, "best_step": 10, "best_loss": 0.8, "train_seconds": 900.0, "wall_seconds": 1800.0,
        "tokens": 45000, "tasks": {"final_answer": {"base": base, "tuned": tuned}},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(settings)))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics or lines()))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run with its report written; tests only read it."""
    folder = finished(tmp_path_factory.mktemp("runs") / "finished")
    report.write(folder)
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Plots take most of a report's time; where a test does not look at them they stay empty."""
    monkeypatch.setattr(plots, "png", lambda plot, theme: b"")


def read(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


class Page(HTMLParser):
    """Every tag with its attributes, the text, and the tags left open."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_json_has_the_runs_figures(run):
    figures = read(run)
    assert figures["eval_loss"] == {"start": 2.0, "best": 0.8, "end": 0.9}
    assert figures["eval_mean_token_accuracy"] == {"start": 0.4, "best": 0.7, "end": 0.75}
    assert figures["eval_perplexity"]["best"] == math.exp(0.8)
    assert figures["train_loss"] == pytest.approx({"start": 1.83, "best": 1.2, "end": 0.5})
    assert figures["best_step"] == 10
    assert figures["decrease"] == pytest.approx(
        {"train_loss": 1 - 0.5 / 1.83, "eval_loss": 1 - 0.9 / 2.0, "eval_loss_to_best": 1 - 0.8 / 2.0}
    )
    assert figures["quantities"]["validation_loss_decrease_percent"]["value"] == pytest.approx(60)
    assert figures["missing"] == []


def test_task_metrics_keep_their_names_and_intervals(run):
    scores = read(run)["tasks"]["final_answer"]
    told = json.loads((run / "results.json").read_text())["tasks"]["final_answer"]
    assert scores["base"]["exact_match"] == 0.1
    assert scores["tuned"]["exact_match"] == 0.8
    for model in ("base", "tuned"):
        assert scores[model] == {k: v for k, v in told[model].items() if k != "examples"}
        low, high = scores[model]["exact_match_interval"]
        assert low < scores[model]["exact_match"] < high
    written = (run / "report.md").read_text()
    assert "base **10.0 %** (1.8 to 40.4), tuned **80.0 %** (49.0 to 94.3); the intervals do not overlap" in written
    assert "It is not task accuracy" in written


def test_cost_is_hours_times_chips_times_price_and_unknown_without_a_price(run, tmp_path, undrawn):
    figures = read(run)
    assert figures["chip_hours"] == 0.5 * 4
    assert figures["cost_usd"] == 0.5 * 4 * 1.5
    assert (figures["goodput"], figures["tokens_per_second"]) == (0.5, 50.0)
    free = finished(tmp_path / "free", price=None)
    assert report.write(free)["cost_usd"] is None
    assert "unknown (no price given)" in (free / "report.md").read_text()


def test_speed_use_of_the_chips_and_memory_are_told_where_they_were_logged(run, tmp_path, undrawn):
    figures = read(run)
    assert figures["median_tokens_per_second"] == 50.0 and figures["median_mfu"] is None
    assert "the peak of these devices is not known" in (run / "report.md").read_text()
    logged = {"tokens_per_second_per_chip": 12.5, "seconds_per_step": 0.25, "data_wait": 0.01}
    measured = [
        r | logged | {"mfu": 0.5 + r["step"] / 1000, "device_memory_gib": r["step"] / 10} if "loss" in r else r
        for r in lines()
    ]
    folder = finished(tmp_path / "measured", hostile="TPU7x", metrics=measured)
    figures = report.write(folder)
    assert figures["median_mfu"] == pytest.approx(0.5105)  # of twenty lines
    assert (figures["peak_device_memory_gib"], figures["peak_host_memory_gib"]) == (2.0, None)
    assert figures["chip_hours"] == 0.5 * 4 / 2  # a TPU7x is two devices
    told = (folder / "report.md").read_text()
    for said in (
        "51.0 % of the chips' bfloat16 peak",
        "2.00 GiB, of the fullest device",
        "50, 12 per chip",
        "0.25 (median)",
    ):
        assert said in told
    assert "utilisation" not in told and "Peak device memory" not in told


def test_the_page_loads_nothing_and_holds_only_our_tags(run):
    text = (run / "report.html").read_text()
    page = Page(text)
    ours = {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "ul", "li", "div", "strong",
        "code", "table", "thead", "tbody", "tr", "th", "td", "picture", "source", "img", "figure", "figcaption", "pre",
        "details", "summary",
    }  # fmt: skip
    assert {tag for tag, _ in page.tags} <= ours and not page.open
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("href", "style") for name in attributes), (tag, attributes)
        for name in ("src", "srcset"):
            assert attributes.get(name, "data:image/png;base64,").startswith("data:image/png;base64,")
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert "url(" not in text and "@import" not in text
    assert TAGS in page.text


def test_no_control_character_reaches_a_file_and_all_are_shown(run):
    for name in FILES:
        text = (run / name).read_text(encoding="utf-8")
        assert "\x1b" not in text and "\u202e" not in text
    assert r"\x1b[31m\u202e\ud800" in (run / "report.md").read_text()
    assert r"\x1b[31m\u202e\ud800" in (run / "report.html").read_text()


def test_data_in_markdown_stays_inside_fences_and_code_spans(run):
    text = (run / "report.md").read_text()
    fences = re.findall(r"^(`{3,})text\n(.*?)\n\1$", text, flags=re.M | re.S)
    assert len(fences) == 3 * 5
    assert all(len(fence) > max(map(len, re.findall("`+", body)), default=0) for fence, body in fences)
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", text, flags=re.M | re.S)
    prose = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)
    assert "script" in outside and "script" not in prose


def test_a_table_cell_with_a_bar_stays_one_cell():
    table = document.Table(("a", "b"), [("x|y", document.Code("p|q`r"))])
    assert markdown.markdown([table]).splitlines()[2] == "| x\\|y | ``p\\|q`r`` |"


def test_the_same_folder_gives_the_same_bytes(run, tmp_path):
    again = finished(tmp_path / "finished")
    report.write(again)
    report.write(again)
    written = sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert {str(p) for p in written} >= {
        f"plots/{n}.png" for n in ("loss", "token_accuracy", "learning_rate", "grad_norm")
    }
    assert all((again / p).read_bytes() == (run / p).read_bytes() for p in written)


def test_a_half_finished_run_is_reported_with_what_is_missing(tmp_path, undrawn):
    folder = finished(tmp_path / "half")
    results = json.loads((folder / "results.json").read_text())
    begun = {k: results[k] for k in ("jaxft", "versions", "started", "device", "mesh", "model", "data", "steps")}
    (folder / "results.json").write_text(json.dumps(begun | {"state": "running", "tasks": {}}))
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text()[:-60])
    figures = report.write(folder)
    assert figures["step"] == 20 and figures["best_step"] == 10
    assert figures["eval_loss"] == {"start": 2.0, "best": 0.8, "end": 0.8}
    missing = "\n".join(figures["missing"])
    assert "metrics.jsonl is damaged: 1 of 23 lines left out" in missing
    assert "results.json was not rewritten" in missing
    assert "step, train_seconds, wall_seconds, tokens" in missing
    assert "task final_answer: no scores of the base and the tuned model" in missing
    assert "has not finished" in (folder / "report.md").read_text()


def test_damaged_files_are_named_and_the_rest_is_reported(tmp_path, undrawn):
    folder = finished(tmp_path / "damaged")
    (folder / "config.json").write_bytes(b'{"model": \xff')
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("[1]\nnonsense\n" + '{"step": 3, "loss": NaN}\n' + text + '{"step": "x"}\n')
    (folder / "results.json").write_text(
        json.dumps({"state": 7, "tasks": {"t": {"base": 3, "tuned": []}}, "device": [1]})
    )
    figures = report.write(folder)
    assert figures["eval_loss"]["best"] == 0.8
    assert figures["train_loss"]["start"] == pytest.approx(1.83)
    assert figures["missing"][:2] == [
        "config.json is damaged: not a JSON object",
        "metrics.jsonl is damaged: 3 of 27 lines left out",
    ]


def test_a_folder_with_metrics_alone_is_reported(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines()[0]) + "\n")
    figures = report.write(tmp_path)
    assert figures["eval_loss"] == {"start": 2.0, "best": 2.0, "end": 2.0}
    assert {"config.json is missing", "results.json is missing"} <= set(figures["missing"])
    assert not (tmp_path / "plots" / "learning_rate.png").exists()


def test_what_is_no_run_folder_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"not a run folder; expected .* found none of them"):
        report.write(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # a checkpoint's
    with pytest.raises(UserError, match="not a run folder"):
        report.write(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        report.write(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a file"):
        report.write(tmp_path / "config.json")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_several_runs_are_compared_on_stdout(tmp_path, capsys, undrawn):
    other = finished(tmp_path / "other", price=None, metrics=lines(evaluations=((0, 2.0, 0.4), (10, 1.0, 0.6))))
    assert report.main([str(finished(tmp_path / "finished")), str(other)]) == 0
    said = capsys.readouterr().out
    table: dict[str, list[str]] = {}
    for line in filter(
        None, said[said.rindex("\n\n  ") :].splitlines()
    ):  # a long cell goes on in lines that begin with spaces
        table.setdefault(re.split(r" {2,}", line)[0], re.split(r" {2,}", line)[1:])
    assert table[""] == ["finished", "other"]
    assert table["final_answer exact_match, n 10"] == ["10.0 % (1.8 to 40.4) → 80.0 % (49.0 to 94.3)"] * 2
    assert table["Validation loss"] == ["2.0000 → 0.8000 (−60.0 %)", "2.0000 → 1.0000 (−50.0 %)"]
    assert table["Cost"] == ["3.00 USD", "unknown (no price given)"]
    assert all((other / name).is_file() for name in FILES)


def test_a_wrong_command_line_says_what_is_expected():
    with pytest.raises(UserError, match="no run folder given"):
        report.main([])
    with pytest.raises(UserError, match="unknown option --verbose"):
        report.main(["--verbose", "x"])


def test_a_report_needs_no_jax_and_leaves_matplotlib_as_it_was(tmp_path):
    folder = finished(tmp_path / "run")
    program = f"""
import sys, matplotlib
from pathlib import Path
def settings():
    names = set(matplotlib.rcParams) - {{"backend"}}  # to read that one imports pyplot
    return {{name: matplotlib.rcParams[name] for name in names}}
before = settings()
import jaxft.report
jaxft.report.write(Path({str(folder)!r}))
assert settings() == before
assert not {{"jax", "jaxlib", "flax", "matplotlib.pyplot"}} & set(sys.modules)
"""
    root = Path(report.__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
