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

from jaxft.config import Lora
from jaxft.errors import UserError
from jaxft.models.adaptation import Adaptation, Adapter, matching, targets
from jaxft.models.arch import Arch
from jaxft.models.tensors import Tensor
from jaxft.parallel.sharding import on_host
from jaxft.weights import load, shards
from jaxft.weights.hub import check_links, read_json
from jaxft.weights.shards import Slice, open_file, write_file

MAX_NAMES, MAX_PATTERN = 1000, 500  # in a config; a pattern's characters
PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that it can be started for

# Settings under which the same tensors mean another model: reading past one would be quietly wrong.
UNSUPPORTED = (
    "fan_in_fan_out use_qalora layer_replication trainable_token_indices target_parameters "
    "alora_invocation_tokens lora_bias megatron_config arrow_config use_bdlora kasa_config monteclora_config"
).split()
# Initialisations that leave the base's own weights alone; PiSSA, OLoRA, CorDA and LoftQ change them.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "lora_ga")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter folder, opened. `tensors` are named without PEFT's prefix, as the table of tensors names them in `saved`."""

    folder: Path
    adaptation: Adaptation
    tensors: Mapping[str, Slice]

    def plan(self, training: Lora | None) -> Adaptation:
        """What the adapter adapts, with the dropout of `training` where that goes on."""
        dropout = (
            {} if training is None else {"dropout": training.dropout, "own_mask": training.dropout_masks == "separate"}
        )
        pairs = {path: replace(pair, **dropout) for path, pair in self.adaptation.adapters.items()}
        return replace(self.adaptation, adapters=pairs)

    def check(self, rows: Iterable[Tensor]) -> None:
        """Raises one UserError listing every tensor that is missing, left over, or misshapen."""
        wanted = {name: row.hub_shape for row in rows if row.saved is not None for name in row.saved}
        shards.check(
            self.tensors, wanted, f"{self.folder / WEIGHTS}: {{}} tensors do not fit {CONFIG} and the base model"
        )

    def read(self, rows: Iterable[Tensor], mesh: Mesh) -> dict[str, jax.Array]:
        """Path -> array of every pair, and of every module and bias that the adapter brings."""
        held = [(row, row.saved if row.stacked else row.saved[:1]) for row in rows if row.saved is not None]
        return {row.path: load.read_tensor(self.tensors, row, names, mesh) for row, names in held}


def open_adapter(folder: Path, arch: Arch) -> AdapterFiles:
    """Reads the folder's config and header, and finds in them what is adapted.

    Raises UserError for a missing folder, another kind of adapter, or tensors that `arch` has no place for.
    """
    if not folder.is_dir():
        raise UserError(f"adapter: no folder {folder} (looked at {folder.absolute()})")
    check_links(folder)
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise UserError(
            f"{folder}: has only pickle weights (adapter_model.bin), which can run code when read; load the adapter with PEFT "
            "and save it again, which writes safetensors"
        )
    config = _read_config(folder / CONFIG)
    found = {name.removeprefix(PREFIX): part for name, part in open_file(folder / WEIGHTS).items()}
    found = {name: part for name, part in found.items() if _plain(name) == name or _plain(name) not in found}
    adapters = _pairs(config, found, arch, folder / WEIGHTS)
    modules = _modules(config, found, arch)
    biases, biased, tensors = set(), arch.biased_paths(), {}
    for name, part in found.items():
        path, _, leaf = name.replace(".base_layer.bias", ".bias").rpartition(".")
        if leaf == "bias" and path not in modules and path in biased:
            biases.add(path)
            name = f"{path}.base_layer.bias" if path in adapters else f"{path}.bias"
        tensors[name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name] = part
    tied = bool(config.get("ensure_weight_tying")) and arch.tied_head and {arch.names.embed, arch.names.head} <= modules
    plan = Adaptation(adapters, frozenset(modules - {arch.names.head} if tied else modules), frozenset(biases), tied)
    strangers = [name for name in tensors if not _has_place(name, plan, arch.names.head)]
    if strangers or not adapters:
        first = (strangers or ["(an empty file)"])[0]
        raise UserError(
            f"{folder / WEIGHTS}: {len(strangers)} tensors have no place in this {arch.family} model, first {first}"
        )
    return AdapterFiles(folder, plan, tensors)


def _read_config(file: Path) -> Mapping[str, Any]:
    """adapter_config.json. Raises UserError for a kind of adapter that means something else than what is built here."""
    config = read_json(file, "a PEFT adapter")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type {config.get('peft_type')!r} is not supported; supported: 'LORA'")
    for key, kind in (("modules_to_save", list), ("rank_pattern", dict), ("alpha_pattern", dict)):
        found = config.get(key) or kind()
        if not isinstance(found, kind) or len(found) > MAX_NAMES or not all(_simple(name) for name in found):
            raise UserError(
                f"{file}: {key}: expected at most {MAX_NAMES} names or simple patterns (two repeats, none of a group)"
            )
    faults = [key for key in UNSUPPORTED if config.get(key)]
    faults += ["init_lora_weights"] if config.get("init_lora_weights") not in PLAIN_INITS else []
    if faults:
        raise UserError(f"{file}: {', '.join(f'{key}={config[key]!r}' for key in faults)} is not supported")
    return config


def _simple(pattern: Any) -> bool:
    """Whether searching for it takes little time, whatever it is searched in: a folder from elsewhere names its own."""
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN or sum(map(pattern.count, "*+?{")) > 2:
        return False
    return not re.search(r"\)[*+{]|\[\[|--|&&|~~|\|\|", pattern)  # the last five Python itself warns of


def _plain(name: str) -> str:
    """The name without PEFT's wrapper of a module in full, whose copies it writes beside the module's own tensors."""
    return name.replace(".original_module.", ".").replace(".modules_to_save.", ".")


def _modules(config: Mapping[str, Any], found: Mapping[str, Slice], arch: Arch) -> set[str]:
    """Modules in full: those that the file holds, and those that the config names by PEFT's rule, found or not."""
    named = config.get("modules_to_save") or []
    return {
        p
        for p in arch.module_paths()
        if named and (f"{p}.weight" in found or any(p.endswith(str(name)) for name in named))
    }


def _has_place(name: str, plan: Adaptation, head: str | None) -> bool:
    path = re.sub(r"\.(lora_[AB]\.weight|lora_magnitude_vector|base_layer\.bias)$", "", name)
    if path != name:
        return path in plan.adapters
    path = name.rpartition(".")[0]
    return path in plan.modules or path in plan.biases or (plan.keeps_tied and path == head)


def _pairs(config: Mapping[str, Any], found: Mapping[str, Slice], arch: Arch, file: Path) -> dict[str, Adapter]:
    """The modules whose pair is stored: the tensors decide, as `target_modules` may name more than was adapted."""
    rslora, dora = bool(config.get("use_rslora", False)), bool(config.get("use_dora", False))
    adapters = {}
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
        adapters[path] = Adapter(rank, float(alpha), rslora=rslora, dora=dora)
    return adapters


def _by_pattern(config: Mapping[str, Any], key: str, patterns_key: str, kind: Any, path: str, file: Path) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module path, else the adapter-wide value (8)."""
    patterns = config.get(patterns_key) or {}
    try:
        pattern = matching(patterns, path)
        name, value = (key, config.get(key, 8)) if pattern is None else (patterns_key, patterns[pattern])
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
    plan: Adaptation,
    arch: Arch,
    base_model: str,
    revision: str | None = None,
    writes: bool = True,
) -> None:
    """Writes the adapter's two files into `folder`: what is trained in float32, every config key spelt out.

    Every process calls it, because the arrays lie on all of them; the one that `writes` does.
    """
    held = [(row, row.saved) for row in rows if row.saved is not None]
    tensors = dict(pair for row, names in held for pair in hub_tensors(row, names, arrays[row.path]))
    if writes:
        _write(folder, tensors, adapter_config(plan, arch, base_model, revision))


def rewrite(folder: Path, adapter: AdapterFiles, arch: Arch, base_model: str, revision: str | None = None) -> None:
    """Writes an opened adapter as `save` would: float32, today's names, every config key spelt out."""
    tensors = {name: np.asarray(part[...], np.float32) for name, part in adapter.tensors.items()}
    _write(folder, tensors, adapter_config(adapter.adaptation, arch, base_model, revision))


def _write(folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / WEIGHTS, {PREFIX + name: value for name, value in tensors.items()})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def hub_tensors(row: Tensor, names: tuple[str, ...], array: jax.Array) -> list[tuple[str, np.ndarray]]:
    """The tensors that a variable holds, called `names`: `(name, contiguous array)`, in the Hub's orientation."""
    values = on_host(array)
    pieces = list(values) if row.stacked else [values] * len(names)
    return [(name, np.ascontiguousarray(piece.T if row.transposed else piece)) for name, piece in zip(names, pieces)]


def base_name(folder: Path) -> str:
    """The base model that an adapter names. Raises UserError where it names none."""
    named = read_json(folder / CONFIG, "a PEFT adapter").get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UserError(f"--model: missing, and {folder / CONFIG} names no base model")
    return named


def base_revision(folder: Path, name: str) -> str | None:
    """The revision of the base model `name` that an adapter belongs to, where it says so."""
    if not (folder / CONFIG).is_file():
        return None
    config = read_json(folder / CONFIG, "a PEFT adapter")
    return config.get("revision") if config.get("base_model_name_or_path") == name else None


def adapter_config(plan: Adaptation, arch: Arch, base_model: str, revision: str | None = None) -> dict[str, Any]:
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
        "bias": plan.bias,
        "fan_in_fan_out": False,
        "modules_to_save": sorted(plan.modules) or None,
        **({"ensure_weight_tying": True} if plan.keeps_tied else {}),  # a key that older versions of PEFT do not know
        "use_rslora": first.rslora,
        "use_dora": first.dora,
        "rank_pattern": {p: a.rank for p, a in plan.adapters.items() if a.rank != first.rank},
        "alpha_pattern": {p: _whole(a.alpha) for p, a in plan.adapters.items() if a.alpha != first.alpha},
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "peft_version": "0.18.0",  # the format's version, not that of an installed package
    }


def target_names(plan: Adaptation, arch: Arch) -> list[str]:
    """Leaf names where they select exactly the adapted modules, whole paths where they would select more."""
    leaves = sorted({path.rpartition(".")[2] for path in plan.adapters})
    return leaves if set(targets(tuple(leaves), arch)) == set(plan.adapters) else sorted(plan.adapters)


def vllm_verdict(plan: Adaptation, arch: Arch) -> str:
    """Whether vLLM can serve the adapter as it stands, or why not (by its PEFTHelper's rules, and its default rank of 16)."""
    pairs = plan.adapters.values()
    ranks = {pair.rank for pair in pairs}
    fitting = next((rank for rank in VLLM_RANKS if rank >= max(ranks)), None)
    obstacles = {
        f"it does not serve {arch.family}": arch.family == "openelm",
        "it refuses modules trained in full (modules_to_save)": bool(plan.modules),
        "it refuses trained biases": bool(plan.biases),
        "it refuses DoRA": any(pair.dora for pair in pairs),
        "it ignores ranks and alphas by module": len({(pair.rank, pair.alpha) for pair in pairs}) > 1,
        f"it serves ranks up to {VLLM_RANKS[-1]}": max(ranks) > VLLM_RANKS[-1],
        f"start it with --max-lora-rank {fitting}": 16 < max(ranks) <= VLLM_RANKS[-1],
    }
    reasons = [reason for reason, found in obstacles.items() if found]
    return f"vLLM-ready: no, {'; '.join(reasons)}" if reasons else "vLLM-ready: yes"


def _whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
