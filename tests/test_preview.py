"""The preview: what it shows is what is trained, hostile text is shown and never obeyed, and no weight is read."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jaxft import command_line, config, preview, train
from jaxft.data import chat, dataset, rows
from jaxft.data.chat import Example
from jaxft.data.loader import Loader
from jaxft.data.rows import Row, Turn
from jaxft.errors import UserError, one_line, run_verb
from jaxft.previews import content, facts, page, terminal
from jaxft.previews.overlap import overlap
from jaxft.previews.pieces import pieces, spans
from jaxft.weights import hub

TINY = hub.BUILTIN["builtin:tiny"]
TAGS = (
    '</pre></td></mark></section><script>alert(1)</script><img src="http://evil.example/x" onerror=x><style>@import "x"'
)
HOSTILE = [
    ("colours \x1b[31mred\x1b]0;owned\x07 [bold]x[/bold] \x9b2J", "back\x08 \x7f and \r\n return\rs"),
    (f"tags {TAGS}", f"{TAGS} &lt; \"quotes' `code`"),
    ("bidi \u202egnirts\u202c \u2066x\u2069 \ufeff", "nul \x00 nbsp\xa0x lines\u2028a\u2029b\x85"),
    ("one token " + "x" * 90, "y" * 60),
    ("lone line breaks", "\n.\n"),
    ("tabs\tand  spaces \n", " \n x \n\n"),
    ("scripts 👩‍👩‍👧 漢字 עברית é", "ok 🙂 e\u0301"),
    ("says <s> and </s> itself", "fine</s>"),
    ("[[fake]] ⟨<s>⟩ ↵ │ ¦\n  ok   BOS: forged", "1"),
]  # fmt: skip
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def jsonl(file: Path, pairs) -> str:
    file.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in pairs))
    return str(file)


def command(*overrides: str) -> list[str]:
    """tiny_cpu.py on few rows of its own."""
    return ["--config", "tiny_cpu.py", "--data.limit", "60", "--data.cache", "None", *overrides]


def on(file: str, *overrides: str) -> list[str]:
    """tiny_cpu.py on the rows of a file."""
    own = ("--data.name", "None", "--data.test_split", "None", "--eval.tasks", "--data.files", file)
    return command(*own, *overrides)


def gathered(arguments: list[str], count: int = 3, folder: Path = TINY):
    """The parts and the preview of a command line."""
    settings = config.load(arguments[1], arguments[2:])
    splits, tokenizer = rows.load(settings.data, settings.run.seed), chat.load_tokenizer(folder)
    arch = json.loads((folder / "config.json").read_text())
    data = dataset.build(settings, splits, tokenizer, arch["vocab_size"], 512)
    return settings, splits, tokenizer, data, facts.gather("name", settings, splits, data, tokenizer, count)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """(settings, splits, tokenizer, data, preview) of the hostile rows, all of them shown; the file's name is hostile too."""
    file = tmp_path_factory.mktemp("rows") / "h \x1b[31m\u202e<b>.jsonl"
    return gathered(on(jsonl(file, HOSTILE * 2), "--data.validation_fraction", "0.2"), 100)


def said(found, boundaries=False, stream=None) -> str:
    stream = stream or io.StringIO()
    terminal.show(found, stream, boundaries)
    return stream.getvalue()


class Page(HTMLParser):
    """Every tag with its attributes, the text in `mark`, all text, and the tags left open."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.open, self.rows = [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if tag == "pre":
            self.rows.append(["", ""])

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "pre" in self.open:
            self.rows[-1][0] += data
            self.rows[-1][1] += data if "mark" in self.open else ""


def test_the_trained_pieces_of_a_row_are_its_loss_mask(hostile):
    _, _, tokenizer, data, found = hostile
    shown = {row.known.origin: row for row in found.shown}
    examples = [*data.train.examples, *data.validation.examples]
    assert len(shown) >= len(data.train.examples)
    for example in examples:
        cut = pieces(example, tokenizer)
        assert shown.get(example.origin) is None or shown[example.origin].pieces == cut
        assert sum(piece.tokens for piece in cut) == len(example.tokens)
        assert sum(piece.tokens for piece in cut if piece.trained) == example.loss_mask.sum()
        trained = "".join(piece.text for piece in cut if piece.trained)
        assert trained == tokenizer.decode(example.tokens[example.loss_mask], skip_special_tokens=False)
        assert "".join(p.text for p in cut) == tokenizer.decode(example.tokens, skip_special_tokens=False)


def test_special_tokens_are_told_from_their_text(hostile):
    _, _, tokenizer, _, _ = hostile
    example = Example(
        np.array([1, 2, *tokenizer("⟨<s", add_special_tokens=False)["input_ids"]], np.int32), np.zeros(9, bool), "x"
    )
    assert [(p.text, p.special) for p in pieces(example, tokenizer)][:2] == [("<s>", True), ("</s>", True)]
    assert "".join(s.text for s in spans(pieces(example, tokenizer), 99)) == "⟨<s>⟩⟨</s>⟩⟨<s"


def test_an_answer_of_one_line_break_is_seen(hostile):
    example = chat.encode(Row((Turn("user", "q"), Turn("assistant", "\n")), "o", prompt="q "), hostile[2], "plain")
    _, _, _, _, found = hostile
    shown = dataclasses.replace(found.shown[0], pieces=pieces(example, hostile[2]))
    assert "\n  │ ⟨<s>⟩q·[[↵\n  │ ⟨</s>⟩]]\n" in said(dataclasses.replace(found, shown=(shown,)))


def test_a_plain_stream_and_the_page_mark_what_is_trained(hostile):
    _, _, tokenizer, data, found = hostile
    text, html = said(found), Page(page.page(found))
    blocks = re.findall(r"(?:^  │ .*\n)+", text.split("\nRows\n")[1], flags=re.M)
    assert len(blocks) == len(html.rows) == len(found.shown)
    examples = {e.origin: e for e in [*data.train.examples, *data.validation.examples]}
    for block, (whole, trained), shown in zip(blocks, html.rows, found.shown, strict=True):
        plain = "".join(line[4:] + "\n" for line in block.splitlines())[:-1]
        assert plain.replace("]]", "").replace("[[", "") == whole.replace("]]", "").replace("[[", "")
        example = examples[shown.known.origin]
        marked = tokenizer.decode(example.tokens[example.loss_mask], skip_special_tokens=False)
        assert legible(trained) == legible(marked)
        assert plain.count("[[") == 1 + whole.count("[[")
        assert legible(plain.split("[[")[-1].rpartition("]]")[0]) == legible(marked).rstrip("\n")


def legible(text: str) -> str:
    """Text without the marks for space and special tokens, or the text that such marks are made of."""
    text = (
        text.replace("⟨<s>⟩", "<s>").replace("⟨</s>⟩", "</s>").replace("↵", "").replace("⇥   ", "\t").replace("·", " ")
    )
    text = re.sub(r"[^\S \n\t]|[^\S\n\t]", lambda m: m[0] if m[0] == " " else ascii(m[0])[1:-1], text)
    return UNSAFE.sub(lambda m: m[0] if m[0] == "\t" else ascii(m[0])[1:-1], text)


def test_hostile_text_is_shown_and_never_obeyed(hostile):
    found = hostile[-1]
    text, html = said(found, True), page.page(found, True)
    for written in (text, html):
        assert not UNSAFE.search(written)
        assert r"\x1b[31mred\x1b]0;owned\x07" in re.sub(r"¦|<[^>]+>", "", written)
        assert r"\u202e" in written and r"\x00" in written and r"\x9b" in written
    assert r"h \x1b[31m\u202e<b>.jsonl:1" in text and r"h \x1b[31m\u202e&lt;b&gt;.jsonl:1" in html
    data = [line for line in said(found).splitlines() if "forged" in line]
    assert data and all(line.startswith("  │ ") for line in data)


def test_the_page_loads_nothing_and_holds_only_our_tags(hostile):
    text = page.page(hostile[-1])
    html = Page(text)
    ours = {
        "html", "head", "meta", "title", "style", "body", "main", "section", "h1", "h2", "h3", "p", "ul", "li", "strong",
        "code", "span", "div", "table", "thead", "tbody", "tr", "th", "td", "svg", "rect", "input", "label", "pre", "mark", "i",
    }  # fmt: skip
    assert {tag for tag, _ in html.tags} == ours and not html.open
    assert [tag for tag, _ in html.tags].count("style") == 1
    for tag, attributes in html.tags:
        assert not any(name.startswith("on") or name in ("href", "src", "style") for name in attributes), (
            tag,
            attributes,
        )
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    policy = next(a["content"] for tag, a in html.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script" not in policy
    assert TAGS in html.text


def test_terminal_and_page_say_the_same(hostile):
    found = hostile[-1]
    text, html = said(found), " ".join(Page(page.page(found)).text.split())
    assert one_line(content.summary(found)) in text and one_line(content.summary(found)) in html
    for section in content.sections(found):
        assert section.title in text and section.title in html
        for part in section.parts:
            if isinstance(part, content.Check):
                assert one_line(part.said) in text and one_line(part.said) in html
            if isinstance(part, content.Table):
                assert all(one_line(cell) in text and one_line(cell) in html for row in part.rows for cell in row)


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def colours(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


def test_a_terminal_has_colours_and_lines_of_its_width(hostile, colours):
    _, _, tokenizer, data, found = hostile
    text = said(found, stream=Screen())
    assert set(re.findall(r"\x1b\[?.?", text)) == {"\x1b[0", "\x1b[1", "\x1b[2", "\x1b[3", "\x1b[7"}
    bare = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert not UNSAFE.search(bare) and "[[trained]]" not in bare
    assert max(map(len, bare.splitlines())) <= 80
    green = "".join(re.findall(r"\x1b\[1(?:;[27])?;32m([^\x1b]*)", text.split("across")[-1]))
    examples = {e.origin: e for e in [*data.train.examples, *data.validation.examples]}
    trained = [examples[s.known.origin] for s in found.shown]
    letters = "trained" + "".join(tokenizer.decode(e.tokens[e.loss_mask], skip_special_tokens=False) for e in trained)
    assert re.sub(r"\W", "", legible(green)) == re.sub(r"\W", "", legible(letters))


def test_without_colours_a_terminal_has_marks(hostile, colours, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[trained]]" in said(hostile[-1], stream=Screen())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "[[trained]]" in said(hostile[-1], stream=Screen())


def test_the_counts_are_those_of_the_dataset(capsys):
    arguments = command("--data.max_length", "64")
    *_, data, found = gathered(arguments)
    preview.main([*arguments, "--rows", "0"])
    text = capsys.readouterr().out
    train_part, held = data.parts["train"].counts, data.parts["validation"].counts
    assert train_part.cut and train_part.tokens == sum(len(e.tokens) for e in data.train.examples)
    for label, name in (("rows left", "kept"), ("tokens in them", "tokens"), ("longest, before any cut", "longest")):
        shown = next(line for line in text.splitlines() if label in line).split()[-2:]
        assert shown == [f"{getattr(part, name):,}" for part in (train_part, held)]
    shares = [100 * part.trained_tokens / part.tokens for part in (train_part, held)]
    wanted = [f"{part.trained_tokens:,} ({share:.1f} %)" for part, share in zip((train_part, held), shares)]
    assert re.search(rf"trained tokens +{re.escape(wanted[0])} +{re.escape(wanted[1])}\n", text)
    assert re.search(rf"cut at 64 tokens +{train_part.cut} \(", text)
    assert all(note in text for note in data.notes)
    assert found.packing.sequences == len(data.train._bins(0)) and f"{100 * data.train.fill:.1f} % full" in text
    assert (
        f"all because they are cut at 64 tokens; end tokens: </s> ({sum(found.ending.tokens[0][1:])} answers)" in text
    )


def test_steps_are_those_that_training_takes():
    for overrides in ((), ("--optim.max_steps", "None", "--optim.epochs", "2.5"), ("--data.packing", "False")):
        arguments = command(*overrides)
        settings, *_, found = gathered(arguments, 0)
        assert found.packing.steps == train.prepare(settings).steps
        assert found.packing.sequences == (len(gathered(arguments, 0)[3].train._bins(0)))


def test_bars_hold_each_row_once():
    random = np.random.default_rng(0)
    for lengths, limit in (
        (random.integers(2, 400, 1000), 300), (np.array([5]), 1024), (np.array([2000, 3000]), 1024),
        (np.append(random.integers(20, 40, 1000), [5000]), 8192), (random.integers(1, 3, 10), 2), (np.array([64] * 9), 64),
    ):  # fmt: skip
        bars = facts.bars(lengths, limit)
        assert len(bars) <= facts.BARS + 2
        for bar in bars:
            assert bar.rows == ((lengths >= bar.low) & (lengths <= bar.high)).sum()
            assert bar.beyond == (bar.low > limit)
        assert sum(bar.rows for bar in bars) == len(lengths)


def test_the_longest_rows_are_named_with_what_became_of_them(tmp_path):
    file = jsonl(
        tmp_path / "r.jsonl", [("a " * 5, "b " * n) for n in range(10, 20)] + [("q", "w " * 200), ("p " * 300, "z")]
    )
    *_, found = gathered(on(file, "--data.max_length", "64"))
    first, second, third = found.longest[:3]
    assert (first.origin, first.tokens) == (f"{file}:12", 0) and first.whole > 300
    assert (second.origin, second.tokens) == (f"{file}:11", 64) and second.whole > 200
    assert third.whole == third.tokens
    text = said(found)
    assert re.search(rf"{first.whole} +dropped +(train|validation) +{re.escape(file)}:12\n", text)
    assert re.search(rf"{second.whole} +cut to 64 +(train|validation) +{re.escape(file)}:11\n", text)
    assert [s.known.origin for s in found.shown if s.why != "sample"][:1] == [f"{file}:11"]


def test_a_long_row_is_shown_with_both_ends_and_says_what_is_left_out(hostile):
    _, _, tokenizer, data, _ = hostile
    example = max(data.train.examples, key=lambda e: len(e.tokens))
    cut = pieces(example, tokenizer)
    shown = spans(cut, 20)
    (gap,) = [s for s in shown if s.kind == "gap"]
    kept = (*cut[:15], *cut[-5:])
    left = [
        len(example.tokens) - sum(p.tokens for p in kept),
        int(example.loss_mask.sum()) - sum(p.tokens for p in kept if p.trained),
    ]
    assert [int(n) for n in re.findall(r"\d+", gap.text)] == left
    assert sum(s.starts for s in shown) == 20 and shown[-1].text == "⟨</s>⟩"
    assert len(spans(cut, 1)) >= 2


def planted(found, change):
    """The summary (as "") and the checks of a preview whose training examples went through `change`."""
    settings, splits, tokenizer, data, _ = found
    loader = Loader(change(data.train.examples), batch_size=8, length=512)
    seen = facts.gather("x", settings, splits, dataclasses.replace(data, train=loader), tokenizer, 1)
    return {"": content.summary(seen)} | {check.name: check for check in content.checks(seen)}


def test_bos_and_end_of_turn_hold_in_rows_as_they_are():
    checks = planted(gathered(command()), lambda examples: examples)
    assert checks["BOS"].ok and checks["BOS"].said == "every row begins with exactly one <s>"
    assert checks["end of turn"].ok and "</s> (60 answers)" in checks["end of turn"].said
    assert checks["special tokens"].ok and checks["duplicates"].ok


def test_a_planted_fault_of_bos_is_reported():
    def twice(example):
        return Example(
            np.append([1], example.tokens).astype(np.int32), np.append([False], example.loss_mask), example.origin
        )

    def without(example):
        return Example(example.tokens[1:], example.loss_mask[1:], example.origin)

    for change in (twice, without):
        found = gathered(command())
        origin = found[3].train.examples[2].origin
        checks = planted(found, lambda e, change=change: [*e[:2], change(e[2]), *e[3:]])
        assert not checks["BOS"].ok
        assert checks["BOS"].said == f"1 row ({origin}) does not begin with exactly one <s>"
        assert "To look at: BOS" in checks[""]


def test_a_missing_or_untrained_end_is_reported():
    def without(example):
        return Example(example.tokens[:-1], example.loss_mask[:-1], example.origin)

    def untrained(example):
        return Example(example.tokens, np.append(example.loss_mask[:-1], False), example.origin)

    for change in (without, untrained):
        found = gathered(command())
        origin = found[3].train.examples[4].origin
        checks = planted(found, lambda e, change=change: [*e[:4], *map(change, e[4:6]), *e[6:]])
        assert not checks["end of turn"].ok and checks["BOS"].ok
        assert checks["end of turn"].said.startswith(f"2 rows (first: {origin}) do not end every answer")
        assert "</s> (58 answers)" in checks["end of turn"].said


def test_special_tokens_in_the_data_are_reported(hostile):
    checks = {check.name: check for check in content.checks(hostile[-1])}
    assert not checks["special tokens"].ok
    assert checks["special tokens"].said.startswith(f"{4} rows (first: ")  # two of the nine, twice
    assert checks["BOS"].ok and "another further in" in checks["BOS"].said


def row(text: str, origin: str, answer: str = "yes") -> Row:
    return Row((Turn("system", "s " * 20), Turn("user", text), Turn("assistant", answer)), origin)


def test_overlap_counts_shared_rows_and_shared_runs_of_words():
    words = [f"w{i}" for i in range(40)]
    shared, other = " ".join(words[:13]), " ".join(words[20:32])
    learnt = [row(f"Before, {shared.upper()}! after", "t:1"), row("Same  Row", "t:2"), row(f"x {other}", "t:3")]
    held = [
        row(f"something else {' '.join(words[5:18])}", "v:1"),  # its runs differ by where they begin
        row("same row", "v:2"), row(f"y {other} z", "v:3"), row(f"now {shared.replace(' ', ', ')}", "v:4"),
        row("same ROW", "v:5"),
    ]  # fmt: skip
    found = overlap(learnt, held)
    assert (found.rows, found.measured) == (5, 3)
    assert (found.duplicates.rows, found.duplicates.validation, found.duplicates.train) == (2, "v:2", "t:2")
    assert (found.grams.rows, found.grams.validation, found.grams.train) == (1, "v:4", "t:1")
    assert found.grams.text == shared
    nothing = overlap(learnt, [row("short", "v:9")])
    assert (nothing.duplicates.rows, nothing.measured, nothing.grams.rows) == (0, 0, 0)


def test_overlap_agrees_with_sets_of_words():
    random = np.random.default_rng(1)

    def text():
        return " ".join(f"w{n}" for n in random.integers(0, 2, int(random.integers(5, 40))))

    learnt, held = ([row(text(), f"{side}:{i}") for i in range(60)] for side in "tv")

    def grams(r):
        words = r.turns[1].content.split()
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}

    known = set().union(*map(grams, learnt))
    found = overlap(learnt, held)
    assert 0 < found.grams.rows == sum(bool(grams(r) & known) for r in held) < 60
    assert found.measured == sum(bool(grams(r)) for r in held)


def test_a_split_of_one_file_has_no_duplicates_and_given_files_may(tmp_path, capsys):
    pairs = [(f"question {i % 20}", f"answer {i % 20}") for i in range(60)]
    file = jsonl(tmp_path / "a.jsonl", pairs)
    preview.main([*on(file), "--rows", "0"])
    assert re.search(r"ok +duplicates: 0 of \d+ validation rows", capsys.readouterr().out)
    other = jsonl(tmp_path / "b.jsonl", [("QUESTION  3", "Answer 3"), ("question 99", "answer 99")])
    preview.main([*on(file, "--data.validation_files", other), "--rows", "0"])
    text = capsys.readouterr().out
    assert re.search(
        rf"LOOK duplicates: 1 of 2 validation rows .*For example {re.escape(other)}:1, and {re.escape(file)}:4 ", text
    )
    preview.main([*on(file, "--data.validation_fraction", "0"), "--rows", "0"])
    assert "LOOK validation: no rows are held out" in capsys.readouterr().out


CHATML = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model's folder with config.json and tokenizer files alone: the tiny one, with ChatML and a hostile special token."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = chat.load_tokenizer(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<b>\x1b[31m"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    settings = json.loads((TINY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"vocab_size": len(tokenizer)}))
    assert not list(folder.glob("*.safetensors"))
    return folder


def conversations(file: Path) -> str:
    said = ("user", "hi"), ("assistant", "hello"), ("user", "a <b>\x1b[31m"), ("assistant", "so it is\n")
    lines = [{"messages": [{"role": r, "content": f"{c} {i}"} for r, c in said]} for i in range(20)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def test_a_preview_reads_no_weight(folder, tmp_path, capsys):
    file = conversations(tmp_path / "c.jsonl")
    preview.main([*on(file, "--model.name", str(folder)), "--rows", "1"])
    text = capsys.readouterr().out
    assert "template: chat" in text
    assert "ok   end of turn: every answer ends with a trained end token: <|im_end|> (40 answers)" in text
    assert "⟨<|im_start|>⟩assistant↵\n  │ [[hello 0⟨<|im_end|>⟩↵]]\n  │ ⟨<|im_start|>⟩user↵" in text
    assert r"⟨<b>\x1b[31m⟩" in text and "\x1b" not in text
    assert "LOOK special tokens: 20 rows" in text
    spoilt = tmp_path / "spoilt"
    shutil.copytree(folder, spoilt)
    (spoilt / "model.safetensors").write_bytes(b"no weights")
    preview.main([*on(file, "--model.name", str(spoilt)), "--rows", "1"])
    assert capsys.readouterr().out.split("\n", 1)[1] == text.split("\n", 1)[1]


def test_of_a_repository_only_config_and_tokenizer_are_fetched(folder, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        hub, "download", lambda name, revision, files, *key: asked.append((name, revision, files)) or folder
    )
    file = conversations(tmp_path / "c.jsonl")
    preview.main([*on(file, "--model.name", "owner/model", "--model.revision", "v1"), "--rows", "0"])
    assert asked == [("owner/model", "v1", hub.TOKENIZER)]
    assert not any("safetensors" in pattern for pattern in hub.TOKENIZER)


def test_only_the_last_answer_is_marked_where_only_it_is_trained(folder, tmp_path):
    *_, found = gathered(on(conversations(tmp_path / "c.jsonl"), "--data.train_on", "last"), 2, folder)
    assert found.ending.tokens == (("<|im_end|>", 20),) and not found.ending.missing.rows
    html = Page(page.page(found))
    assert all("hello" in whole and "hello" not in trained and "so it is" in trained for whole, trained in html.rows)


def test_answers_that_a_template_ends_with_nothing_are_reported(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    text = "{% for m in messages %}{{m.role}}: {{m.content}}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    (bare / "chat_template.jinja").write_text(text)
    *_, found = gathered(on(conversations(tmp_path / "c.jsonl")), 1, bare)
    assert found.ending.tokens == (("</s>", 20),)  # the last answer's, which the data layer adds
    assert (found.ending.missing.rows, found.ending.cut) == (20, 0)


def test_sentencepiece_pieces_keep_every_space(shared):
    tokenizer = chat.load_tokenizer(shared / "tokenizers" / "llama2")
    for text in ("Hello  world", " lead", "漢字 🙂", "a\n\n b", "x é"):
        example = chat.encode(
            Row((Turn("user", text), Turn("assistant", "fine 🙂")), "o", prompt=f"{text}\n"), tokenizer, "plain"
        )
        cut = pieces(example, tokenizer)
        assert sum(p.tokens for p in cut) == len(example.tokens)
        assert "".join(p.text for p in cut) == f"<s> {text}\nfine 🙂</s>"
        assert "".join(p.text for p in cut if p.trained) == "fine 🙂</s>"


def test_the_page_is_written_into_a_new_folder_and_replaces_an_old_one(tmp_path, capsys):
    target = tmp_path / "new" / "folder" / "p.html"
    for _ in range(2):
        preview.main([*command(), "--rows", "1", "--tokens", "--html", str(target)])
    assert f"page: {target}" in capsys.readouterr().out
    html = Page(target.read_text(encoding="utf-8"))
    assert (
        len(html.rows) == 1 + facts.LONGEST
        and ("input", {"type": "checkbox", "id": "boundaries", "checked": None}) in html.tags
    )


MISTAKES = [
    ("--config nowhere.py", "no such file"),
    ("--confg tiny_cpu.py", "did you mean --config?"),
    ("--config", "--config: its value is missing"),
    ("", "--config: missing"),
    ("--config tiny_cpu.py --htlm x.html", "did you mean --html?"),
    ("--config tiny_cpu.py --row 3", "did you mean --rows?"),
    ("--config tiny_cpu.py --rows x", "--rows: expected a whole number"),
    ("--config tiny_cpu.py --rows=-1", "--rows: expected a whole number"),
    ("--config tiny_cpu.py --tokens=1", "--tokens takes no value"),
    ("--config tiny_cpu.py --html", "--html: its value is missing"),
    ("--config tiny_cpu.py --html --rows 3", "--html: its value is missing"),
    ("--config tiny_cpu.py --html rows.jsonl", "ends with .html"),
    ("--config tiny_cpu.py --html {tmp}/folder.html", "is a folder"),
    ("--config tiny_cpu.py --data.limit 20 --html {tmp}/file/p.html", "cannot be written"),
    ("--config tiny_cpu.py --html a.html b.html", "unexpected argument 'b.html'"),
    ("--config tiny_cpu.py --data.max_lenght 3", "did you mean data.max_length?"),
    ("--config tiny_cpu.py --lr 3", "did you mean optim.learning_rate?"),
    ("--config tiny_cpu.py --data.max_length 4 --data.limit 20", "leave no room"),
    ("--config tiny_cpu.py --data.files {tmp}/none.jsonl", "no such file"),
    ("--config tiny_cpu.py --data.template chat", "no chat template"),
    ("--config tiny_cpu.py --model.name {tmp}/none", "no folder"),
    ("--config tiny_cpu.py --model.name owner/none", "the Hub's cache"),
    ("--config tiny_cpu.py --model.name {tmp}/folder.html", "config.json: missing"),
    ("--config tiny_cpu.py --model.name {tmp}/quantised", "quantization_config"),
    ("--config tiny_cpu.py --model.tokenizer {tmp}", "no tokenizer.json"),
    ("--config tiny_cpu.py --model.tokenizer {tmp}/none", "model.tokenizer: no folder"),
]


@pytest.mark.parametrize(("arguments", "shown"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(arguments, shown, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "quantised").mkdir()
    settings = json.loads((TINY / "config.json").read_text())
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(settings | {"quantization_config": {"bits": 4}}))
    monkeypatch.setattr(sys, "argv", ["preview", *arguments.format(tmp=tmp_path).split()])
    with pytest.raises(SystemExit) as left:
        run_verb(preview.main)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and shown in error


def test_the_verbs_own_options_hide_no_key_of_the_config():
    known = [f"{section}.{field.name}" for section, r in config.SECTIONS.items() for field in dataclasses.fields(r)]
    for key in [*known, *(k.replace("_", "-") for k in known), "lora", *command_line.HUGGING_FACE_NAMES]:
        arguments = ["--config", "x", f"--{key}", "1", "--rows", "2"]
        assert command_line.split(arguments, "p", preview.OWN) == ("x", [f"--{key}", "1"], {"rows": "2"})
    with pytest.raises(UserError, match="unexpected argument 'c'"):
        command_line.split(["--config", "x", "--data.files", "a", "--html", "b.html", "c"], "p", preview.OWN)


def test_help_names_the_verbs_own_options_and_the_configs_values(capsys):
    for arguments in (["--help"], ["--config", "tiny_cpu.py", "-h"]):
        with pytest.raises(SystemExit) as left:
            preview.main(arguments)
        assert not left.value.code
        text = capsys.readouterr().out
        assert all(f"--{name}" in text for name in preview.OWN) and "--data.max-length" in text.replace("_", "-")


def test_a_whole_preview_imports_no_jax_and_survives_a_narrow_encoding(tmp_path):
    file = jsonl(tmp_path / "h.jsonl", HOSTILE * 2)
    arguments = [*on(file), "--html", str(tmp_path / "p.html")]
    program = f"""
import sys
from jaxft import preview
preview.main({arguments!r})
assert not {{"jax", "jaxlib", "flax", "safetensors.numpy"}} & set(sys.modules), sorted(sys.modules)
"""
    root = Path(preview.__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert rb"\u27e8<s>\u27e9" in done.stdout and b"\x1b" not in done.stdout
    assert "⟨&lt;s&gt;⟩" in (tmp_path / "p.html").read_text(encoding="utf-8")
