"""Several runs side by side: what the table says, what may be compared, and the three files."""

import json
from pathlib import Path

import pytest
from test_report import FILES, TAGS, Page, finished, lines, undrawn
from test_report_sections import rewrite, whole

from jaxft import report
from jaxft.errors import UserError
from jaxft.reports import comparison, content, plots
from jaxft.reports.folder import read

__all__ = ["undrawn"]
WRITTEN = ("comparison.md", "comparison.html", "comparison.json")


def named(folder: Path, **fields) -> Path:
    """Sets `section__field` of a run's config."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        section, _, key = name.partition("__")
        config[section][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """A run on GSM8K with losses per example, one of another model without, and one that only began."""
    folder = tmp_path_factory.mktemp("runs")
    first = named(whole(folder / "first"), model__name="Qwen/Qwen2-1.5B", data__name="openai/gsm8k", lora__rank=4)
    second = named(finished(folder / "second", price=None), model__name="apple/OpenELM-3B", data__name="openai/gsm8k")
    third = finished(folder / "third", metrics=lines(evaluations=((0, 2.0, 0.4),), steps=3))
    (third / "results.json").unlink()
    return [first, second, third]


def cells(table, name: str) -> list[str]:
    return [str(cell) for cell in next(row for row in table.rows if str(row[0]).startswith(name))[1:]]


def test_the_table_has_the_published_reports_rows(runs):
    table = comparison.table([content.find(read(run)) for run in runs])
    assert [cell.text for cell in table.header[1:]] == ["first", "second", "third"]
    assert cells(table, "Model")[:2] == ["Qwen/Qwen2-1.5B", "apple/OpenELM-3B"]
    assert cells(table, "Adapter")[0] == "LoRA r 4, α 16, dropout 0.1"
    loss = cells(table, "Validation loss")
    assert loss[0].startswith("2.0000 → 0.8000 (−60.0 %) [−60") and loss[1] == "2.0000 → 0.8000 (−60.0 %)"
    assert cells(table, "Train loss, logged")[0] == "1.5150 → 0.8150 (−46.2 %)"
    assert cells(table, "Token accuracy (teacher-forced)") == ["40.0 % → 75.0 %"] * 2 + ["40.0 % → 40.0 %"]
    own = cells(table, "final_answer exact_match, n 120")
    assert "Δ +" in own[0] and "p < 0.0001" in own[0] and own[2] == comparison.NONE
    assert cells(table, "Overfitting flag") == ["raised", "not decided", "not decided"]
    assert cells(table, "Cost") == ["3.00 USD", "unknown (no price given)", "unknown"]
    published = cells(table, "Published")
    assert published[0] == "GSM8K 58.5 % (4-shot)" and published[1].startswith("GSM8K: none published")


def test_losses_per_token_are_drawn_together_only_for_one_model(runs):
    found = [content.find(read(run)) for run in runs[:2]]
    assert [chart.name for chart in comparison.charts(found)] == ["relative_loss", "token_accuracy"]
    alike = comparison.charts([found[0], found[0]])
    assert [chart.name for chart in alike] == ["loss", "bits_per_byte", "relative_loss", "token_accuracy"]
    relative = alike[2].curves[0].points
    assert relative == ([0.0, 0.5, 1.0], [1.0, 0.4, 0.45])


def test_the_comparison_is_printed_and_written(runs, tmp_path, capsys, undrawn):
    out = tmp_path / "new" / "compared"
    assert report.main([*map(str, runs), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "first" in said and "bits per byte" in said and "not task accuracy" in said
    assert "\x1b" not in said and "\u202e" not in said
    assert all((out / name).is_file() for name in WRITTEN) and all(
        (run / name).is_file() for run in runs for name in FILES
    )
    told = json.loads((out / "comparison.json").read_text())
    assert told["runs"] == ["first", "second", "third"] and told["table"][0]["Best step / steps"] == "10 / 20"
    assert told["figures"][0]["eval_loss"]["best"] == 0.8
    page = Page((out / "comparison.html").read_text())
    assert not page.open and "script" not in {tag for tag, _ in page.tags} and TAGS in page.text
    text = (out / "comparison.md").read_text()
    assert "| Model | Qwen/Qwen2-1.5B |" in text and "Qwen2 announcement" in text


def test_more_runs_than_colours_are_told_apart_by_their_lines(tmp_path):
    many = [finished(tmp_path / f"run{i}", hostile="x") for i in range(len(plots.LIGHT.curves) + 1)]
    found = [content.find(read(run)) for run in many]
    chart = comparison.charts(found)[0]
    assert len({(curve.colour % len(plots.LIGHT.curves), curve.line) for curve in chart.curves}) == len(many)
    assert plots.png(chart, plots.DARK).startswith(b"\x89PNG")


def test_names_in_legends_are_no_mathematics(tmp_path):
    label = "$x_1^{$ _hidden \x1b[31m"
    chart = plots.Plot("loss", "Loss", "", [plots.Curve(label, ([0.0, 1.0], [1.0, 2.0]), 0)])
    assert plots.png(chart, plots.LIGHT).startswith(b"\x89PNG")


def test_where_a_comparison_cannot_be_written_the_user_is_told(runs, tmp_path):
    with pytest.raises(UserError, match="--out: a comparison needs two run folders or more, found 1"):
        report.main([str(runs[0]), "--out", str(tmp_path / "x")])
    with pytest.raises(UserError, match="unknown option --verbose"):
        report.main(["--verbose", "x"])


def test_a_comparison_into_a_file_is_the_users_mistake(runs, tmp_path, undrawn, capsys):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="the comparison cannot be written"):
        report.main([str(runs[0]), str(runs[1]), "--out", str(tmp_path / "file")])


def test_rewriting_a_report_keeps_no_plot_of_an_earlier_one(tmp_path, undrawn):
    folder = finished(tmp_path / "run")
    report.write(folder)
    assert (folder / "plots/grad_norm.png").exists()
    (folder / "metrics.jsonl").write_text(json.dumps(lines()[0]) + "\n")
    rewrite(folder / "results.json", state="running")
    report.write(folder)
    assert not (folder / "plots/grad_norm.png").exists()
