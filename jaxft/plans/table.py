"""A plan as text: one place as a block, several as a table, for a terminal, a pipe or a page in Markdown."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.plans.row import ARITHMETIC, Row

GIB = 2**30
COLUMNS = (
    "topology", "rows", "policy", "GiB a chip", "of", "FLOPs", "ICI GB", "DCN GB", "s a step", "bound by", "tokens/s",
    "hours", "USD", "spot",
)  # fmt: skip
NARROW = ("topology", "rows", "policy", "GiB a chip", "s a step", "bound by", "hours", "USD")
WIDE, PIPE = 140, 200  # characters


def block(row: Row) -> str:
    """One place in full."""
    width = max(map(len, dict(_lines(row))))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in _lines(row))


def _lines(row: Row) -> list[tuple[str, str]]:
    mesh = ", ".join(f"{name}={size}" for name, size in row["mesh"].items())
    lines = [
        (row["topology"], f"{row['chips']} × {row['chip']}, mesh {mesh} ({row['method']})"),
        (
            "step",
            f"{row['rows_per_step']} rows of {row['positions_per_row']} tokens, {row['positions_per_chip']:,.0f} to a chip",
        ),
        ("base", row["base"]),
        ("policy", _policy(row)),
        *((label, _gib(row[f"{key}_bytes_per_chip"])) for label, key in MEMORY.items()),
        ("total", _fit(row)),
        (
            "FLOPs",
            f"{row['flops_per_token'] / 1e9:,.2f} GFLOP a token in matmuls, "
            f"{row['flops_over_ideal']:.3f} of the ideal {row['ideal']}; "
            f"{row['attention_flops_per_token'] / 1e9:,.2f} in attention",
        ),
        ("HBM traffic", f"{_gb(row['hbm_traffic_bytes_per_chip'])} a chip and step, by arithmetic"),
        ("ICI", f"{_gb(row['ici_bytes_per_chip'])} a chip and step ({row['network_source']})"),
        ("DCN", f"{_gb(row['dcn_bytes_per_chip'])} a chip and step"),
        ("roofline", _roofline(row)),
        ("expected", _expected(row)),
    ]
    if "compile_seconds" in row:
        lines.append(("compiled", f"in {row['compile_seconds']:.0f} s on this machine"))
    return [*lines, *_run(row)]


MEMORY = {
    "weights": "weights", "LoRA": "lora", "optimizer": "optimizer", "batch": "batch", "activations": "activations",
}  # fmt: skip


def _policy(row: Row) -> str:
    large = row.get("policies_too_large") or {}
    rejected = [name if size is None else f"{name} ({size / GIB:.1f} GiB)" for name, size in large.items()]
    return row["policy"] + (f"; {', '.join(rejected)} does not fit" if rejected else "")


def _fit(row: Row) -> str:
    """Fits or not, and by how much."""
    total, free, hbm = (row[f"{key}_bytes_per_chip"] for key in ("total", "free", "hbm"))
    verdict = "fits" if free >= 0 else "does not fit"
    return f"{_gib(total)} of {_gib(hbm)}: {verdict}, by {_gib(abs(free))}"


def _roofline(row: Row) -> str:
    names = {"compute": "compute", "HBM": "hbm", "ICI": "ici", "DCN": "dcn"}
    parts = [f"{label} {_seconds(row[f'{key}_seconds'])}" for label, key in names.items()]
    return f"{_seconds(row['roofline_seconds'])} a step, bound by {row['bound_by']} ({', '.join(parts)})"


def _expected(row: Row) -> str:
    share = row["expected_share_of_roofline"]
    return (
        f"{_seconds(row['expected_step_seconds'])} a step at {share:.0%} of the roofline's speed (assumed, not measured), "
        f"{row['tokens_per_second']:,.0f} tokens/s"
    )


def _run(row: Row) -> list[tuple[str, str]]:
    price, spot = row["usd_per_chip_hour"], row["usd_per_chip_hour_spot"]
    if price is None:
        priced = "no price is known; give --run.usd_per_chip_hour"
    else:
        also = f", {spot:g} spot" if spot is not None else ""
        priced = f"{price:g} USD a chip-hour{also}; {row['price_source']}, {row['price_date']}"
    if row["steps"] is None:
        each = row["usd_per_million_tokens"]
        cost = "unknown" if each is None else f"{each:.3g} USD for a million tokens"
        return [("run", f"unknown length: {row['tokens_source']}"), ("cost", f"{cost} ({priced})")]
    hours = f"{clock(row['training_hours'])} of steps and {clock(row['evaluation_hours'])} of evaluations"
    run = f"{row['steps']:,} steps, {row['tokens'] / 1e6:,.2f} million tokens ({row['tokens_source']})"
    cost = "unknown" if row["usd"] is None else _usd(row["usd"])
    cost += "" if row["usd_spot"] is None else f", {_usd(row['usd_spot'])} spot"
    return [("run", run), ("time", f"{hours}; not: {row['not_included']}"), ("cost", f"{cost} ({priced})")]


def cells(row: Row) -> list[str]:
    """A row of the table, in the order of COLUMNS."""
    name = row["topology"] + (" *" if row["method"] == ARITHMETIC else "")
    if not row["fits"]:
        return [name, str(row["rows_per_step"]), *failure(row)]
    return [
        name, str(row["rows_per_step"]), row["policy"], f"{row['total_bytes_per_chip'] / GIB:.2f}",
        f"{row['hbm_bytes_per_chip'] / GIB:.2f}", f"{row['flops_over_ideal']:.3f}", f"{row['ici_bytes_per_chip'] / 1e9:.1f}",
        f"{row['dcn_bytes_per_chip'] / 1e9:.2f}" if row["slices"] > 1 else "-", f"{row['expected_step_seconds']:.3g}",
        row["bound_by"], f"{row['tokens_per_second']:,.0f}", clock(row["hours"]), _usd(row["usd"]), _usd(row["usd_spot"]),
    ]  # fmt: skip


def failure(row: Row) -> list[str]:
    """The rest of a row that cannot be."""
    needed, over = row.get("total_bytes_per_chip"), row.get("free_bytes_per_chip")
    if row["error_kind"] == "memory":
        by = f", by {-over / GIB:.2f} GiB" if over is not None and over < 0 else ""
        size = "-" if needed is None else f"{needed / GIB:.2f}"
        return ["-", size, f"{row['hbm_bytes_per_chip'] / GIB:.2f}", f"does not fit{by}"]
    return ["-", "-", f"{row['hbm_bytes_per_chip'] / GIB:.2f}", row["error"]]


def notes(rows: Sequence[Row], best: Mapping[str, str | None]) -> str:
    """What the table does not say by itself."""
    lines = [f"{name}: {which}" for name, which in best.items() if which]
    share = next((row["expected_share_of_roofline"] for row in rows if row["fits"]), None)
    if share is not None:
        lines.append(
            f"Seconds are arithmetic: {share:.0%} of the roofline's speed, assumed and not measured. "
            "FLOPs are those of matmuls over the ideal. "
            "Hours and USD are of steps and evaluations, without loading, compiling, answers and saving."
        )
    programs = sum(row.get("programs_compiled") or 0 for row in rows)
    if programs:
        lines.append(f"{programs} programs compiled, of the batches and policies that arithmetic put first")
    if any(row["method"] == ARITHMETIC for row in rows):
        lines.append(f"* {ARITHMETIC}")
    return "\n".join(lines)


def markdown(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """The table for a README; a place that cannot be has its reason in one cell."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        found = cells(row)
        found += [""] * (len(COLUMNS) - len(found))
        kept = found if columns is COLUMNS else [found[COLUMNS.index(name)] for name in columns]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in kept) + " |")
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """For a terminal, fewer columns where it is narrow; in a pipe plain lines."""
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else PIPE
    columns = COLUMNS if width >= WIDE else NARROW
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in columns:
        words = name in ("topology", "policy", "bound by")
        shown.add_column(name, justify="left" if words else "right", no_wrap=True)
    fitting = [row for row in rows if row["fits"]]
    for row in fitting:
        found = cells(row)
        shown.add_row(*(found[COLUMNS.index(name)] for name in columns))
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=terminal, legacy_windows=False).print(shown)
    lines = [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()] if fitting else []
    return "\n".join([*lines, *(_failed(row) for row in rows if not row["fits"])])


def _failed(row: Row) -> str:
    return f"{row['topology']}, {row['rows_per_step']} rows: {row['error']}"


def clock(hours: float | None) -> str:
    """1.5 h, 12.3 min or 40 s."""
    if hours is None:
        return "-"
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def _usd(amount: float | None) -> str:
    return "-" if amount is None else f"${amount:,.2f}" if amount >= 0.1 else f"${amount:.2g}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB / 100 else f"{size / 2**20:.2f} MiB"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"


def _seconds(value: Any) -> str:
    return "unknown" if value is None else f"{value:.3g} s" if value >= 0.1 or not value else f"{value * 1e3:.3g} ms"
