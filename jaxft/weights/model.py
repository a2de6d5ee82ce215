"""A named model as a whole: folder, architecture, tokenizer folder, adapter and arrays, put together once for all verbs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft import config
from jaxft.errors import UserError
from jaxft.models import decoder, tensors
from jaxft.models.adaptation import Adaptation, plan_of, with_scheme
from jaxft.models.arch import Arch
from jaxft.models.attention import kernel_for
from jaxft.models.families import arch_from_config, published
from jaxft.models.quantize import BLOCK, Scheme
from jaxft.parallel.compilation import return_memory
from jaxft.parallel.mesh import make_mesh
from jaxft.weights import digests, keras, load, peft, shards
from jaxft.weights.hub import local_folder, read_arch, read_json

SCHEMES = ("int8", "nf4", "int4")


@dataclass(frozen=True)
class Source:
    """Where a model comes from, with everything that can be wrong already checked and no weight read."""

    folder: Path
    tokenizer: Path
    arch: Arch
    files: Mapping[str, shards.Slice | keras.Variable] | None  # None: a random start
    adapter: peft.AdapterFiles | None
    dtype: Any  # of frozen weights and activations here
    stored: Any  # of the checkpoint's files
    plan: Adaptation

    @property
    def tokenizer_beside_adapter(self) -> Path:
        """The adapter's folder where it brings a tokenizer, else the base's."""
        folder = None if self.adapter is None else self.adapter.folder
        return folder if folder and (folder / "tokenizer_config.json").is_file() else self.tokenizer

    @property
    def commit(self) -> str | None:
        """The Hub's commit that the folder holds, where it lies in the Hub's cache."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None


@dataclass(frozen=True)
class Loaded:
    """A model on its mesh: what `decoder.join(graphdef, trainable, frozen)` needs, and the table of its tensors.

    In an outline the arrays are `jax.ShapeDtypeStruct`s that carry their sharding.
    """

    graphdef: Any
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    rows: list[tensors.Tensor]
    attention: str  # the kernel's name

    def decoder(self) -> decoder.Decoder:
        """The model as a callable module."""
        return decoder.join(self.graphdef, self.trainable, self.frozen)


def find(model: config.Model, adaptation: config.Lora | str | None = "base") -> Source:
    """Resolves names and reads headers. `adaptation` is the Lora section, None for every weight, or "base" for neither.

    An adapter folder in `model.adapter` brings its own rank, alpha and targets. Raises UserError.
    """
    preset = _open_preset(model)
    folder = preset.folder if preset else local_folder(model.name, _revision(model), weights=model.init == "weights")
    tokenizer = local_folder(model.tokenizer, key="model.tokenizer", weights=False) if model.tokenizer else folder
    arch = read_arch(folder)
    files = None if model.init != "weights" else preset.files if preset else shards.open_folder(folder)
    adapter = _open_adapter(model, arch) if model.adapter else None
    if adapter is not None:
        plan = adapter.plan(adaptation if isinstance(adaptation, config.Lora) else None)
    elif adaptation == "base":
        plan = Adaptation()
    else:
        plan = plan_of(adaptation, arch)
    plan = quantized(plan, model, arch)
    stored = load.stored_dtype(folder, files, arch)
    dtype = jnp.dtype(model.dtype) if model.dtype != "auto" else stored
    rows = tensors.table(decoder.abstract(arch, plan, dtype))
    if files is not None and model.verify:
        if preset:
            raise UserError(
                f"model.verify: {model.name} is a Keras preset, whose SHA-256 is not known; leave model.verify out"
            )
        digests.verify(tensor.file for tensor in files.values())
    if files is not None:
        load.check_base(files, rows, arch, str(folder))
    if adapter is not None:
        with _naming_both(model, arch):
            adapter.check(rows)
    return Source(folder, tokenizer, arch, files, adapter, dtype, stored, plan)


def _open_adapter(model: config.Model, arch: Arch) -> peft.AdapterFiles:
    with _naming_both(model, arch):
        return peft.open_adapter(Path(model.adapter), arch)


@contextlib.contextmanager
def _naming_both(model: config.Model, arch: Arch) -> Iterator[None]:
    """Adds to what does not fit whose adapter it is and what the model is, where the adapter names another base."""
    try:
        yield
    except UserError as error:
        try:
            made_for = peft.base_name(Path(model.adapter))
        except UserError:
            raise error from None
        if made_for == model.name:
            raise
        size = f"{arch.family}, {len(arch.layers)} layers, width {arch.dim}"
        raise UserError(
            f"{error}; the adapter names {made_for!r:.100} as its base, the model is {model.name!r} ({size})"
        ) from error


def sketch(model: config.Model, adaptation: config.Lora | None) -> Source:
    """A source known by its config.json alone, to plan for: no weight is looked for, and the Hub is asked only for a model
    that is neither a folder nor one of the published runs'. Raises UserError."""
    known = None if Path(model.name).is_dir() else published.CONFIGS.get(model.name)
    folder = Path(model.name) if known else local_folder(model.name, model.revision, weights=False)
    arch = arch_from_config(known, model.name) if known else read_arch(folder)
    plan = quantized(plan_of(adaptation, arch), model, arch)
    stored = load.named_dtype(known or read_json(folder / "config.json", "every model"))
    dtype = jnp.dtype(model.dtype) if model.dtype != "auto" else stored
    return Source(folder, folder, arch, None, None, dtype, stored, plan)


def quantized(plan: Adaptation, model: config.Model, arch: Arch) -> Adaptation:
    """`plan` with the base held as `model` asks, what is trained of it included. Raises UserError."""
    plan = replace(plan, param_dtype=model.param_dtype)
    if model.quantize_double and model.quantize != "nf4":
        raise UserError(f"quantize_double: is for nf4 alone, and quantize is {model.quantize}")
    if model.quantize_tables and model.quantize == "none":
        raise UserError("quantize_tables: needs quantize int8, int4 or nf4, which is none")
    if model.quantize == "none":
        return plan
    if model.quantize not in SCHEMES:
        raise UserError(f"quantize: {model.quantize!r} is unknown; schemes are none, {', '.join(SCHEMES)}")
    if model.quantize == "int4" and model.quantize_group not in (32, 64, 128):
        raise UserError(f"quantize_group: {model.quantize_group} is none of 32, 64, 128")
    scheme = Scheme(model.quantize, model.quantize_group, model.quantize_double)
    return with_scheme(plan, scheme, model.quantize_skip, model.quantize_tables, arch)


def held_as(model: config.Model, dtype: Any) -> str:
    """What the base's linear layers are held as, in words; `dtype` is that of what is not quantised, or auto."""
    words = {
        "none": "as stored" if dtype == "auto" else f"{jnp.dtype(dtype)}",
        "int8": "int8 with a scale per output",
        "int4": f"int4 with a scale per {model.quantize_group} inputs",
        "nf4": f"nf4 with a scale per {BLOCK} weights" + (", these in eight bits" if model.quantize_double else ""),
    }
    tables = ", embedding and head in int8" if model.quantize_tables else ""
    skipped = f", but for {', '.join(model.quantize_skip)}" if model.quantize != "none" and model.quantize_skip else ""
    return words[model.quantize] + tables + skipped


def _revision(model: config.Model) -> str | None:
    """The revision asked for, or else the one that the adapter names, where it names this base."""
    return model.revision or (peft.base_revision(Path(model.adapter), model.name) if model.adapter else None)


def _open_preset(model: config.Model) -> keras.Preset | None:
    if not keras.is_preset(model.name):
        return None
    if model.revision:
        raise UserError(
            f"model.revision: {model.revision!r}, but {model.name} is a Keras preset; its version is part of a kaggle:// name"
        )
    return keras.open_preset(model.name)


def outline(source: Source, mesh: Mesh, remat: str = "none", attention: str = "auto") -> Loaded:
    """The model on `mesh` without its arrays, to compile for; `attention` names a kernel, or auto for the platform's."""
    kernel = kernel_for(mesh.devices.flat[0], source.arch, source.dtype, attention)
    options = {"remat": remat, "attention": kernel, "mesh": mesh}
    model = decoder.abstract(source.arch, source.plan, source.dtype, **options)
    graphdef, trainable, _ = decoder.split(model)
    rows = tensors.table(model)
    shapes = {row.path: jax.ShapeDtypeStruct(row.shape, row.dtype, sharding=row.sharding(mesh)) for row in rows}
    return _parted(graphdef, shapes, trainable, rows, kernel)


def materialise(source: Source, mesh: Mesh, outlined: Loaded | None = None, *, seed: int = 0) -> Loaded:
    """Reads (or draws) every array of an outline (of `outline(source, mesh)` where None) onto `mesh`."""
    outlined = outlined or outline(source, mesh)
    rows, adapter = outlined.rows, source.adapter
    of_base = [row for row in rows if adapter is None or row.saved is None]
    if source.files is None:
        arrays = load.random_base(of_base, source.arch, mesh, seed)
    else:
        arrays = load.load_base(source.files, of_base, mesh)
    arrays |= load.fresh_adapter(rows, arrays, mesh, seed) if adapter is None else adapter.read(rows, mesh)
    return_memory()
    return _parted(outlined.graphdef, arrays, outlined.trainable, rows, outlined.attention)


def _parted(
    graphdef: Any, values: Mapping[str, Any], trainable: Mapping[str, Any], rows: list[tensors.Tensor], attention: str
) -> Loaded:
    return Loaded(
        graphdef,
        {path: value for path, value in values.items() if path in trainable},
        {path: value for path, value in values.items() if path not in trainable},
        rows,
        attention,
    )


def load_decoder(
    name: str,
    dtype: str = "float32",
    adapter: str | None = None,
    mesh: Mesh | None = None,
    tokenizer: str | None = None,
    *,
    quantize: str = "none",
    quantize_group: int = 64,
    quantize_double: bool = False,
    quantize_tables: bool = False,
) -> tuple[Any, Path]:
    """A callable decoder, and the folder of its tokenizer: the one named, the adapter's where it brings one, the model's."""
    named = None if adapter is None else str(adapter)
    source = find(
        config.Model(
            name=str(name), tokenizer=tokenizer, dtype=dtype, adapter=named, quantize=quantize,
            quantize_group=quantize_group, quantize_double=quantize_double, quantize_tables=quantize_tables,
        )
    )  # fmt: skip
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    loaded = materialise(source, mesh)
    return loaded.decoder(), source.tokenizer if tokenizer else source.tokenizer_beside_adapter
