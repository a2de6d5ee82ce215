"""What a report says: the figures as verdict, tables and samples, in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxft.reports import card, planned
from jaxft.reports.document import (
    Block,
    Bullets,
    Code,
    Columns,
    Gallery,
    Heading,
    Image,
    Inline,
    Part,
    Quote,
    Strong,
    Table,
    Text,
)
from jaxft.reports.figures import COUNTS
from jaxft.reports.folder import RunRecord, number
from jaxft.reports.wording import UNKNOWN, change, nats, share, whole

SAMPLE_CHARACTERS = 2000
SAMPLES_PER_TASK = 3
TASK_NOTE = (
    "Each model writes its own answers to the same prompts; one counts when its final answer is the reference's. "
    "Intervals are Wilson's, for the draw of the problems alone. Invalid is the share of answers in which no final "
    "answer could be read; they count as wrong. n is the number of problems. Tuned means the weights of the best step."
)
VALIDATION_NOTE = (
    " The problems are validation rows, on which the best step was chosen too, so the tuned score flatters."
)
EVAL_LOSS_NOTE = (
    ": Σ nll / Σ tokens in nats, over the supervised tokens (the answers) of the whole validation set, whatever the "
    "batch size, packing or mesh. Start is step 0, the base model."
)
EVAL_ACCURACY_NOTE = (
    ": Σ correct / Σ tokens over the same tokens, teacher-forced: each token is guessed from the right ones before it. "
    "How many answers come out right when the model writes them itself is another question."
)
TRAIN_NOTE = (
    ": the same two over the training tokens since the log line before, with dropout on and while the weights change. "
    "Start is the first log line, at step {step}, not the base model."
)
TRAIN_START_NOTE = "Train loss starts at its first log line, not at step 0, so its own decrease is understated."
BEST_NOTE = (
    "Best is the step with the lowest validation loss, whose weights are exported; other figures may peak elsewhere."
)
UNMEASURED = (
    "The spread over seeds: this is one run with one seed.",
    "A paired test of base against tuned: the intervals treat the two as independent.",
    "Other abilities of the model, which fine-tuning may have worsened.",
    "Overlap between training and held-out rows, beyond what the split excludes.",
)


def blocks(run: RunRecord, figures: dict[str, Any], images: Sequence[Image]) -> list[Block]:
    """The whole report, in the order in which it is read."""
    return [
        Heading(1, ("Fine-tuning report: ", Code(run.name))),
        Text(verdict(figures), boxed=True),
        *([Heading(2, "Missing from this run folder"), Bullets(figures["missing"])] if figures["missing"] else []),
        Heading(2, "Tasks, measured by generation"),
        *_tasks(run, figures),
        Heading(2, "Loss and token accuracy"),
        *_metrics(figures),
        Heading(2, "Train loss against validation loss"),
        *_overfitting(figures),
        *([Heading(2, "Curves"), Gallery(images)] if images else []),
        *_samples(run),
        Heading(2, "Run card"),
        Table(("", ""), card.rows(run, figures), figures=False),
        Heading(2, "Time and cost"),
        Table(("", ""), card.cost(figures), figures=False),
        *_planned(run, figures),
        Heading(2, "What was not measured"),
        Bullets(_not_measured(figures)),
    ]


def _planned(run: RunRecord, figures: dict[str, Any]) -> list[Block]:
    """Nothing where the run has not told both sides of any figure."""
    compared = figures["planned_and_measured"]
    if not compared:
        return []
    head = ("", "planned", "measured", "measured / planned")
    return [Heading(2, "Planned against measured"), Table(head, planned.rows(compared)), Text(planned.note(run))]


def verdict(figures: dict[str, Any]) -> list[Part]:
    """One paragraph: tasks by generation, token accuracy under its own name, best step, how it ended."""
    parts: list[Part] = []
    for task, scores in figures["tasks"].items():
        for metric in task_metrics(scores):
            parts += _task_sentence(task, metric, scores)
    if not parts:
        parts.append("No task was measured by generation, so this report does not say how many answers are right. ")
    flag = {True: "raised", False: "not raised"}.get(figures["overfitting"]["flag"], UNKNOWN)
    ending = [*_best_sentence(figures), *_ending_sentence(figures), f"Overfitting flag: {flag}."]
    return [*parts, *_accuracy_sentence(figures["eval_mean_token_accuracy"]), *ending]


def task_metrics(scores: dict[str, Any]) -> list[str]:
    """Names of a task's metrics, in the order in which the run wrote them."""
    named = {**scores.get("base", {}), **scores.get("tuned", {})}
    return [key for key, value in named.items() if number(value) is not None and key not in COUNTS]


def _task_sentence(task: str, metric: str, scores: dict[str, Any]) -> list[Part]:
    base, tuned = _models(scores)
    problems = number((tuned or base).get("problems"))
    parts: list[Part] = [f"On {whole(problems)} problems, " if problems is not None else "In this run, "]
    parts += [Code(metric), " of ", Code(task), " by generation is "]
    parts += [Strong(share(base.get(metric))), f"{_brackets(base, metric)} with the base model and "]
    if metric not in tuned:
        return [*parts, "not measured with the tuned weights. "]
    parts += [Strong(share(tuned[metric])), f"{_brackets(tuned, metric)} with the tuned weights"]
    one, other = base.get(f"{metric}_interval"), tuned.get(f"{metric}_interval")
    if not (one and other):
        return [*parts, ". "]
    apart = one[1] < other[0] or other[1] < one[0]
    return [*parts, f"; the intervals {'do not overlap' if apart else 'overlap, so the difference may be chance'}. "]


def _accuracy_sentence(accuracy: dict[str, float | None]) -> list[Part]:
    if accuracy["start"] is None and accuracy["end"] is None:
        return ["Token accuracy on held-out rows is not in this folder. "]
    at = "end" if accuracy["best"] is None else "best"
    return [
        "Teacher-forced token accuracy on the validation rows (",
        Code("eval_mean_token_accuracy"),
        ") went from ",
        Strong(share(accuracy["start"])),
        " at step 0 to ",
        Strong(share(accuracy[at])),
        f" at the {at}{' step' if at == 'best' else ''}: the share of next tokens guessed right when all the right "
        "tokens before them are given. It is not task accuracy. ",
    ]


def _best_sentence(figures: dict[str, Any]) -> list[Part]:
    best, loss = figures["best_step"], figures["eval_loss"]["best"]
    if best is None:
        return []
    if figures["eval_loss"]["end"] is None:
        return ["No rows were held out, so no step is known to be best; the last step's weights are exported. "]
    if best == 0 and figures["step"]:
        return ["No evaluation was better than the base model's: the best step is 0. "]
    at_loss = "" if loss is None else f", with eval_loss {nats(loss)}"
    return [f"The best step is {whole(best)} of {whole(figures['steps'])}{at_loss}. "]


def _ending_sentence(figures: dict[str, Any]) -> list[Part]:
    step, steps = whole(figures["step"]), whole(figures["steps"])
    if figures["state"] == "finished":
        return [f"The run ended at step {step}: ", Code(figures["ended"] or UNKNOWN), ". "]
    return [f"The run has not finished, as far as its folder tells: step {step} of {steps}. "]


def _tasks(run: RunRecord, figures: dict[str, Any]) -> list[Block]:
    rows: list[Sequence[Inline]] = []
    for task, scores in figures["tasks"].items():
        for metric in task_metrics(scores):
            for name, of in scores.items():
                cells = share(of.get(metric)), _range(of, metric), share(of.get("invalid")), whole(of.get("problems"))
                rows.append(([Code(task), " ", Code(metric), f", {name}"], *cells))
    if not rows:
        return [Text(("None: ", Code("eval.tasks"), " was empty, or the run has not come to them."))]
    seen = "data" in run.config and not (run.setting("data.test_split") or run.setting("data.test_files"))
    note = TASK_NOTE + (VALIDATION_NOTE if seen else "")
    return [Table(("", "Score", "95 % interval", "Invalid", "n"), rows), Text(note)]


def _metrics(figures: dict[str, Any]) -> list[Block]:
    shown = (
        ("eval_loss", "eval_loss", nats),
        ("eval_perplexity", "eval_perplexity", nats),
        ("eval_mean_token_accuracy", "eval_mean_token_accuracy", share),
        ("loss", "train_loss", nats),
        ("mean_token_accuracy", "train_mean_token_accuracy", share),
    )
    rows = [(Code(name), *(form(figures[key][at]) for at in ("start", "best", "end"))) for name, key, form in shown]
    best, end, evaluated = (whole(figures[key]) for key in ("best_step", "step", "last_evaluation_step"))
    end = f"step {end}" if end == evaluated else f"step {end}, validation {evaluated}"
    definitions = [
        (Code("eval_loss"), EVAL_LOSS_NOTE),
        (Code("eval_perplexity"), ": e to the power of ", Code("eval_loss"), "."),
        (Code("eval_mean_token_accuracy"), EVAL_ACCURACY_NOTE),
        (Code("loss"), ", ", Code("mean_token_accuracy"), TRAIN_NOTE.format(step=whole(figures["train_start_step"]))),
        BEST_NOTE,
    ]
    return [Table(("", "Start", f"Best (step {best})", f"End ({end})"), rows), Bullets(definitions)]


def _overfitting(figures: dict[str, Any]) -> list[Block]:
    train, held_out, fell = figures["train_loss"], figures["eval_loss"], figures["decrease"]
    rows = [
        (f"{name} loss, {span}", nats(of["start"]), nats(of[until]), change(fell[key]))
        for name, span, of, until, key in (
            ("Train", "first to last log line", train, "end", "train_loss"),
            ("Validation", "step 0 to end", held_out, "end", "eval_loss"),
            ("Validation", "step 0 to best", held_out, "best", "eval_loss_to_best"),
        )
    ]
    flag, signs, rule = (figures["overfitting"][key] for key in ("flag", "signs", "rule"))
    said = {True: "raised: " + "; ".join(signs), False: "not raised", None: "unknown, for want of figures"}[flag]
    parts: list[Part] = [Strong("Overfitting flag"), f" {said}. The rule: {rule}. {TRAIN_START_NOTE}"]
    if flag and figures["best_step"] not in (None, figures["step"]):
        parts.append(f" The exported weights are those of step {whole(figures['best_step'])}, before the end.")
    return [Table(("", "From", "To", "Change"), rows), Text(parts)]


def _samples(run: RunRecord) -> list[Block]:
    tasks = run.fact("tasks")
    shown: list[Block] = []
    for task, scores in tasks.items() if isinstance(tasks, dict) else ():
        for i, pair in enumerate(_pairs(scores if isinstance(scores, dict) else {}), 1):
            shown += [Heading(3, (Code(task), f", problem {i}")), *_sample(*pair)]
    return [Heading(2, "Samples, base against tuned"), Text("The first problems, not chosen."), *shown] if shown else []


def _pairs(scores: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(base, tuned) examples of one prompt each; an empty dict where a model has none for it."""
    base, tuned = (_examples(scores.get(model)) for model in ("base", "tuned"))
    return [(base.get(prompt, {}), tuned.get(prompt, {})) for prompt in {**tuned, **base}][:SAMPLES_PER_TASK]


def _examples(scores: Any) -> dict[str, dict[str, Any]]:
    listed = scores.get("examples") if isinstance(scores, dict) else None
    return {str(e.get("prompt")): e for e in listed if isinstance(e, dict)} if isinstance(listed, list) else {}


def _sample(base: dict[str, Any], tuned: dict[str, Any]) -> list[Block]:
    one = base or tuned
    answers = (("expected", one.get("expected")), ("base", base.get("found")), ("tuned", tuned.get("found")))
    found = "\n".join(f"{label}: {'none' if value is None else value}" for label, value in answers)
    sides = [Quote(f"{name}: {_mark(e)}", _cut(e.get("answer"))) for name, e in (("Base", base), ("Tuned", tuned))]
    return [
        Quote("Prompt", _cut(one.get("prompt"))),
        Columns(sides),
        Columns([Quote("Reference", _cut(one.get("reference"))), Quote("Final answers", _cut(found))]),
    ]


def _mark(example: dict[str, Any]) -> str:
    right = example.get("right")
    return "right" if right is True else "wrong" if right is False else "not measured"


def _cut(text: Any) -> str:
    text = "(none)" if text is None else str(text) or "(empty)"
    more = len(text) - SAMPLE_CHARACTERS
    return text if more <= 0 else f"{text[:SAMPLE_CHARACTERS]}\n(and {more:,} more characters)"


def _not_measured(figures: dict[str, Any]) -> list[Inline]:
    absent: list[Inline] = []
    if not figures["tasks"]:
        absent.append(("Right answers by generation: give a task in ", Code("eval.tasks"), "."))
    if figures["eval_loss"]["end"] is None:
        absent.append(("Loss on held-out rows: hold some out with ", Code("data.validation_fraction"), "."))
    if figures["usd_per_chip_hour"] is None:
        absent.append(("Cost: give ", Code("run.usd_per_chip_hour"), "."))
    if figures["peak_device_memory_gib"] is None:
        absent.append("Peak device memory: this backend does not tell it.")
    if figures["median_mfu"] is None:
        absent.append("Model FLOP/s utilisation: the peak of these devices is not known.")
    return [*absent, *UNMEASURED]


def _models(scores: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return scores.get("base", {}), scores.get("tuned", {})


def _range(scores: dict[str, Any], metric: str) -> str:
    interval = scores.get(f"{metric}_interval")
    return f"{interval[0] * 100:.1f} to {share(interval[1])}" if interval else ""


def _brackets(scores: dict[str, Any], metric: str) -> str:
    return f" (95 % interval {_range(scores, metric)})" if scores.get(f"{metric}_interval") else ""
