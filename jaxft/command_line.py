"""Overrides as typed on a command line: known keys only, values of the right type, one line for a mistake."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from typing import Any

from jaxft.config import SECTIONS, Config, Lora
from jaxft.errors import UserError

# Names that users of the Hugging Face stack type first, and where the same thing lives here.
HUGGING_FACE_NAMES = {
    "model_name_or_path": "model.name", "lora_r": "lora.rank", "r": "lora.rank", "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout", "target_modules": "lora.targets", "lora_target_modules": "lora.targets",
    "use_rslora": "lora.rslora", "use_dora": "lora.dora", "modules_to_save": "lora.train_modules",
    "tokenizer_name": "model.tokenizer", "tokenizer_name_or_path": "model.tokenizer",
    "dataset_name": "data.name", "train_file": "data.files", "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length", "cutoff_len": "data.max_length", "lr": "optim.learning_rate",
    "lora_plus_ratio": "optim.loraplus_lr_ratio", "weight_dtype": "model.param_dtype",
    "learning_rate": "optim.learning_rate", "lr_scheduler_type": "optim.schedule", "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup", "max_grad_norm": "optim.clip", "num_train_epochs": "optim.epochs",
    "num_epochs": "optim.epochs", "per_device_train_batch_size": "optim.batch_size",
    "train_batch_size": "optim.batch_size", "gradient_accumulation_steps": "optim.accumulation_steps",
    "eval_steps": "eval.every_steps", "early_stopping_patience": "eval.patience", "output_dir": "run.dir",
    "logging_steps": "run.log_every", "save_total_limit": "run.keep", "torch_dtype": "model.dtype",
    "bf16": "model.dtype", "gradient_checkpointing": "model.remat",
}  # fmt: skip


def split(
    argv: typing.Sequence[str], prog: str, own: typing.Mapping[str, tuple[str, str]]
) -> tuple[str, list[str], dict[str, str]]:
    """The value of --config, the overrides, and the values of the verb's `own` options (name -> its value's name, help).

    An own option whose value's name is empty takes none. Raises UserError; `--help` without --config prints and leaves.
    """
    names = {"config": ("NAME", "a path, or a file of configs/"), **own}
    given: dict[str, str] = {}
    rest: list[str] = []
    arguments, ended = iter(argv), ""
    for argument in arguments:
        name, equals, value = argument[2:].partition("=")
        if argument.startswith("--") and name in names:
            takes = bool(names[name][0])
            given[name] = _own_value(name, value, equals, takes, arguments)
            ended = argument
            continue
        if ended and not argument.startswith("-"):
            raise UserError(
                f"unexpected argument {argument!r} after {ended}; overrides look like --section.field value"
            )
        _check_near(argument, names)
        rest.append(argument)
        ended = ""
    asked = bool({"-h", "--help"} & set(rest))
    if asked and own:
        _print_own(prog, names)
    if asked and "config" not in given:
        about = "--config NAME is a path, or a file of configs/; with it, --help shows that file's values."
        parse(Config, ["--help"], prog=f"{prog} --config NAME", description=about)
    if not given.get("config"):
        raise UserError(f"--config: missing; usage: {prog} --config NAME [--section.field value …]")
    return given.pop("config"), rest, given


def _own_value(name: str, value: str, equals: str, takes: bool, arguments: typing.Iterator[str]) -> str:
    if not takes:
        if equals:
            raise UserError(f"--{name} takes no value")
        return "True"
    value = value if equals else next(arguments, "")
    if not value or (value.startswith("--") and not equals):
        raise UserError(f"--{name}: its value is missing")
    return value


def _check_near(argument: str, names: typing.Iterable[str]) -> None:
    """Raises UserError for an option that is nearly one of the verb's `names`."""
    name = argument[2:].partition("=")[0]
    near = difflib.get_close_matches(name, names, 1, 0.6)
    if argument.startswith("--") and near and name not in HUGGING_FACE_NAMES:
        raise UserError(f"unknown option --{name}; did you mean --{near[0]}?")


def _print_own(prog: str, names: typing.Mapping[str, tuple[str, str]]) -> None:
    print(f"usage: {prog} --config NAME [options] [--section.field value …]\n")
    for name, (value, what) in names.items():
        print(f"  {f'--{name} {value}':<16}{what}")
    print()


def apply(config: Config, overrides: typing.Sequence[str], source: str = "the config") -> Config:
    """`config` with command-line `overrides` (`["--optim.learning_rate", "1e-3"]`); `--lora none` trains every weight."""
    arguments = _normalise(overrides)
    if "--lora" in arguments:
        at = arguments.index("--lora")
        if arguments[at + 1 : at + 2] != ["None"]:
            raise UserError("--lora takes only `none` (train every weight); set its fields as --lora.rank 8")
        config = dataclasses.replace(config, lora=None)
        del arguments[at : at + 2]
    if config.lora is None and any(a.startswith("--lora.") for a in arguments):
        config = dataclasses.replace(config, lora=Lora())
    for section, name in (("lora", "rank_pattern"), ("lora", "alpha_pattern"), ("data", "columns")):
        if f"--{section}.{name}" in arguments:  # replaces the file's; tyro would make keys of what is there
            emptied = dataclasses.replace(getattr(config, section), **{name: {}})
            config = dataclasses.replace(config, **{section: emptied})
    if not arguments:
        return config
    return parse(Config, arguments, default=config, description=f"Values in brackets are those of {source}.")


def parse(
    record: type,
    arguments: list[str],
    default: Any = None,
    prog: str | None = None,
    description: str = "",
    flags: bool = False,
) -> Any:
    """`record` filled from `arguments` by tyro; its complaints become one UserError. `--help` prints and leaves.

    With `flags` a bool field is set by `--field` alone, else by `--field True`.
    """
    import tyro

    complaints = io.StringIO()
    options = (tyro.conf.AvoidSubcommands, *(() if flags else (tyro.conf.FlagConversionOff,)))
    extra = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaints):
            return tyro.cli(record, args=arguments, config=options, prog=prog, description=description, **extra)
    except SystemExit as stop:
        if not stop.code:
            raise
    text = re.sub(r"[^\S ]+|[╭╮╰╯│─]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", complaints.getvalue()))
    noise = r"^\s*(Parsing error|Unrecognized options|Required options)?\s*(Value error|Invalid choice)?\s*"
    text = re.sub(rf"{noise}|Argument helptext:.*$|For full helptext.*$", "", " ".join(text.split()))
    raise UserError(text.strip() or f"cannot read the command line {' '.join(arguments)}")


def _normalise(overrides: typing.Sequence[str]) -> list[str]:
    """Known keys with underscores; `none`, `true` and `false` in Python's spelling where the field takes them."""
    records = ((section, record, typing.get_type_hints(record)) for section, record in SECTIONS.items())
    known = {
        f"{section}.{field.name}": hints[field.name] for section, r, hints in records for field in dataclasses.fields(r)
    }
    arguments, key = [], None
    for token in overrides:
        if token in ("-h", "--help"):
            arguments.append("--help")
        elif token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            key = name.replace("-", "_")
            if key not in known and key != "lora":
                raise UserError(f"unknown key --{name}{did_you_mean(key)}")
            arguments += ["--" + key] + ([_spelling(value, known.get(key))] if equals else [])
        elif key is None:
            raise UserError(f"unexpected argument {token!r}; overrides look like --section.field value")
        else:
            arguments.append(_spelling(token, known.get(key)))
    return arguments


def _spelling(value: str, hint: Any) -> str:
    accepted = typing.get_args(hint) or (hint,)
    if value.lower() == "none" and (hint is None or type(None) in accepted):
        return "None"
    if value.lower() in ("true", "false") and bool in accepted:
        return value.capitalize()
    return value


def did_you_mean(key: str) -> str:
    """The end of a message about an unknown `key`: the nearest known one, or what Hugging Face calls it here."""
    known = [f"{section}.{f.name}" for section, record in SECTIONS.items() for f in dataclasses.fields(record)]
    leaf = key.rpartition(".")[2]
    if leaf in HUGGING_FACE_NAMES:
        return f"; did you mean {HUGGING_FACE_NAMES[leaf]}?"
    leaves = {k.partition(".")[2]: k for k in known}
    near = difflib.get_close_matches(key, known, 1, 0.6) or [
        leaves[n] for n in difflib.get_close_matches(leaf, leaves, 1, 0.6)
    ]
    return f"; did you mean {near[0]}?" if near else f"; sections are {', '.join(SECTIONS)} (--help lists all keys)"
