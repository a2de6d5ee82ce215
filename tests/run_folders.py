"""Run folders as training and evaluations write them, with rows, answers and losses drawn for the tests of reports."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxft.analysis.gsm8k.answers import FLEXIBLE, STRICT, exact_match, final_answer
from jaxft.analysis.gsm8k.mistakes import mistake
from jaxft.evals import results
from jaxft.evals.measurement import Answer, Document, Measurement, Side, classes_of, sha256
from jaxft.tiny import problems

Rows = Sequence[dict[str, str]]


def word_problems(count: int, split: str = "test") -> list[dict[str, str]]:
    """Generated problems in GSM8K's format."""
    return [dict(row) for row in problems.rows(split, count)]


def write_lines(file: Path, records: Sequence[dict]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def examples(
    rows: Rows,
    split: str,
    seed: int = 0,
    levels: tuple[float, float, float] = (2.0, 0.8, 0.85),
    cut: Sequence[int] = (),
) -> list[dict]:
    """Lines of examples.jsonl: losses around `levels` nats per token at base, best and end."""
    draw, lines = np.random.default_rng(seed), []
    for i, row in enumerate(rows):
        tokens = max(4, len(row["answer"]) // 3)
        hardness = float(np.exp(draw.normal(0, 0.15)))
        nll = {at: tokens * level * hardness * float(np.exp(draw.normal(0, 0.03)))
               for at, level in zip(("base", "best", "end"), levels)}  # fmt: skip
        right = {at: min(tokens, int(tokens * np.exp(-nll[at] / tokens))) for at in nll}
        plain, size = tokens - max(1, tokens // 5), len(row["answer"].encode(errors="surrogatepass"))
        lines.append({
            "split": split, "row": f"{split}.jsonl:{i + 1}", "question": row["question"], "answer": row["answer"],
            "tokens": tokens, "bytes": size, "cut": i in cut, "nll": nll, "correct": right,
            "kinds": {"no annotations": {"tokens": plain, "correct": {at: n * plain // tokens for at, n in right.items()}},
                      "final answer": {"tokens": 1, "correct": {"base": 0, "best": 1, "end": 1}}},
        })  # fmt: skip
    return lines


def replies(rows: Rows, share: float, seed: int, invalid: float = 0.0) -> list[str]:
    """Answers of which about `share` are right; the others have a wrong sum, or no final answer."""
    draw, texts = np.random.default_rng(seed), []
    for row in rows:
        if draw.random() < share:
            texts.append(row["answer"])
        elif draw.random() < invalid:
            texts.append(row["answer"].split("####")[0] * 2)
        else:
            texts.append(f"I add them: 2 + 2 = {draw.choice([4, 5])}\n#### {draw.integers(1000, 9999)}")
    return texts


def answered(rows: Rows, base: Sequence[str], tuned: Sequence[str]) -> list[dict]:
    """Lines of tasks_final_answer.jsonl."""

    def told(row: dict[str, str], text: str) -> dict:
        found = final_answer(text)
        return {
            "text": text,
            "right": found is not None and found == final_answer(row["answer"]),
            "cut": found is None,
            "found": found,
        }

    return [
        {"doc": i, "question": row["question"], "reference": row["answer"], "base": told(row, a), "tuned": told(row, b)}
        for i, (row, a, b) in enumerate(zip(rows, base, tuned, strict=True))
    ]


def measurement(task: str, rows: Rows, base: Sequence[str], tuned: Sequence[str]) -> Measurement:
    """A task of GSM8K's form as an evaluation measures it, graded for real."""
    documents = [
        Document(i, sha256(row["question"]), row["question"], row["answer"], classes)
        for i, (row, classes) in enumerate(zip(rows, classes_of(rows), strict=True))
    ]
    sides = {name: Side([_graded(row, text) for row, text in zip(rows, texts, strict=True)], 2.0, 500, {})
             for name, texts in (("base", base), ("tuned", tuned))}  # fmt: skip
    metrics = dict.fromkeys(sides["base"].answers[0].values, True)
    protocol = {"protocol": f"lm-evaluation-harness 0.4.13 {task}, version 3", "shots": "5, drawn per document",
                "decoding": "greedy", "max_new_tokens": 256, "cut_prompts": 0}  # fmt: skip
    return Measurement(task, "native", protocol, documents, sides, metrics)


def _graded(row: dict[str, str], text: str) -> Answer:
    found = {extract.name: extract(text) for extract in (STRICT, FLEXIBLE)}
    values = {f"exact_match,{name}": float(exact_match(said, row["answer"])) for name, said in found.items()}
    return Answer(text, values, found=found, truncated=False, mistake=mistake(row["question"], row["answer"], text))


def choices(task: str, count: int, base: float, tuned: float, chance: float, seed: int = 0) -> Measurement:
    """A multiple-choice task of the harness."""
    draw = np.random.default_rng(seed)
    documents = [Document(i, sha256(str(i)), f"{task} question {i}", "A") for i in range(count)]
    shared = draw.random(count)
    sides = {name: Side([Answer([0.0, -1.0], {"acc,none": float(u < share)}) for u in shared], 1.0, 0, {})
             for name, share in (("base", base), ("tuned", tuned))}  # fmt: skip
    return Measurement(task, "lm-eval", {"protocol": f"lm-evaluation-harness 0.4.13 {task}, version 1"}, documents, sides,
                       {"acc,none": True}, chance=chance)  # fmt: skip


def evaluation(
    run: Path, stamp: str, measurements: Sequence[Measurement], trained: Sequence[str] = (), model: str = "m"
) -> Path:
    """evaluations/STAMP with the files that the evaluate verb writes."""
    folder = run / "evaluations" / stamp
    facts = {
        "date": f"2026-03-0{len(list(folder.parent.glob('*'))) + 1}T00:00:00+00:00",
        "command": {},
        "run": str(run),
    }
    results.write(folder, results.content(measurements, tuple(trained), {"model": model}, {}, facts), measurements)
    return folder
