"""Config records, config files in Python, and their command-line overrides.

A config file is a short Python program that binds `config = Config(...)`. It is the user's own program and is run as
such. Every field can be overridden as `--section.field value`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import runpy
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxft.errors import UserError


@dataclass(frozen=True)
class Model:
    """The base model and how it computes."""

    name: str = ""
    """Hub id (meta-llama/Llama-3.2-1B), local folder, or builtin:tiny."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    tokenizer: str | None = None
    """Hub id or local folder of the tokenizer; where None, the model's own (OpenELM brings none)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen weights and the activations; auto keeps the checkpoint's own."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights that lora None trains. bfloat16 halves them and their gradients; updates are added with stochastic
    rounding, because rounding to the nearest would lose the small ones."""
    adapter: str | None = None
    """A PEFT adapter folder to start from; what it adapts, its ranks and its alphas replace those of `lora`."""
    init: Literal["weights", "random"] = "weights"
    """random starts from run.seed and reads only config.json and the tokenizer (pretraining, with lora None)."""
    remat: Literal["auto", "none", "dots", "qkv", "full", "nested"] = "auto"
    """Activations kept for the backward pass: none recomputes nothing, dots keeps every matmul's output, qkv the attention's,
    full only layer inputs, nested those of groups of layers (of 42, 7 groups of 6) for another forward pass; seven layers and
    fewer, but for six, are in no groups. auto takes the first of dots, qkv, full and nested that the compiler fits into the
    device; dots on a CPU."""
    attention: Literal["auto", "dense", "blocked", "splash", "cudnn", "tokamax"] = "auto"
    """Attention kernel; auto is blocked on a CPU, splash on a TPU, and on a GPU in bfloat16 cudnn, or tokamax where
    scores are capped and it is installed; dense (plain XLA) where these cannot compute the model."""
    quantize: Literal["none", "int8", "nf4", "int4"] = "none"
    """How the linear layers' frozen weights are held: int8 with a scale per output, int4 with a scale per group of inputs, nf4
    as QLoRA. Norms stay as they are, embedding and head too unless quantize_tables says otherwise."""
    quantize_group: Literal[32, 64, 128] = 64
    """Inputs that share a scale of int4."""
    quantize_double: bool = False
    """Hold nf4's scales in eight bits too."""
    quantize_tables: bool = False
    """Hold embedding and head in int8 as well, with a scale per row."""
    quantize_skip: tuple[str, ...] = ()
    """Linear modules that stay as they are, such as down_proj or a whole path."""
    verify: bool = False
    """Read the weights once more before, and compare their SHA-256 with the Hub's, which its cache knows."""


@dataclass(frozen=True)
class Lora:
    """The adapter; `lora=None` trains every weight instead."""

    rank: int = 8
    """Rank of each pair."""
    alpha: float = 16.0
    """The pair's product is scaled by alpha / rank."""
    dropout: float = 0.1
    """Probability of zeroing an element of the adapter's input, in training only."""
    dropout_masks: Literal["shared", "separate"] = "shared"
    """Of modules that read the same input (q, k, v; gate, up): one mask, or one each, as PEFT draws them, for more time."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Biases of the base trained too: those of the adapted modules (lora_only), or all."""
    targets: str | tuple[str, ...] = "all-linear"
    """all-linear (every linear layer but the head), module names, or one regular expression over module paths."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of some modules: {"v_proj": 4}; names or regular expressions over the end of a module path, the first wins."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas of some modules, likewise."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    dora: bool = False
    """DoRA: train the length of each output's weights beside their direction."""
    train_modules: tuple[str, ...] = ()
    """Modules trained in full beside the adapter, such as lm_head and embed_tokens."""


@dataclass(frozen=True)
class Data:
    """The rows, how they become tokens, and how they are split."""

    name: str | None = None
    """Hub dataset, or generated:word_problems and generated:corpus. Ignored where files are given."""
    files: tuple[str, ...] = ()
    """Local JSONL, JSON, CSV or Parquet files."""
    subset: str | None = None
    """Configuration of a Hub dataset (gsm8k has main and socratic); where None, its only one."""
    split: str = "train"
    """Split of `name` to train on."""
    validation_split: str | None = None
    """Split of `name` to validate on, instead of validation_fraction."""
    validation_files: tuple[str, ...] = ()
    """Files to validate on, instead of validation_fraction."""
    test_split: str | None = None
    """Split of `name` for eval.tasks; where None (and no test_files), the validation rows serve."""
    test_files: tuple[str, ...] = ()
    """Files for eval.tasks."""
    format: Literal["auto", "gsm8k", "alpaca", "messages", "sharegpt", "prompt_completion", "text"] = "auto"
    """Form of a row; auto decides by its fields and says so."""
    columns: dict[str, str] = field(default_factory=dict)
    """What the format's fields are called in the rows: {"question": "problem", "answer": "solution"}."""
    calculator: Literal["keep", "strip"] = "keep"
    """What to do with GSM8K's <<48/2=24>> annotations in answers."""
    template: str = "auto"
    """plain, chat (the tokenizer's chat template), auto (chat where the tokenizer has one), or a Jinja template of your
    own: its text, or a .jinja file."""
    train_on: Literal["all", "last"] = "all"
    """Assistant turns of a conversation that are trained."""
    max_length: int = 1024
    """Tokens per sequence; also the packed length."""
    packing: bool = True
    """Put several rows into one sequence, each attending only to itself."""
    shuffle: bool = True
    """A new order each epoch, from run.seed."""
    validation_fraction: float = 0.1
    """Share of the rows held out; exact duplicates stay on one side."""
    limit: int | None = None
    """Use only the first rows."""
    on_long_row: Literal["cut", "drop"] = "cut"
    """A row beyond max_length is cut at its end, or left out; counted either way."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """skip leaves out rows that cannot be read, counts them, and stops above 1 %."""
    cache: str | None = "~/.cache/jaxft"
    """Folder for tokenised rows, found again by fingerprint; None keeps none."""


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule."""

    learning_rate: float = 2e-4
    """Peak."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """After warm-up: constant, or down to zero at the last step."""
    warmup: float = 0.0
    """Steps, or a fraction of all steps where below 1."""
    weight_decay: float = 0.0
    """Decoupled; matrices only."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    clip: float | None = 1.0
    """Largest global norm of the gradient; None is off."""
    loraplus_lr_ratio: float = 1.0
    """LoRA+: B of each pair, and biases and magnitudes trained beside it, learn at so many times the learning rate."""
    stop_after_nonfinite: int = 3
    """Stop after so many steps in a row whose loss or gradient is not finite; such a step changes nothing."""
    epochs: float = 3.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Stop after this many steps, whatever epochs says."""
    batch_size: int = 8
    """Sequences per step, over all chips and micro-batches."""
    accumulation_steps: int = 1
    """Micro-batches that a step is split into."""

    @property
    def micro_batch_size(self) -> int:
        """Sequences per micro-batch, over all chips."""
        return self.batch_size // self.accumulation_steps


@dataclass(frozen=True)
class Mesh:
    """Devices of a slice along each axis; -1 takes what the others leave."""

    data: int = 1
    """Copies of the model in a slice, each with its own rows."""
    fsdp: int = -1
    """Devices that share one copy's weights and split its rows."""
    tensor: int = 1
    """Devices that split each layer's heads and FFN."""
    slices: int = -1
    """TPU slices joined over the data-centre network, each with copies of its own; -1: all there are."""
    coordinator: str | None = None
    """host:port of process 0, where the environment does not tell."""
    num_processes: int | None = None
    """Processes in the run, where the environment does not tell."""
    process_id: int | None = None
    """This process, where the environment does not tell."""


@dataclass(frozen=True)
class Eval:
    """Measurements during and after training."""

    every_steps: int = 50
    """Steps between evaluations of loss and token accuracy; there is one at step 0 and one at the end."""
    patience: int | None = 5
    """Stop after this many evaluations without a better loss; None is off."""
    min_delta: float = 0.0
    """What the loss must fall by to count as better."""
    tasks: tuple[str, ...] = ()
    """Measured by generation on base and best adapter: final_answer."""
    limit: int | None = None
    """Rows per task."""
    max_new_tokens: int = 256
    """Longest answer that a task generates."""
    probe_rows: int = 256
    """Training rows, a fixed sample, whose loss is measured at every evaluation as that of the held-out rows is, at most as
    many as these; 0 measures none."""
    samples: int = 3
    """Held-out rows whose generated answers are shown at each evaluation."""


@dataclass(frozen=True)
class Run:
    """Where a run lives."""

    dir: str | None = None
    """Run folder; runs/<config file's name> where None. The same command in the same folder resumes."""
    seed: int = 0
    """Of initialisation, dropout, data order and split."""
    log_every: int = 10
    """Steps between log lines."""
    allow_change: tuple[str, ...] = ()
    """Settings that a run in the folder may go on with otherwise, though they would be refused: data.max_length, say."""
    keep: int = 2
    """Newest checkpoints kept, beside the best."""
    usd_per_chip_hour: float | None = None
    """Price, for the report's cost."""
    profile: tuple[int, ...] | None = None
    """First and last step, both included, of a jax.profiler trace in the run folder's tensorboard/; TensorBoard shows
    it with its profile plugin (pip install xprof)."""
    wandb: str | None = None
    """Project on Weights & Biases to log to as well, through its own package (pip install 'jaxft[wandb]'); None is off."""
    compilation_cache: str | None = "~/.cache/jaxft/xla"
    """Folder where compiled programs are kept for the next start; None keeps none."""


@dataclass(frozen=True)
class Config:
    """One fine-tuning run."""

    model: Model = field(default_factory=Model)
    lora: Lora | None = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    mesh: Mesh = field(default_factory=Mesh)
    eval: Eval = field(default_factory=Eval)
    run: Run = field(default_factory=Run)


SECTIONS = {"model": Model, "lora": Lora, "data": Data, "optim": Optim, "mesh": Mesh, "eval": Eval, "run": Run}


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Runs the config file at `path` (or of that name in `configs/`) and applies `overrides` as typed on a command line.

    Raises UserError for a missing file, a file that fails or binds no `config`, unknown keys (with the nearest known
    name) and values of the wrong type or range.
    """
    from jaxft.command_line import apply  # which needs the records above

    file = find(path)
    config = apply(_run_file(file), overrides, source=str(path))
    if config.run.dir is None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=f"runs/{file.stem}"))
    validate(config)
    return config


def find(path: str | Path) -> Path:
    """The config file: `path` itself, or a file of that name in the `configs/` folder here or beside the package."""
    package = Path(__file__).resolve().parent
    name = Path(path)
    names = [name] if name.suffix == ".py" else [name, name.with_name(name.name + ".py")]
    folders = [Path(), Path("configs"), package.parent / "configs", package / "configs"]
    for candidate in (folder / n for folder in folders for n in names):
        if candidate.is_file():
            return candidate
    known = sorted({p.name for folder in folders[1:] for p in folder.glob("*.py")})
    raise UserError(f"--config {path}: no such file here or in configs/; configs/ has {', '.join(known) or 'none'}")


def _run_file(file: Path) -> Config:
    try:
        bound = runpy.run_path(str(file))
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{file}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        raise UserError(f"{file}:{_line_in(file, error)}: {_explain(error)}") from error
    config = bound.get("config")
    if not isinstance(config, Config):
        raise UserError(f"{file}: must bind `config = Config(...)`, found {type(config).__name__}")
    return config


def _line_in(file: Path, error: BaseException) -> int:
    lines, frame = [0], error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == str(file):
            lines.append(frame.tb_lineno)
        frame = frame.tb_next
    return lines[-1]


def _explain(error: Exception) -> str:
    from jaxft.command_line import did_you_mean

    wrong = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if wrong and (wrong[1] == "Config" or wrong[1].lower() in SECTIONS):
        record = Config if wrong[1] == "Config" else SECTIONS[wrong[1].lower()]
        section = "" if record is Config else f"{wrong[1].lower()}."
        return f"unknown key {section}{wrong[2]}{did_you_mean(section + wrong[2])}"
    return f"{type(error).__name__}: {error}"


def validate(config: Config) -> None:
    """Raises UserError naming the first key whose value has the wrong type or range."""
    for section, record in SECTIONS.items():
        values = getattr(config, section)
        if values is None and section == "lora":
            continue
        if not isinstance(values, record):
            raise UserError(f"{section}: expected {record.__name__}(...), found {values!r}")
        for name, hint in typing.get_type_hints(record).items():
            value = getattr(values, name)
            if not _fits(value, hint):
                raise UserError(f"{section}.{name}: expected {_say(hint)}, found {value!r}")
    for key, low, high in _RANGES:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name, None)
        if value is not None and not low <= value <= high:
            raise UserError(f"{key}: {value!r} is outside {low:g} to {high:g}")
    _validate_together(config)


_RANGES = (
    ("lora.rank", 1, 65536), ("lora.alpha", 1e-9, 1e9), ("lora.dropout", 0, 0.999), ("data.max_length", 2, 1 << 24),
    ("data.validation_fraction", 0, 0.9), ("data.limit", 1, math.inf), ("optim.learning_rate", 0, 1e3),
    ("optim.loraplus_lr_ratio", 1e-9, 1e9),
    ("optim.warmup", 0, math.inf), ("optim.weight_decay", 0, 1e3), ("optim.beta1", 0, 0.999999),
    ("optim.beta2", 0, 0.9999999), ("optim.epsilon", 0, 1), ("optim.clip", 1e-12, math.inf), ("optim.epochs", 1e-9, 1e9),
    ("optim.max_steps", 1, math.inf), ("optim.batch_size", 1, math.inf), ("optim.accumulation_steps", 1, math.inf),
    ("eval.every_steps", 1, math.inf), ("eval.patience", 1, math.inf), ("eval.min_delta", 0, math.inf),
    ("eval.limit", 1, math.inf), ("eval.max_new_tokens", 1, math.inf), ("eval.samples", 0, math.inf),
    ("eval.probe_rows", 0, math.inf),
    ("optim.stop_after_nonfinite", 1, math.inf), ("run.log_every", 1, math.inf), ("run.keep", 1, math.inf),
    ("run.usd_per_chip_hour", 0, math.inf),
    ("run.seed", 0, 2**32 - 1),
)  # fmt: skip


def _validate_together(config: Config) -> None:
    optim, model, lora = config.optim, config.model, config.lora
    if not model.name:
        raise UserError("model.name: empty; give a Hub id, a local folder, or builtin:tiny")
    if not (config.data.name or config.data.files):
        raise UserError("data.name and data.files: both empty; give a dataset's name or files")
    if optim.batch_size % optim.accumulation_steps:
        raise UserError(
            f"optim.accumulation_steps: {optim.accumulation_steps} does not divide optim.batch_size "
            f"{optim.batch_size}; batch_size counts the sequences of all micro-batches"
        )
    for key in config.run.allow_change:
        section, _, name = key.partition(".")
        if name not in (f.name for f in dataclasses.fields(SECTIONS.get(section, Config))):
            from jaxft.command_line import did_you_mean

            raise UserError(f"run.allow_change: unknown key {key}{did_you_mean(key)}")
    if model.quantize != "none" and lora is None:
        raise UserError(
            f"model.quantize: {model.quantize} weights are frozen, and lora None trains every weight; take one"
        )
    if model.param_dtype != "float32" and lora is not None:
        raise UserError(
            f"model.param_dtype: {model.param_dtype} is for lora None; an adapter, and what is trained beside it, stays float32"
        )
    if optim.loraplus_lr_ratio != 1 and lora is None:
        raise UserError("optim.loraplus_lr_ratio: is B's of a pair, and with lora None there is none; leave it at 1")
    if model.quantize_tables and model.quantize == "none":
        raise UserError("model.quantize_tables: needs model.quantize, which is none")
    if model.quantize_double and model.quantize != "nf4":
        raise UserError(f"model.quantize_double: is for nf4 alone, and model.quantize is {model.quantize}")
    for key, low, high in (("rank_pattern", 1, 65536), ("alpha_pattern", 1e-9, 1e9)) if lora else ():
        for pattern, value in getattr(lora, key).items():
            if not low <= value <= high:
                raise UserError(f"lora.{key}: {pattern!r}: {value!r} is outside {low:g} to {high:g}")
    if lora is None and model.adapter:
        raise UserError("model.adapter: an adapter cannot be continued with lora None; give a lora section")
    traced = config.run.profile
    if traced is not None and not (len(traced) == 2 and 1 <= traced[0] <= traced[1]):
        raise UserError(f"run.profile: expected two steps, first and last, counted from 1; found {traced!r}")
    _validate_processes(config.mesh)


def _validate_processes(mesh: Mesh) -> None:
    values = {name: getattr(mesh, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == len(values):
        return
    if missing:
        raise UserError(
            f"mesh.{missing[0]}: missing; coordinator, num_processes and process_id are given together, or none of them "
            "where the environment tells"
        )
    host, _, port = str(mesh.coordinator).rpartition(":")
    if not re.fullmatch(r"\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+", host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"mesh.coordinator: expected host:port of process 0, found {mesh.coordinator!r}")
    if not 0 <= int(mesh.process_id or 0) < int(mesh.num_processes or 0):
        raise UserError(
            f"mesh.process_id: {mesh.process_id} of mesh.num_processes {mesh.num_processes}; they are counted from 0"
        )


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(_fits(v, arguments[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items()
        )
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _say(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_say, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a tuple of {_say(arguments[0])}"
    if origin is dict:
        return f"a dict from {_say(arguments[0])} to {_say(arguments[1])}"
    return {type(None): "None", float: "a finite number"}.get(hint) or hint.__name__


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON-ready data, as written to a run folder's config.json."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def fingerprint(*parts: Any) -> str:
    """Sixteen hex digits that change when any JSON-ready part does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
