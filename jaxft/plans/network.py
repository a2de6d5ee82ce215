"""What a compiled program sends between chips, read from its text. No JAX here.

The text is XLA's optimized HLO for one chip (`jax.stages.Compiled.as_text()`). A loop's collectives count once for each turn.
Of a TPU program for several slices, libtpu writes what crosses slices as `send`s to the host, marked as Megascale's; every
other collective stays within a slice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32,
    "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3": 8,
}  # fmt: skip
# What a chip takes in of a collective over n chips, as a multiple of its own operands' bytes: a ring's, the least there is.
RECEIVED = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: 1,
    "collective-permute": lambda n: 1,
}
MEGASCALE = {  # _xla_megascale_transfer_type -> the same over slices
    "ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter", "ALL_REDUCE": "all-reduce", "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """What one chip takes in during one run of the program."""

    ici_bytes: float = 0.0
    dcn_bytes: float = 0.0
    kinds: Mapping[str, tuple[float, float]] = field(
        default_factory=dict
    )  # collective -> how often, bytes; dcn's have "dcn "


def moved(text: str, chips: int) -> Moved:
    """Reads an executable's text; `chips` are those of one slice. Raises ValueError for a text that is not understood."""
    program = _Program(text)
    kinds: dict[str, tuple[float, float]] = {}
    for kind, size, times in program.collectives(program.entry, chips):
        count, total = kinds.get(kind, (0.0, 0.0))
        kinds[kind] = count + times, total + size * times
    dcn = sum(total for kind, (_, total) in kinds.items() if kind.startswith("dcn "))
    return Moved(sum(total for _, total in kinds.values()) - dcn, dcn, kinds)


@dataclass(frozen=True)
class _Line:
    """One instruction: `name = shape operation(operands), attributes`."""

    name: str
    shape: str
    operation: str
    inner: str  # between the brackets
    rest: str

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of other instructions."""
        return tuple(re.findall(r"%([\w.-]+)", self.inner))

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.rest)
        return found[1] if found else None

    @cached_property
    def bytes(self) -> float:
        """Of its value, all parts of a tuple together."""
        return sum(
            math.prod(int(size) for size in sizes.split(",") if size) * BITS[dtype] / 8
            for dtype, sizes in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", self.shape)
            if dtype in BITS
        )


class _Program:
    """A text as computations of instructions."""

    def __init__(self, text: str):
        self.lines: dict[str, list[_Line]] = {}
        self.entry = ""
        current: list[_Line] = []
        for raw in text.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", raw) if raw[:1] not in (" ", "}", "") else None
            if header:
                current = self.lines.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif raw.startswith(" ") and (line := _line(raw)):
                current.append(line)
        if not self.entry:
            raise ValueError("no entry computation: this is not an HLO module's text")

    def collectives(self, name: str, chips: int, times: float = 1.0) -> Iterator[tuple[str, float, float]]:
        """Kind, bytes that a chip takes in, and how often, of each collective in a computation and those that it calls."""
        inside = {line.name: line for line in self.lines[name]}
        started = any('"AsyncCollectiveStart"' in line.rest for line in inside.values())
        for line in inside.values():
            kind = line.operation.removesuffix("-start")
            if kind in RECEIVED:
                # libtpu spreads a collective over the fusions that run beside it; the one that starts it stands for all.
                if "async_collective_fusion_config" in line.rest and not started:
                    continue
                yield kind, _received(kind, line, inside, chips), times
            elif line.operation == "send" and "_xla_megascale_transfer_type" in line.rest:
                yield *_between_slices(line, inside), times
            elif line.operation == "while":
                body, turns = line.called("body"), self._turns(line, inside)
                if body:
                    yield from self.collectives(body, chips, times * turns)
            elif line.operation == "conditional":
                yield from self._costliest(line, chips, times)
            elif line.operation in ("fusion", "call", "async-start"):
                called = line.called("calls") or line.called("to_apply")
                if called in self.lines:
                    yield from self.collectives(called, chips, times)

    def _costliest(self, line: _Line, chips: int, times: float) -> Iterator[tuple[str, float, float]]:
        named = re.search(r"branch_computations=\{([^}]*)\}", line.rest)
        found = [each.strip(" %") for each in named[1].split(",")] if named else []
        found += [each for side in ("true", "false") if (each := line.called(f"{side}_computation"))]
        branches = [list(self.collectives(each, chips, times)) for each in found]
        yield from max(branches, key=lambda each: sum(size for _, size, _ in each), default=[])

    def _turns(self, loop: _Line, inside: Mapping[str, _Line]) -> float:
        """Turns of a while: as XLA noted them, or those of a counter that its condition compares with a constant."""
        noted = re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest)
        if noted:
            return int(noted[1])
        condition, body = loop.called("condition"), loop.called("body")
        if condition not in self.lines or body not in self.lines:
            raise ValueError(f"{loop.name}: a loop without condition or body")
        test = {line.name: line for line in self.lines[condition]}
        found = next((line for line in test.values() if line.operation == "compare"), None)
        if found is None or "direction=LT" not in found.rest:
            raise ValueError(f"{loop.name}: the number of its turns cannot be read")
        counter, limit = (test[name] for name in found.operands)
        index = _index(counter)
        first = _constant(inside[inside[loop.operands[0]].operands[index]], inside) or 0
        return max(0, math.ceil((_required(limit, test) - first) / self._stride(body, index)))

    def _stride(self, body: str, index: int) -> int:
        """What one turn adds to the counter."""
        inside = {line.name: line for line in self.lines[body]}
        line, total = inside[self.lines[body][-1].operands[index]], 0
        while line.operation != "get-tuple-element":
            if line.operation == "add":
                constant = next(
                    (c for name in line.operands if (c := _constant(inside[name], inside)) is not None), None
                )
                if constant is None:
                    break
                total += constant
                line = next(inside[name] for name in line.operands if _constant(inside[name], inside) is None)
            elif line.operation in ("copy", "bitcast"):
                line = inside[line.operands[0]]
            elif line.operation == "fusion":  # as a CPU's: counter + 1 in a fusion of its own
                return 1
            else:
                break
        return total or 1


def _line(raw: str) -> _Line | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", raw)
    if not found:
        return None
    rest = raw[found.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    operation = re.match(r" ?([\w-]+)\(", rest[end:])
    if not operation:
        return None
    begin = end + operation.end() - 1
    close = begin + _closing(rest[begin:])
    return _Line(found[1], rest[:end], operation[1], rest[begin + 1 : close - 1], rest[close:])


def _closing(text: str) -> int:
    """The position behind the bracket that closes the first one."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return at + 1
    raise ValueError("a bracket is not closed")


def _index(line: _Line) -> int:
    found = re.search(r"index=(\d+)", line.rest)
    if not found:
        raise ValueError(f"{line.name}: expected an element of a tuple")
    return int(found[1])


def _constant(line: _Line, inside: Mapping[str, _Line]) -> int | None:
    """The integer that an instruction is; None where it is none."""
    while line.operation in ("copy", "bitcast", "convert") and line.operands and line.operands[0] in inside:
        line = inside[line.operands[0]]
    found = re.fullmatch(r"-?\d+", line.inner) if line.operation == "constant" else None
    return int(found[0]) if found else None


def _required(line: _Line, inside: Mapping[str, _Line]) -> int:
    found = _constant(line, inside)
    if found is None:
        raise ValueError(f"{line.name}: expected a constant number of turns")
    return found


def _received(kind: str, line: _Line, inside: Mapping[str, _Line], chips: int) -> float:
    own = sum(inside[name].bytes for name in line.operands if name in inside)
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line.rest)
        moves = re.findall(r"(\d+),(\d+)", pairs[1]) if pairs else []
        return own if any(source != target for source, target in moves) else 0.0
    return own * RECEIVED[kind](group(line.rest, chips))


def _between_slices(line: _Line, inside: Mapping[str, _Line]) -> tuple[str, float]:
    """`{1,2}x{0:3}` are the slices and the chips of each that take part."""
    kind = MEGASCALE.get(re.search(r'_xla_megascale_transfer_type="(\w+)"', line.rest)[1], "collective-permute")
    target = re.search(r'_xla_megascale_target="\{([^}]*)\}', line.rest)
    slices = _members(target[1]) if target else 2
    return f"dcn {kind}", inside[line.operands[0]].bytes * RECEIVED[kind](slices)


def _members(text: str) -> int:
    """How many `1,2,4:7` are: 6."""
    ends = [list(map(int, part.split(":"))) for part in text.split(",")]
    return sum(each[-1] - each[0] + 1 for each in ends)


def group(attributes: str, chips: int) -> int:
    """How many chips take part with each other: of `replica_groups`, written out or as an iota; all where it is empty."""
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes)
    if iota:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return listed[1].count(",") + 1
    mesh = re.search(r"replica_groups=mesh\[([^]]*)\] \{([^}]*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # 'x':(2)4 is a part of 4 of axis x
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if re.search(r"replica_groups=\{\}", attributes) or "replica_groups" not in attributes:
        return chips
    raise ValueError(f"replica_groups are not understood: {attributes[:120]}")
