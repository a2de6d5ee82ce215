"""The progress of a run: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from types import TracebackType
from typing import Any


def tell(line: str) -> None:
    """Prints a line; in a terminal it breaks between words, where the terminal would break it anywhere."""
    if sys.stdout.isatty():
        width = max(40, shutil.get_terminal_size().columns)
        line = textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    print(line, flush=True)


class Progress:
    """A bar with loss, accuracy, tokens/s, mfu and time left in a terminal; a plain line per logged step elsewhere."""

    def __init__(self, total_steps: int, done: int = 0):
        self._total, self._done, self._started = total_steps, done, time.monotonic()
        self._first, self._bar = done, None
        if sys.stdout.isatty():
            self._bar = _rich_bar(total_steps, done)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def begin(self) -> None:
        """Starts the clock of the time left; what came before (a first evaluation, compiling) does not repeat."""
        self._started = time.monotonic()
        if self._bar:
            self._bar.reset(self._bar.task_ids[0], completed=self._first)

    def advance(self, step: int) -> None:
        """`step` updates are done."""
        self._done = step
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def show(self, record: dict[str, Any]) -> None:
        """The figures of a logged step: beside the bar, or as a line."""
        columns = NARROW if self._bar else COLUMNS
        figures = "  ".join(f"{name} {record[key]:{form}}" for name, key, form in columns if key in record)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], figures=figures)
        else:
            print(f"step {record['step']:>5}/{self._total}  {figures}  left {clock(self._left())}", flush=True)

    def evaluated(self, record: dict[str, Any], best: tuple[float, int] | None) -> None:
        """The figures of an evaluation, as a line that stays; `best` loss and its step, where this is not the best one."""
        columns = EVALUATED_NARROW if self._bar else EVALUATED
        figures = "  ".join(f"{name} {record[key]:{form}}" for name, key, form in columns if key in record)
        mark = "best" if best is None else f"best {best[0]:.4f} at step {best[1]}"
        self.say(f"step {record['step']:>5}/{self._total}  {figures}  ({mark})")

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            tell(line)

    def _left(self) -> float:
        each = (time.monotonic() - self._started) / max(1, self._done - self._first)
        return each * (self._total - self._done)


COLUMNS = (
    ("loss", "loss", ".4f"), ("accuracy", "mean_token_accuracy", ".3f"), ("lr", "learning_rate", ".2e"),
    ("grad", "grad_norm", ".2f"), ("tokens/s", "tokens_per_second", ",.0f"), ("mfu", "mfu", ".1%"),
)  # fmt: skip
EVALUATED = (
    ("eval_loss", "eval_loss", ".4f"), ("eval_accuracy", "eval_mean_token_accuracy", ".3f"),
    ("probe_loss", "probe_loss", ".4f"),
)  # fmt: skip
EVALUATED_NARROW = (
    ("eval_loss", "eval_loss", ".4f"), ("acc", "eval_mean_token_accuracy", ".3f"), ("probe", "probe_loss", ".4f"),
)  # fmt: skip
NARROW = (  # beside a bar in 80 columns
    ("loss", "loss", ".4f"), ("acc", "mean_token_accuracy", ".3f"), ("tok/s", "tokens_per_second", ",.0f"),
    ("mfu", "mfu", ".0%"),
)  # fmt: skip


def _rich_bar(total: int, done: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [BarColumn(8), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn()]
    bar = Progress(*columns)
    bar.add_task("train", total=total, completed=done, figures="")
    return bar


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
