"""What a run tells while it runs: metrics.jsonl, TensorBoard, and a progress line."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxft import chips
from jaxft.errors import UserError


class Metrics:
    """Writes each record to `metrics.jsonl` and its numbers to `tensorboard/` under TRL's names.

    Opened at step `resumed`, it first drops what a run that was stopped had logged beyond that step, so that a resumed
    run's log equals an uninterrupted one's. Of several processes one `writes`.
    """

    def __init__(self, folder: Path, resumed: int | None = None, writes: bool = True):
        from tensorboardX import SummaryWriter

        self._writes = writes
        if not writes:
            return

        self._file = folder / "metrics.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = [] if resumed is None else [r for r in read(folder) if r["step"] <= resumed]
            self._file.write_text("".join(json.dumps(record) + "\n" for record in kept))
            purge = {} if resumed is None else {"purge_step": resumed + 1}
            self._board = SummaryWriter(str(folder / "tensorboard"), **purge)
        except OSError as error:
            raise UserError(f"run.dir: {folder} cannot be written: {error.strerror or error}") from error

    def write(self, record: dict[str, Any]) -> None:
        """One line of `metrics.jsonl`, flushed, and one TensorBoard scalar per number; `step` is the x axis."""
        if not self._writes:
            return
        with self._file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                group = "eval" if name.startswith("eval_") else "train"
                self._board.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, record["step"])

    def text(self, name: str, text: str, step: int) -> None:
        """A text panel, as an indented code block, so that nothing in it is read as Markdown or HTML."""
        if self._writes:
            self._board.add_text(name, "\n".join("    " + line for line in text.splitlines()), step)

    def close(self) -> None:
        """Flushes TensorBoard's file."""
        if self._writes:
            self._board.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a run folder's metrics.jsonl; a last line cut off by a kill is left out."""
    file = folder / "metrics.jsonl"
    records = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def speed(
    steps: int, tokens: int, seconds: float, devices: Sequence[Any], flops_per_token: float | None
) -> dict[str, float]:
    """What `steps` steps over `tokens` real tokens in `seconds` come to, on `devices` of one kind.

    `mfu` is the share of the chips' peak that `flops_per_token` for each real token makes: padding, attention, the head and
    what is recomputed count as nothing. It is left out where the peak is not known, as on a CPU.
    """
    chip = chips.of_device(devices[0].device_kind)
    rate = tokens / seconds
    found = {
        "tokens_per_second": rate,
        "tokens_per_second_per_chip": rate * (chip.devices if chip else 1) / len(devices),
        "seconds_per_step": seconds / steps,
    }
    if chip and chip.flops and flops_per_token:
        found["mfu"] = flops_per_token * rate / (len(devices) * chip.flops)
    return found


def memory(devices: Sequence[Any]) -> dict[str, float]:
    """The most memory in use so far, in GiB: of the fullest device, or of the process where devices do not tell (a CPU's)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    if peaks and None not in peaks:
        return {"device_memory_gib": max(peaks) / chips.GIB}
    peak = _peak_resident_bytes()
    return {} if peak is None else {"host_memory_gib": peak / chips.GIB}


def _peak_resident_bytes() -> int | None:
    """Of this process; getrusage only where there is no /proc, since on Linux it starts from the parent's peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def _left(self) -> float:
        each = (time.monotonic() - self._started) / max(1, self._done - self._first)
        return each * (self._total - self._done)


COLUMNS = (
    ("loss", "loss", ".4f"), ("accuracy", "mean_token_accuracy", ".3f"), ("lr", "learning_rate", ".2e"),
    ("grad", "grad_norm", ".2f"), ("tokens/s", "tokens_per_second", ",.0f"), ("mfu", "mfu", ".1%"),
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
