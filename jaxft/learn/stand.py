"""Where a run stands beside its arrays."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Stand:
    """Where a run stands beside its arrays: what a checkpoint keeps of it, JSON-ready."""

    best_loss: float | None = None
    best_step: int | None = None
    bad_evaluations: int = 0
    tokens: int = 0  # real tokens trained on
    seconds: float = 0.0  # spent in training steps, over all starts, compiling apart
    wall_seconds: float = 0.0  # of everything, over all starts, up to the last checkpoint of each
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # nll, correct, weight since the last log line
    evaluated: int | None = None  # the step of the last evaluation
    skipped: int = 0  # steps whose update was not applied
    skipped_in_row: int = 0  # of them, the newest without one in between that was
