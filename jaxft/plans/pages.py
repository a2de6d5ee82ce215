"""`python -m jaxft.plans.pages runs|growth|quantized|full|lines FILE …`: plans' files (`--json`) to tables for a README."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft.errors import UserError, run_verb
from jaxft.plans import table
from jaxft.plans.row import Row

GIB = 2**30
# What the published run of a config cost, as its authors say; the others' are not published one by one (1.3 to 10 USD each).
PAID = {"gemma2_9b": "$5.95"}
UNPUBLISHED = "not published"
KEPT = ("rows", "policy", "GiB a chip", "of", "s a step", "bound by", "hours", "USD", "spot")


def runs(plans: Sequence[dict[str, Any]]) -> str:
    """A row for each run and place, the cheapest that fits in bold, with what the published run cost beside it."""
    head = ["run", "place", *KEPT, "paid"]
    lines = [_line(head), _rule(head)]
    for plan in plans:
        for row in plan["rows"]:
            found = table.cells(row)
            found += [""] * (len(table.COLUMNS) - len(found))
            cells = [found[table.COLUMNS.index(name)] for name in KEPT]
            if not row["fits"]:
                cells = [found[1], *table.failure(row), *[""] * len(KEPT)][: len(KEPT)]
            place = f"**{found[0]}**" if row["topology"] == plan["cheapest"] else found[0]
            lines.append(_line([plan["config"], place, *cells, PAID.get(plan["config"], UNPUBLISHED)]))
    return "\n".join(lines)


def growth(plans: Sequence[dict[str, Any]]) -> str:
    """A row for each number of chips: what one chip holds, computes and takes in, what bounds the step, and how it scales.

    Tokens per second per chip are those of the roofline; the share is of the first row's.
    """
    head = [
        "chips", "mesh", "rows", "policy", "GiB a chip", "GFLOP a token", "ICI GB a chip", "DCN GB a chip", "compute s",
        "HBM s", "ICI s", "bound by", "tokens/s a chip", "of the first",
    ]  # fmt: skip
    lines, first = [_line(head), _rule(head)], None
    for row in (row for plan in plans for row in plan["rows"]):
        if not row["fits"]:
            lines.append(_line([row["topology"], row["error"], str(row["rows_per_step"]), *[""] * (len(head) - 3)]))
            continue
        each = row["rows_per_step"] * row["positions_per_row"] / row["roofline_seconds"] / row["chips"]
        first = first or each
        mesh = "·".join(f"{name} {size}" for name, size in row["mesh"].items() if size > 1) or "one"
        lines.append(_line([
            row["topology"], mesh, str(row["rows_per_step"]), row["policy"], f"{row['total_bytes_per_chip'] / GIB:.2f}",
            f"{row['flops_per_token'] / 1e9:.1f}", f"{row['ici_bytes_per_chip'] / 1e9:.1f}",
            f"{row['dcn_bytes_per_chip'] / 1e9:.2f}", f"{row['compute_seconds']:.3f}", f"{row['hbm_seconds']:.3f}",
            f"{row['ici_seconds'] or 0:.3f}", row["bound_by"], f"{each:,.0f}", f"{each / first:.0%}",
        ]))  # fmt: skip
    return "\n".join(lines)


def quantized(plans: Sequence[dict[str, Any]]) -> str:
    """A row for each way to hold a base, with what a chip holds of it."""
    return _held(plans, "weights")


def full(plans: Sequence[dict[str, Any]]) -> str:
    """Likewise for runs that train every weight, with what a chip holds of the optimizer's moments."""
    return _held(plans, "weights", "optimizer")


def _held(plans: Sequence[dict[str, Any]], *parts: str) -> str:
    shares = [f"{part}, GiB" for part in parts]
    head = ["run", "base", "place", "rows", "policy", *shares, "GiB a chip", "of", "FLOPs", "s a step", "bound by"]
    lines = [_line(head), _rule(head)]
    for name, row in ((each["config"], row) for each in plans for row in each["rows"]):
        found = [name, row["base"], row["topology"], str(row["rows_per_step"])]
        if row["fits"]:
            found += [row["policy"], *(f"{row[f'{part}_bytes_per_chip'] / GIB:.2f}" for part in (*parts, "total"))]
            found += [f"{row['hbm_bytes_per_chip'] / GIB:.2f}", f"{row['flops_over_ideal']:.3f}"]
            found += [f"{row['expected_step_seconds']:.3g}", row["bound_by"]]
        else:
            found += [*[""] * len(parts), *table.failure(row)]
        lines.append(_line([*found, *[""] * (len(head) - len(found))]))
    return "\n".join(lines)


def lines(plans: Sequence[dict[str, Any]]) -> str:
    """What a config's docstring says: the cheapest and the fastest place."""
    said = []
    for plan in plans:
        rows = {row["topology"]: row for row in plan["rows"]}
        best = [f"{name} {_brief(rows[plan[name]])}" for name in ("cheapest", "fastest") if plan[name]]
        paid = PAID.get(plan["config"], UNPUBLISHED)
        said.append(
            f"{plan['config']}: planned {plan['date']}, not run: {'; '.join(best)}. Paid for the published run: {paid}."
        )
    return "\n".join(said)


def _brief(row: Row) -> str:
    size = f"{row['total_bytes_per_chip'] / GIB:.1f} of {row['hbm_bytes_per_chip'] / GIB:.2f} GiB a chip"
    cost = "" if row["usd"] is None else f", ${row['usd']:.2f}"
    place = f"{row['topology']} ({row['rows_per_step']} rows, {row['policy']}, {size})"
    return f"{place} {table.clock(row['hours'])}{cost}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _rule(head: Sequence[str]) -> str:
    return "|" + "---|" * len(head)


PAGES = {"runs": runs, "growth": growth, "quantized": quantized, "full": full, "lines": lines}


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
        return {name: found[name] for name in ("config", "date", "cheapest", "fastest", "rows")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a plan's file, as `python -m jaxft.plan --json` writes it") from error


def main(argv: list[str]) -> None:
    """Prints the page."""
    parser = argparse.ArgumentParser(prog="python -m jaxft.plans.pages", allow_abbrev=False)
    parser.add_argument("page", choices=tuple(PAGES))
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path)
    asked = parser.parse_args(argv)
    print(PAGES[asked.page]([_read(file) for file in asked.files]))


if __name__ == "__main__":
    run_verb(main)
