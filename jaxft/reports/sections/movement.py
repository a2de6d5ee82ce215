"""How losses moved: the quantities that reports of fine-tuning runs print, with honest definitions, and overfitting by rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.analysis import overfitting, quantities, trends
from jaxft.errors import UserError
from jaxft.reports.document import Block, Bullets, Inline, Strong, Table, Text
from jaxft.reports.evaluations import seen_and_held
from jaxft.reports.fitting import number, plain
from jaxft.reports.folder import RunRecord
from jaxft.reports.records import Example, of_split
from jaxft.reports.wording import UNKNOWN, between, brief, change, nats, share, signed, whole

LINE = ("step", "loss", "num_tokens", "learning_rate", "eval_loss", "eval_mean_token_accuracy")
OF_EXAMPLES = "from losses per example, in eval mode: the same rows before and after"
LOGGED = "training rows' loss is the logged one (dropout on, first against last lines), for want of a probe"
RAISED = {"rise": "validation loss rose after its best step, ", "gap": "", "exact match": "exact match: "}
HOW = {
    ("exact match", overfitting.UNMEASURED): "it takes generated answers to training rows (evaluate with --train-rows)",
    ("rise", overfitting.UNMEASURED): "it takes an evaluation at step 0, at the best step and at the end",
    ("gap", overfitting.UNMEASURED): "it takes losses of training rows and of validation rows at step 0 and at the end",
}
UNDECIDED = {
    "rise": "a rise of validation loss",
    "gap": "the gap to training rows",
    "exact match": "exact match on training rows",
}
PROBE = "training rows' loss is that of the probe"


def measure(run: RunRecord, best: int | None) -> dict[str, Any]:
    """`quantities`, `paired` (with intervals, where losses per example are there), `epoch_drops`, `overfitting`."""
    train, held = (_clean(lines, key) for lines, key in ((run.train, "loss"), (run.evaluations, "eval_loss")))
    return {
        "quantities": plain(quantities.of_lines(train, held, best)),
        "paired": plain(_paired(run.examples)),
        "epoch_drops": plain(_drops(run, train)),
        "overfitting": plain(_overfitting(run, train, held, best)),
    }


def _clean(lines: Sequence[Mapping[str, Any]], needed: str) -> list[dict[str, float]]:
    """The lines' numbers of LINE, where `needed` is no less than 0: a loss cannot be."""
    kept = [{key: value for key in LINE if (value := number(line.get(key))) is not None} for line in lines]
    return [line for line in kept if line[needed] >= 0]


def _paired(examples: Sequence[Example]) -> dict[str, Any]:
    """Name -> the decrease with its interval."""
    spans = {
        "validation, base to best": ("validation", "base", "best"),
        "validation, base to end": ("validation", "base", "end"),
        "probe, base to end": ("probe", "base", "end"),
    }
    return {
        name: _decrease(rows, before, after)
        for name, (split, before, after) in spans.items()
        if (rows := of_split(examples, split))
    }


def _decrease(rows: Sequence[Example], before: str, after: str) -> trends.Decrease | None:
    """None where the losses do not allow it: all 0 before."""
    first, last = ([getattr(e.nll, at) for e in rows] for at in (before, after))
    try:
        return trends.of_examples(first, last, [e.tokens for e in rows], OF_EXAMPLES)
    except UserError:
        return None


def _drops(run: RunRecord, train: Sequence[Mapping[str, float]]) -> list[trends.Drop]:
    """Falls of the logged loss at the ends of epochs but the last."""
    at = {line["step"]: number(line.get("epoch")) for line in run.train}
    ends: dict[int, int] = {}
    for step, epoch in at.items():
        if epoch is not None and 0 <= epoch < 1e6:
            ends[math.floor(epoch)] = max(step, ends.get(math.floor(epoch), 0))
            if epoch == math.floor(epoch):  # the last step of the epoch before
                ends[math.floor(epoch) - 1] = step
    boundaries = [ends[epoch] for epoch in sorted(ends)[:-1] if epoch >= 0]
    steps, losses = [line["step"] for line in train], [line["loss"] for line in train]
    return trends.epoch_drops(steps, losses, boundaries) if boundaries and steps else []


def _overfitting(
    run: RunRecord, train: Sequence[Mapping[str, float]], held: Sequence[Mapping[str, float]], best: int | None
) -> dict[str, Any]:
    """RULE by losses per example where they are there, else by the lines of evaluations and the probe, else by logged ones."""
    by_split = {split: of_split(run.examples, split) for split in ("validation", "probe")}
    losses = {
        split: overfitting.Losses(*([getattr(e.nll, at) for e in rows] for at in ("base", "best", "end")),
                                  [e.tokens for e in rows]) if rows else None
        for split, rows in by_split.items()
    }  # fmt: skip
    at = {line["step"]: line["eval_loss"] for line in held}
    means = (at[0], at[best], at[max(at)]) if 0 in at and best in at else None
    seen, words = _train_means(run, train)
    exact = _exact(run)
    try:
        found = overfitting.verdict(
            losses["validation"], losses["probe"], exact, means=means, train_means=seen, train_means_are=words
        )
    except UserError:  # losses of 0 at the start
        found = overfitting.verdict(exact=exact)
    if len(at) < 2 and losses["validation"] is None:  # one evaluation has no end to compare with
        found = overfitting.verdict(exact=exact)
    return {"flag": found.flag, "signs": list(found.signs), "rule": found.rule}


def _exact(run: RunRecord) -> tuple[list[bool], list[bool]] | None:
    """Which answers of the tuned model to training rows are right, and which to held-out ones; only their number counts."""
    asked = seen_and_held(run.measured)
    tuned = [task.sides.get("tuned") for task in asked or ()]
    metrics = [side.metrics.get(task.primary) for side, task in zip(tuned, asked or ()) if side]
    if len(metrics) < 2 or None in metrics:
        return None
    rights = [(round(metric.value * task.documents), task.documents) for metric, task in zip(metrics, asked)]
    if not all(0 <= right <= documents for right, documents in rights):
        return None
    (seen, of_seen), (held, of_held) = rights
    return [i < seen for i in range(of_seen)], [i < held for i in range(of_held)]


def _train_means(run: RunRecord, train: Sequence[Mapping[str, float]]) -> tuple[tuple[float, float] | None, str]:
    """Losses of training rows at the start and the end, and what they are."""
    probe = {r["step"]: v for r in run.evaluations if (v := number(r.get("probe_loss"))) is not None and v >= 0}
    if 0 in probe and len(probe) > 1:
        return (probe[0], probe[max(probe)]), PROBE
    if len(train) > 1:
        found = trends.of_log([line["step"] for line in train], [line["loss"] for line in train])
        return (found.before, found.after), LOGGED
    return None, ""


def quantity_blocks(figures: dict[str, Any]) -> list[Block]:
    """The published reports' quantities, each with its definition."""
    found, paired = figures["quantities"], figures["paired"]
    train, held, final, accuracy = (
        found[name] for name in (quantities.TRAIN, quantities.VALIDATION, quantities.FINAL, quantities.ACCURACY)
    )
    rows = [
        ("Train loss, logged", nats(train.get("before")), nats(train.get("after")), _percent(train["value"]), ""),
        *(_paired_row("Train probe loss, base to end", paired.get("probe, base to end"))),
        ("Validation loss, base to best", nats(held.get("before")), nats(held.get("after")), _percent(held["value"]),
         _interval(paired.get("validation, base to best"))),
        ("Validation loss, base to end", nats(held.get("before")), nats(figures["eval_loss"]["end"]),
         _percent(held.get("to_end")), _interval(paired.get("validation, base to end"))),
        ("Token accuracy (teacher-forced)", share(accuracy.get("start")), share(accuracy.get("end")),
         _gain(accuracy), _accuracy_interval(figures)),
    ]  # fmt: skip
    rows = [row for row in rows if row[3] != UNKNOWN or row[1] != UNKNOWN]
    said: list[Inline] = [
        ("Train loss: ", f"{train['definition']}{_why(train)}."),
        ("Validation loss: ", f"{held['definition']}{_why(held)}."),
        _final(final),
        *_drops_said(figures["epoch_drops"]),
    ]
    if any(row[4] for row in rows):
        said.append("Intervals are 95 %, by paired bootstrap over examples.")
    table = [Table(("", "Start", "End", "Change", "95 % interval"), rows)] if rows else []
    return [*table, Bullets(said)]


def _paired_row(name: str, found: dict[str, Any] | None) -> list[tuple[str, ...]]:
    if not found:
        return []
    return [(name, nats(found["before"]), nats(found["after"]), _percent(found["percent"]), _interval(found))]


def _interval(found: dict[str, Any] | None) -> str:
    """Of a change: a decrease of 10 to 20 percent is -20 to -10 %."""
    if not found or not found["percent_interval"]:
        return ""
    low, high = (-bound / 100 for bound in found["percent_interval"])
    return between(high, low).replace("-", "−")


def _accuracy_interval(figures: dict[str, Any]) -> str:
    found = figures["teacher_forced"]["accuracy_change"]
    same = figures["best_step"] == figures["last_evaluation_step"]  # its interval is that of the best step
    return between(*found["change_interval"]).replace(" %", " points").replace("-", "−") if found and same else ""


def _percent(decrease: float | None) -> str:
    return UNKNOWN if decrease is None else change(decrease / 100)


def _gain(accuracy: dict[str, Any]) -> str:
    if accuracy.get("start") is None:
        return UNKNOWN
    return f"{signed((accuracy['end'] - accuracy['start']) * 100, 1)} points"


def _why(found: dict[str, Any]) -> str:
    return f" (not known: {found['why']})" if "why" in found else ""


def _final(final: dict[str, Any]) -> Inline:
    definition = f"Definition: {final['definition']}."
    if final["value"] is None:
        return f"Final steps: not known, {final.get('why', 'the losses do not allow it')}. {definition}"
    low, high = final["interval"]
    over = {True: "Still improving", False: "Not improving for sure", None: "Whether validation improved is not known"}
    rate, at = final["learning_rate_at_end"], final["trend"]
    return (
        f"Final steps: the logged train loss changed by {signed(final['value'], 1)} % over steps {at['first_step']:,} to "
        f"{at['last_step']:,} (95 % interval {signed(low, 1)} to {signed(high, 1)} %), with a learning rate of "
        f"{UNKNOWN if rate is None else brief(rate)} at the end. {over[final['still_improving']]}. {definition}"
    )


def _drops_said(drops: list[dict[str, Any]]) -> list[Inline]:
    if not drops:
        return []
    each = ", ".join(
        f"{signed(-d['nats'], 3)} nats at step {whole(d['step'])}{' (sudden)' if d['sudden'] else ''}" for d in drops
    )
    sudden = sum(d["sudden"] for d in drops)
    meaning = (
        "A fall at the end of an epoch that stands out from all others says that rows seen before are being remembered."
        if sudden
        else "None stands out from falls elsewhere (robust z above 3.5 would)."
    )
    return [("Epoch ends: ", f"the logged train loss changed by {each}. {meaning}")]


def overfitting_blocks(figures: dict[str, Any]) -> list[Block]:
    """The rule's clauses, each with what it was decided by."""
    found = figures["overfitting"]
    names = {
        "rise": "(i) validation loss rises",
        "gap": "(ii) gap to training rows",
        "exact match": "(iii) exact match",
    }
    state = {True: "raised", False: "not raised", None: "not measured"}
    rows = [
        (names.get(s["clause"], s["clause"]), state[s["raised"]], HOW.get((s["clause"], s["figures"]), s["figures"]))
        for s in found["signs"]
    ]
    flag = {True: "raised", False: "not raised", None: "not decided"}[found["flag"]]
    parts: list[Any] = [Strong("Overfitting flag"), f": {flag}. The rule: {found['rule']}."]
    if found["flag"] and figures["best_step"] not in (None, figures["step"]):
        parts.append(f" The exported weights are those of step {whole(figures['best_step'])}, before the end.")
    if not figures["teacher_forced"]["examples"]["probe"] and figures["probe_loss"]["end"] is None:
        parts.append(" This run has no probe: no sample of training rows was measured as validation rows are.")
    return [Table(("Clause", "", "Decided by"), rows, words=(1, 2)), Text(parts)]


def flag_words(found: dict[str, Any]) -> str:
    """The flag in words, with the clauses that raised it or were not measured."""
    unmeasured = [UNDECIDED.get(s["clause"], s["clause"]) for s in found["signs"] if s["raised"] is None]
    raised = [f"{RAISED.get(s['clause'], s['clause'])}{s['figures']}" for s in found["signs"] if s["raised"]]
    if found["flag"]:
        return "raised: " + "; ".join(raised)
    left = f" ({', '.join(unmeasured)} not measured)" if unmeasured else ""
    return f"not raised{left}" if found["flag"] is False else f"not decided{left}"
