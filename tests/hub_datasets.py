"""The regression panel's data sets as they lie on the Hub: folders of Parquet files with their own fields, few rows."""

import pyarrow
import pyarrow.parquet

from jaxft.tiny import problems

WORDS = ["four apples", "ten", "It is seven pens and more.", "no hats", "Sue", "twelve bags in a box"]


def write(folder, subjects=("anatomy", "virology")):
    """Writes all of them below `folder`, under their Hub names, with these subjects of MMLU, and returns it."""
    questions = [row["question"] for row in problems.rows("test", 60)]
    _dataset(folder / "allenai/ai2_arc", {"ARC-Challenge": {split: _arc(questions) for split in ("train", "test")}})
    _dataset(
        folder / "cais/mmlu",
        {subject: {split: _mmlu(questions, subject) for split in ("dev", "test")} for subject in subjects},
    )
    _dataset(
        folder / "Rowan/hellaswag", {"default": {"train": _hellaswag(questions), "validation": _hellaswag(questions)}}
    )
    _dataset(folder / "EleutherAI/drop", {"default": {"train": _drop(questions), "validation": _drop(questions)}})
    _dataset(folder / "regisss/math_qa", {"default": {"train": _mathqa(questions), "test": _mathqa(questions)}})
    _dataset(folder / "truthfulqa/truthful_qa", {"multiple_choice": {"validation": _truthfulqa(questions)}})
    return folder


def _dataset(folder, configs):
    """Files named as the Hub's converter names them, and the card that tells which are which."""
    card = ["---", "configs:"]
    for name, splits in configs.items():
        card += [f"- config_name: {name}", "  data_files:"]
        for split, rows in splits.items():
            file = f"{name}/{split}-00000-of-00001.parquet"
            (folder / name).mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / file)
            card += [f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def _choices(i, count=4):
    return [WORDS[(i + j) % len(WORDS)] for j in range(count)]


def _arc(questions):
    """The labels of some rows are digits."""
    return [
        {"id": f"M_{i}", "question": text, "choices": {"text": _choices(i), "label": list("1234" if i % 3 == 0 else "ABCD")},
         "answerKey": ("1234" if i % 3 == 0 else "ABCD")[i % 4]}
        for i, text in enumerate(questions[:7])
    ]  # fmt: skip


def _mmlu(questions, subject):
    return [
        {"question": f" {text} ", "subject": subject, "choices": _choices(i), "answer": (i + len(subject)) % 4}
        for i, text in enumerate(questions[7:8])
    ]


def _hellaswag(questions):
    return [
        {"ind": i, "activity_label": "Doing sums", "ctx_a": text, "ctx_b": "then he", "ctx": f"{text} then he",
         "endings": [f"{word} [substeps] [title] and  so on." for word in _choices(i)], "source_id": f"wikihow~{i}",
         "split": "train", "split_type": "indomain", "label": str(i % 4)}
        for i, text in enumerate(questions[13:19])
    ]  # fmt: skip


def _drop(questions):
    """A number, spans and a date, with other annotators' answers beside."""
    none = {"day": "", "month": "", "year": ""}
    kinds = [
        {"number": "5", "date": none, "spans": []},
        {"number": "", "date": none, "spans": ["Tom", "Zoe"]},
        {"number": "", "date": {"day": "3", "month": "May", "year": "1912"}, "spans": []},
    ]
    rows = []
    for i, text in enumerate(questions[19:25]):
        answer, other = kinds[i % 3], kinds[(i + 1) % 3]
        validated = {key: [other[key]] for key in other} | {"worker_id": ["w"], "hit_id": ["h"]}
        rows.append(
            {"section_id": f"s{i // 2}", "query_id": f"q{i}", "passage": questions[25 + i // 2], "question": text,
             "answer": answer | {"worker_id": "w", "hit_id": "h"}, "validated_answers": validated}
        )  # fmt: skip
    return rows


def _mathqa(questions):
    return [
        {"Problem": text, "Rationale": "…", "correct": "abcde"[i % 5], "annotated_formula": "", "linear_formula": "",
         "options": " , ".join(f"{letter} ) {word}" for letter, word in zip("abcde", _choices(i, 5))), "category": "general"}
        for i, text in enumerate(questions[30:36])
    ]  # fmt: skip


def _truthfulqa(questions):
    return [
        {"question": text, "mc1_targets": {"choices": _choices(i), "labels": [1, 0, 0, 0]},
         "mc2_targets": {"choices": _choices(i, 5), "labels": [1, 1, 0, 0, 0]}}
        for i, text in enumerate(questions[36:42])
    ]  # fmt: skip
