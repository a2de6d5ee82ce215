"""JSON that somebody wrote, as records of ours: what does not fit is left out and counted, never guessed."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any, Literal, TypeVar

LIMIT = 1e18
"""Numbers beyond it are damage: no count, loss or time of a run comes near, and below it no sum or square overflows."""
Kind = TypeVar("Kind")


class Unfit(Exception):
    """A value is not of the kind that was asked for."""


def number(value: Any) -> float | None:
    """A finite int or float within LIMIT as it is, anything else as None."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and -LIMIT < value < LIMIT
    return value if good else None


class Fitter:
    """Reads parts of one file; `left_out` counts those that were there and did not fit."""

    def __init__(self) -> None:
        self.left_out = 0

    def one(self, kind: type[Kind], value: Any) -> Kind | None:
        """`value` as a `kind`: a frozen dataclass from its fields, or a type as annotations write it. None is None."""
        if value is None:
            return None
        try:
            return fitted(kind, value)
        except Unfit:
            self.left_out += 1
            return None

    def many(self, kind: type[Kind], value: Any) -> list[Kind]:
        """Those of a list's values that fit."""
        found = [self.one(kind, each) for each in self._of(value, list)]
        return [each for each in found if each is not None]

    def named(self, kind: type[Kind], value: Any) -> dict[str, Kind]:
        """Those of an object's values that fit, under their names."""
        found = {name: self.one(kind, each) for name, each in self._of(value, dict).items()}
        return {name: each for name, each in found.items() if each is not None}

    def _of(self, value: Any, kind: Any) -> Any:
        if isinstance(value, kind):
            return value
        self.left_out += value is not None
        return kind()


def fitted(kind: Any, value: Any) -> Any:
    """`value` as a `kind`; Unfit where it is none. Integers fit floats; of a dataclass absent fields take their defaults."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _first(inner, value)
    if origin is Literal:
        return _checked(value, value in inner)
    if origin in (tuple, list):
        return _listed(kind, origin, inner, value)
    if origin is dict:
        _checked(value, isinstance(value, dict))
        return {str(name): fitted(inner[1], each) for name, each in value.items()}
    if dataclasses.is_dataclass(kind):
        return _record(kind, value)
    if kind in (int, float):
        whole = number(value)
        return _checked(value, whole is not None and (kind is float or isinstance(value, int)))
    return _checked(value, isinstance(value, kind))


def _first(kinds: tuple[Any, ...], value: Any) -> Any:
    for kind in kinds:
        try:
            return fitted(kind, value)
        except Unfit:
            continue
    raise Unfit


def _listed(kind: Any, origin: Any, inner: tuple[Any, ...], value: Any) -> Any:
    _checked(value, isinstance(value, (list, tuple)))
    if origin is tuple and inner[-1] is not ...:
        _checked(value, len(value) == len(inner))
        return tuple(fitted(each, v) for each, v in zip(inner, value, strict=True))
    return origin(fitted(inner[0], v) for v in value)


def _record(kind: Any, value: Any) -> Any:
    _checked(value, isinstance(value, dict))
    given = {}
    for name, (hint, needed) in _fields(kind).items():
        if name in value:
            given[name] = fitted(hint, value[name])
        elif needed:
            raise Unfit
    return kind(**given)


@functools.cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Name -> its annotation, and whether a value is needed."""
    hints = typing.get_type_hints(kind)
    empty = dataclasses.MISSING
    return {
        f.name: (hints[f.name], f.default is empty and f.default_factory is empty) for f in dataclasses.fields(kind)
    }


def _checked(value: Any, good: bool) -> Any:
    if not good:
        raise Unfit
    return value


def plain(value: Any) -> Any:
    """JSON-ready: records as objects, tuples as lists, what is no finite number as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
