"""PEFT's adapter format, both ways: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxft.errors import UserError
from jaxft.models import lora
from jaxft.models.arch import Arch
from jaxft.models.tensors import Tensor
from jaxft.weights.hub import read_json
from jaxft.weights.load import read_tensor
from jaxft.weights.shards import Slice, open_file, write_file

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Settings under which the same tensors mean another model: reading past one would be quietly wrong.
UNSUPPORTED = (
    "use_dora fan_in_fan_out use_qalora modules_to_save layer_replication trainable_token_indices target_parameters "
    "alora_invocation_tokens lora_bias megatron_config arrow_config use_bdlora kasa_config monteclora_config"
).split()
# Initialisations that leave the base's own weights alone; PiSSA, OLoRA, CorDA and LoftQ change them.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "lora_ga")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter folder, opened and checked against an architecture. `tensors` are named without PEFT's prefix."""

    folder: Path
    adapters: Mapping[str, lora.Adapter]
    tensors: Mapping[str, Slice]

    def plan(self, dropout: float) -> lora.Adaptation:
        """What the adapter adapts, with `dropout` where training goes on."""
        return lora.Adaptation({path: replace(a, dropout=dropout) for path, a in self.adapters.items()})

    def read(self, rows: Iterable[Tensor], mesh: Mesh) -> dict[str, jax.Array]:
        """Path -> array of every pair."""
        return {row.path: read_tensor(self.tensors, row, mesh) for row in rows if row.adapter}


def open_adapter(folder: Path, arch: Arch) -> AdapterFiles:
    """Reads the folder's config and header, and checks every tensor against `arch`.

    Raises UserError for a missing folder, another kind of adapter, or tensors that `arch` has no place for.
    """
    if not folder.is_dir():
        raise UserError(f"adapter: no folder {folder} (looked at {folder.absolute()})")
    file = folder / CONFIG
    config = read_json(file, "a PEFT adapter")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type {config.get('peft_type')!r} is not supported; supported: 'LORA'")
    faults = [key for key in UNSUPPORTED if config.get(key)]
    faults += ["bias"] if config.get("bias", "none") != "none" else []
    faults += ["init_lora_weights"] if config.get("init_lora_weights") not in PLAIN_INITS else []
    if faults:
        raise UserError(f"{file}: {', '.join(f'{key}={config[key]!r}' for key in faults)} is not supported")
    found = {name.removeprefix(PREFIX): part for name, part in open_file(folder / WEIGHTS).items()}
    adapters = _pairs(config, found, arch, folder / WEIGHTS)
    known = {f"{path}.lora_{side}.weight" for path in adapters for side in "AB"}
    strangers = [name for name in found if name not in known]
    if strangers or not adapters:
        first = (strangers or ["(an empty file)"])[0]
        raise UserError(
            f"{folder / WEIGHTS}: {len(strangers)} tensors have no place in this {arch.family} model, first {first}"
        )
    return AdapterFiles(folder, adapters, found)


def _pairs(config: Mapping[str, Any], found: Mapping[str, Slice], arch: Arch, file: Path) -> dict[str, lora.Adapter]:
    """The modules whose pair is stored: the tensors decide, as `target_modules` may name more than was adapted."""
    plain, adapters = bool(config.get("use_rslora", False)), {}
    for path, (n_in, n_out) in arch.linear_shapes().items():
        a, b = (found.get(f"{path}.lora_{side}.weight") for side in "AB")
        if a is None and b is None:
            continue
        rank = _by_pattern(config, "r", "rank_pattern", int, path, file.with_name(CONFIG))
        alpha = _by_pattern(config, "lora_alpha", "alpha_pattern", (int, float), path, file.with_name(CONFIG))
        seen = tuple(None if t is None else t.shape for t in (a, b))
        if seen != ((rank, n_in), (n_out, rank)):
            raise UserError(
                f"{file}: {path}: expected A {(rank, n_in)} and B {(n_out, rank)}, found {seen[0]} and {seen[1]}"
            )
        adapters[path] = lora.Adapter(rank, float(alpha), rslora=plain)
    return adapters


def _by_pattern(config: Mapping[str, Any], key: str, patterns_key: str, kind: Any, path: str, file: Path) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module path, else the adapter-wide value (8)."""
    patterns = config.get(patterns_key) or {}
    try:
        matching = [p for p in patterns if re.match(rf"(.*\.)?({p})$", path)]
        name, value = (patterns_key, patterns[matching[0]]) if matching else (key, config.get(key, 8))
    except (re.error, TypeError, LookupError) as error:
        raise UserError(
            f"{file}: {patterns_key}: expected regular expressions and values, found {patterns!r}"
        ) from error
    if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
        raise UserError(f"{file}: {name}: expected a positive number, found {value!r}")
    return value


def save(
    folder: Path,
    rows: Iterable[Tensor],
    arrays: Mapping[str, jax.Array],
    plan: lora.Adaptation,
    arch: Arch,
    base_model: str,
    revision: str | None = None,
) -> None:
    """Writes the adapter's two files into `folder`: pairs in float32, every config key spelt out."""
    folder.mkdir(parents=True, exist_ok=True)
    out = {PREFIX + name: value for row in rows if row.adapter for name, value in hub_tensors(row, arrays[row.path])}
    write_file(folder / WEIGHTS, out)
    (folder / CONFIG).write_text(json.dumps(adapter_config(plan, arch, base_model, revision), indent=2) + "\n")


def hub_tensors(row: Tensor, array: jax.Array) -> list[tuple[str, np.ndarray]]:
    """The Hub's tensors that a variable holds: `(name, contiguous array)`, in the Hub's orientation."""
    values = np.asarray(array)
    pieces = list(values) if row.stacked else [values]
    return [
        (name, np.ascontiguousarray(piece.T if row.transposed else piece)) for name, piece in zip(row.names, pieces)
    ]


def adapter_config(plan: lora.Adaptation, arch: Arch, base_model: str, revision: str | None = None) -> dict[str, Any]:
    """adapter_config.json: every key that bears on the result, since PEFT fills absent ones with its own defaults."""
    first = next(iter(plan.adapters.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": _whole(first.alpha),
        "lora_dropout": first.dropout,
        "target_modules": target_names(plan, arch),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": first.rslora,
        "use_dora": False,
        "rank_pattern": {p: a.rank for p, a in plan.adapters.items() if a.rank != first.rank},
        "alpha_pattern": {p: _whole(a.alpha) for p, a in plan.adapters.items() if a.alpha != first.alpha},
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "peft_version": "0.18.0",  # the format's version, not that of an installed package
    }


def target_names(plan: lora.Adaptation, arch: Arch) -> list[str]:
    """Leaf names where they select exactly the adapted modules, whole paths where they would select more."""
    leaves = sorted({path.rpartition(".")[2] for path in plan.adapters})
    return leaves if set(lora.targets(tuple(leaves), arch)) == set(plan.adapters) else sorted(plan.adapters)


def _whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
