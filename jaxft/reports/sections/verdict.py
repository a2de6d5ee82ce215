"""The verdict: a sentence per claim with its interval and p, and the flags. Short enough to be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxft.analysis.comparison import PanelRow
from jaxft.reports.document import Code, Flag, Inline, Part, Strong, Verdict
from jaxft.reports.sections import contamination, movement, panel
from jaxft.reports.sections.tasks import Result, Score
from jaxft.reports.wording import UNKNOWN, between, nats, p_value, points, share, whole

MUCH_INVALID, MUCH_TRUNCATED, MOSTLY = 0.05, 0.05, 0.5
LEVEL = 0.05
MOST_TASKS = 4
BRACKETS = "Brackets hold 95 % intervals; p is McNemar's, exact, on the same problems."


def verdict(
    figures: dict[str, Any],
    scores: Sequence[Score],
    rows: Sequence[PanelRow],
    compared: Sequence[contamination.Compared],
) -> Verdict:
    """Tasks by generation, validation loss, token accuracy under its own name, how it ended; then the flags."""
    about = [s for s in scores if s.primary and s.trained and (s.tuned or s.base)]
    claims: list[Inline] = [_task(score) for score in about[:MOST_TASKS]]
    if len(about) > MOST_TASKS:
        claims.append(f"{len(about) - MOST_TASKS} more tasks are in the table below.")
    if not scores:
        claims.append("No task was measured by generation, so this report does not say how many answers are right.")
    claims += [
        _loss(figures),
        _accuracy(figures),
        _ending(figures),
        *([BRACKETS] if scores or figures["paired"] else []),
    ]
    flags = [
        Flag("Overfitting", figures["overfitting"]["flag"], _overfitting(figures)),
        contamination.flag(compared),
        _shares("Invalid answers", "invalid", MUCH_INVALID, scores, "have no readable final answer"),
        _shares("Truncated answers", "truncated", MUCH_TRUNCATED, scores, "were cut at the limit of new tokens"),
        panel.flag(rows),
    ]
    flags = [replace(flag, words=_capitalised(flag.words)) for flag in flags]
    explained = ("Overfitting", "Regression") if rows else ("Overfitting",)
    known = [flag for flag in flags if flag.raised is not None or flag.name in explained]
    unknown = [flag.name.lower() for flag in flags if flag not in known]
    if unknown:
        known.append(Flag(", ".join(unknown).capitalize(), None, ("See ", Strong("What was not measured"), ".")))
    return Verdict([claim for claim in claims if claim], known)


def _capitalised(words: Inline) -> Inline:
    return words[:1].upper() + words[1:] if isinstance(words, str) else words


def _task(score: Score) -> list[Part]:
    n = f"{whole(score.documents)} problems" if score.documents is not None else "its problems"
    of = [" of ", Code(score.rows)] if score.rows else []
    parts: list[Part] = [Code(score.task), f" on {n}", *of, ", ", Code(score.metric), ": base "]
    parts += [_value(score.base), f"{_interval(score.base)}, tuned ", _value(score.tuned), _interval(score.tuned)]
    change = score.change
    if change and score.percent:
        by = f" {points(abs(change.difference)).removeprefix('+')}" if change.p_value is not None else ""
        low, high = (points(bound).removesuffix(" points") for bound in change.difference_interval)
        if change.p_value is None:
            return [*parts, f": {points(change.difference)} ({low} to {high})."]
        if change.p_value >= LEVEL:
            return [*parts, ": ", Strong("no change shown"), f" ({low} to {high} points), {p_value(change.p_value)}."]
        claim = f"{'better' if change.difference > 0 else 'worse'} by{by}"
        return [*parts, ": ", Strong(claim), f" ({low} to {high}), {p_value(change.p_value)}."]
    one, other = (side and side.interval for side in (score.base, score.tuned))
    if not (one and other):
        return [*parts, "."]
    apart = one[1] < other[0] or other[1] < one[0]
    return [*parts, f"; the intervals {'do not overlap' if apart else 'overlap, so the difference may be chance'}."]


def _value(side: Result | None) -> Part:
    if side is None:
        return "not measured"
    return Strong(share(side.value) if 0 <= side.value <= 1 else f"{side.value:,.4g}")


def _interval(side: Result | None) -> str:
    if side is None or not side.interval or not 0 <= side.value <= 1:
        return ""
    return f" ({between(*side.interval).removesuffix(' %')})"


def _loss(figures: dict[str, Any]) -> Inline:
    loss, best = figures["eval_loss"], figures["best_step"]
    if loss["end"] is None:
        return (
            ""
            if best is None
            else "No rows were held out, so no step is known to be best; the last step's weights are exported."
        )
    if best == 0 and figures["step"]:
        return "No evaluation was better than the base model's: the best step is 0."
    if loss["best"] is None:
        return "The validation loss at the best step is not in this folder."
    found = figures["paired"].get("validation, base to best")
    interval = f" ({between(*(b / 100 for b in found['percent_interval'])).removesuffix(' %')})" if found else ""
    start = loss["start"]
    from_start = f"from {nats(start)} to " if start is not None else ""
    fell = f", down by {share(1 - loss['best'] / start)}{interval}" if start else ""
    at_best = f"{nats(loss['best'])} nats per token at the best step, {whole(best)} of {whole(figures['steps'])}"
    return f"Validation loss went {from_start}{at_best}{fell}."


def _accuracy(figures: dict[str, Any]) -> Inline:
    accuracy = figures["eval_mean_token_accuracy"]
    if accuracy["start"] is None and accuracy["end"] is None:
        return ""
    at = "end" if accuracy["best"] is None else "best"
    return [
        "Teacher-forced token accuracy on validation rows went from ",
        Strong(share(accuracy["start"])),
        " to ",
        Strong(share(accuracy[at])),
        ": how often the next token is guessed when all before it are given. It is not task accuracy.",
    ]


def _ending(figures: dict[str, Any]) -> Inline:
    step, steps = whole(figures["step"]), whole(figures["steps"])
    if figures["state"] == "finished":
        return [f"The run ended at step {step}: ", Code(figures["ended"] or UNKNOWN), "."]
    return f"The run has not finished, as far as its folder tells: step {step} of {steps}."


def _overfitting(figures: dict[str, Any]) -> str:
    words = movement.flag_words(figures["overfitting"])
    for state in ("raised: ", "not raised", "not decided"):
        if words.startswith(state):
            words = words.removeprefix(state).strip()
    return f"{words.strip('()')}." if words else ""


def _shares(name: str, of: str, much: float, scores: Sequence[Score], what: str) -> Flag:
    """The tuned model's share `of` invalid or truncated answers on any task, and what the base's says of its score."""
    shares = {s.label: (s.base and getattr(s.base, of), getattr(s.tuned, of)) for s in scores if s.primary and s.tuned}
    known = {task: tuned for task, (_, tuned) in shares.items() if tuned is not None}
    if not known:
        return Flag(name, None, "no generated answers of the tuned model.")
    many = {task: value for task, value in known.items() if value > much}
    words = "; ".join(f"{share(value)} of answers to {task} {what}" for task, value in many.items())
    words = words or f"at most {share(max(known.values()))} {what}"
    formless = [task for task, (base, _) in shares.items() if of == "invalid" and (base or 0) > MOSTLY]
    if formless:
        words += f". The base lacks the form ({', '.join(formless)}): its score does not say that it cannot solve the problems"
    return Flag(name, bool(many), f"{words}.")
