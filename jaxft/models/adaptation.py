"""What of a model is trained: which modules get a low-rank pair, which are trained in full, and what is held in few bits."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxft.config import Lora
from jaxft.errors import UserError
from jaxft.models.arch import Arch
from jaxft.models.quantize import Scheme


@dataclass(frozen=True)
class Adapter:
    """One pair: y = x W + scale · dropout(x) A B; with `dora`, that times a trained magnitude over its weights' length."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    own_mask: bool = False  # of dropout, apart from those of modules that read the same input

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA (as PEFT)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Adaptation:
    """What is trained, by Hub path: modules with a pair, modules in full, biases alone; or every base tensor in place.

    A tied head and embedding part as soon as one of them is trained in full, unless `keeps_tied`. Matrices of linear modules
    that are not trained are held as `quantized` says, but for those of the modules `whole`; with `tables` the embedding and
    the head are held in int8. Base tensors trained in place are of `param_dtype`.
    """

    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    biases: frozenset[str] = frozenset()
    keeps_tied: bool = False
    every_weight: bool = False
    quantized: Scheme | None = None
    whole: frozenset[str] = frozenset()
    tables: bool = False
    param_dtype: str = "float32"

    def trains(self, path: str, leaf: str) -> bool:
        """Whether the base tensor `path.leaf` is trained."""
        return self.every_weight or path in self.modules or (leaf == "bias" and path in self.biases)

    def scheme(self, path: str) -> Scheme | None:
        """How the weight of a linear module is quantised, None where it is not."""
        return None if path in self.whole or self.trains(path, "weight") else self.quantized

    def of(self, path: str) -> tuple[Adapter | None, bool, bool, Scheme | None]:
        """All that is planned for one module; layers can be stacked where this agrees."""
        return self.adapters.get(path), path in self.modules, path in self.biases, self.scheme(path)

    def parts(self, arch: Arch) -> bool:
        """Whether a tied head and embedding are no longer the same, because one is trained in full or both are, apart."""
        ends = {arch.names.embed, arch.names.head}
        return arch.tied_head and arch.names.head is not None and not self.keeps_tied and bool(self.modules & ends)

    @property
    def bias(self) -> str:
        """PEFT's name for the biases trained: none, lora_only (of the modules with a pair) or all."""
        return "none" if not self.biases else "lora_only" if self.biases <= self.adapters.keys() else "all"


def plan_of(lora: Lora | None, arch: Arch) -> Adaptation:
    """What `lora` means for `arch`; None trains every weight. Raises UserError for a name that matches nothing."""
    if lora is None:
        return Adaptation(every_weight=True)
    paths = targets(lora.targets, arch)
    ranks = by_pattern(lora.rank_pattern, paths, lora.rank, "lora.rank_pattern")
    alphas = by_pattern(lora.alpha_pattern, paths, lora.alpha, "lora.alpha_pattern")
    kind = {
        "dropout": lora.dropout,
        "rslora": lora.rslora,
        "dora": lora.dora,
        "own_mask": lora.dropout_masks == "separate",
    }
    adapters = {p: Adapter(ranks[p], float(alphas[p]), **kind) for p in paths}
    modules = in_full(lora.train_modules, arch)
    both = sorted(modules & adapters.keys())
    if both:
        raise UserError(
            f"lora.train_modules and lora.targets both name {both[0]}; a module has a pair or is trained in full"
        )
    biased = {"none": (), "lora_only": paths, "all": arch.linear_shapes()}[lora.bias]
    return Adaptation(adapters, modules, arch.biased_paths().intersection(biased))


def described(plan: Adaptation) -> str:
    """What is trained, in a line: pairs by rank and module, modules in full, biases."""
    if plan.every_weight:
        return "every weight"
    kinds = Counter((pair.rank, pair.alpha, path.rpartition(".")[2]) for path, pair in plan.adapters.items())
    settings = list(dict.fromkeys(kind[:2] for kind in kinds))
    said = []
    for rank, alpha in settings:
        leaves = " ".join(f"{leaf}×{n}" for (r, a, leaf), n in kinds.items() if (r, a) == (rank, alpha))
        said.append(f"{'DoRA' if next(iter(plan.adapters.values())).dora else 'LoRA'} r={rank} α={alpha:g} on {leaves}")
    if plan.modules:
        said.append(f"in full {', '.join(sorted(plan.modules))}")
    if plan.biases:
        said.append(f"{len(plan.biases)} biases")
    return "; ".join(said)


def matching(patterns: Iterable[str], path: str) -> str | None:
    """PEFT's rule: the first of `patterns` that matches the end of a module path. Raises re.error."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", path)), None)


def by_pattern(patterns: Mapping[str, float], paths: Sequence[str], default: float, key: str) -> dict[str, Any]:
    """Path -> the value of the first of `patterns` that matches the path's end, by PEFT's rule; else `default`.

    Raises UserError for what is no regular expression, and for one that matches none of `paths`.
    """
    try:
        found = {path: matching(patterns, path) for path in paths}
        idle = [p for p in patterns if not any(matching([p], path) for path in paths)]
    except re.error as error:
        raise UserError(f"{key}: {error.pattern!r} is not a regular expression: {error}") from error
    if idle:
        raise UserError(f"{key}: {idle[0]!r} matches no adapted module (e.g. {paths[0]})")
    return {path: default if pattern is None else patterns[pattern] for path, pattern in found.items()}


def with_scheme(plan: Adaptation, scheme: Scheme, skip: Sequence[str], tables: bool, arch: Arch) -> Adaptation:
    """`plan` with the linear modules' frozen weights held as `scheme` says, but for those that `skip` names; see Adaptation.

    Raises UserError for a name that matches none, and for a group that does not divide a module's inputs.
    """
    shapes = arch.linear_shapes()
    idle = [name for name in skip if not any(_named(path, name) for path in shapes)]
    if idle:
        existing = sorted({path.rpartition(".")[2] for path in shapes})
        raise UserError(
            f"model.quantize_skip: {idle[0]!r} matches no linear module; {arch.family} has {', '.join(existing)}"
        )
    whole = frozenset(path for path in shapes if any(_named(path, name) for name in skip))
    found = replace(plan, quantized=scheme, whole=whole, tables=tables)
    for path, shape in shapes.items():
        try:
            if found.scheme(path) is not None:
                scheme.codes(shape)
        except UserError as error:
            raise UserError(
                f"model.quantize_group: {path}: {error}; take another group or scheme, or name it in model.quantize_skip"
            ) from None
    return found


def in_full(names: Sequence[str], arch: Arch) -> frozenset[str]:
    """Hub paths of the modules that `names` select: those that equal one or end in `.name`. UserError for an idle name."""
    paths = arch.module_paths()
    idle = [name for name in names if not any(_named(path, name) for path in paths)]
    if idle:
        existing = sorted({path.rpartition(".")[2] for path in paths})
        raise UserError(f"lora.train_modules: {idle[0]!r} matches no module; {arch.family} has {', '.join(existing)}")
    return frozenset(path for path in paths if any(_named(path, name) for name in names))


def targets(wanted: str | tuple[str, ...], arch: Arch) -> list[str]:
    """Hub paths of the linear modules that `wanted` selects, by PEFT's rules.

    `all-linear`: every one. A sequence of names: a path that equals one or ends in `.name`. Any other string: a
    regular expression over the whole path, or a single name. UserError, with what exists, where a name matches nothing.
    """
    paths = list(arch.linear_shapes())
    if wanted == "all-linear":
        return paths
    if isinstance(wanted, str):
        try:
            selected = [p for p in paths if re.fullmatch(wanted, p)]
        except re.error as error:
            raise UserError(f"lora.targets: {wanted!r} is not a regular expression: {error}") from error
        if selected:
            return selected
        wanted = (wanted,)
    unmatched = [name for name in wanted if not any(_named(p, name) for p in paths)]
    if unmatched or not wanted:
        existing = sorted({p.rpartition(".")[2] for p in paths})
        raise UserError(
            f"lora.targets: {', '.join(map(repr, unmatched)) or 'an empty list'} matches no linear module; "
            f"{arch.family} has {', '.join(existing)} (e.g. {paths[0]})"
        )
    return [p for p in paths if any(_named(p, name) for name in wanted)]


def _named(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)
