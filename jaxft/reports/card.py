"""The run card, and what the run took: what was trained, on what, how, where, for how long, at what price."""

from __future__ import annotations

from typing import Any

from jaxft.reports.document import Code, Inline
from jaxft.reports.figures import MEDIANS
from jaxft.reports.fitting import number
from jaxft.reports.folder import RunRecord
from jaxft.reports.wording import UNKNOWN, brief, clock, share, usd, whole

Row = tuple[Inline, Inline]
MFU_RULE = (
    "4 FLOPs per linear weight of the layers and real token (6 where every weight is trained); padding, attention, the head "
    "and what is recomputed count as nothing"
)


def rows(run: RunRecord, figures: dict[str, Any]) -> list[Row]:
    """The run card; config and results say the same of a run, and each fact is taken from where it was decided."""
    return [
        ("Model", _model(run, figures["model"])),
        ("Trained", _trained(run, figures["model"])),
        ("Data", _source(run)),
        *_amounts(figures["data"]),
        *_settings(run),
        ("Device", _device(figures["device"])),
        ("Mesh", _facts(figures["mesh"])),
        ("Versions", _facts({"jaxft": figures["jaxft"] or UNKNOWN, **figures["versions"]})),
        ("Started", Code(figures["started"]) if figures["started"] else UNKNOWN),
    ]


def cost(figures: dict[str, Any]) -> list[Row]:
    """Time, tokens and money; without a price the cost is unknown."""
    hours, price = figures["chip_hours"], figures["usd_per_chip_hour"]
    if price is None:
        money = "unknown (no price given)"
    elif hours is None:
        money = "unknown (no wall time or device count)"
    else:
        money = f"{usd(figures['cost_usd'])}, at {usd(price)} per chip-hour"
    return [
        ("Cost", money),
        (
            "Chip-hours",
            UNKNOWN if hours is None else f"{hours:,.4g} (wall time × chips; a device of no known kind is one)",
        ),
        ("Wall time", f"{clock(figures['wall_seconds'])}, with loading, compilation and evaluations"),
        ("In training steps", f"{clock(figures['train_seconds'])}, {share(figures['goodput'])} of the wall time"),
        ("Tokens trained on", f"{whole(figures['tokens'])}, padding not counted"),
        *_rates(figures),
    ]


def _rates(figures: dict[str, Any]) -> list[Row]:
    """Speed, use of the chips and memory; a line per figure that the run logged."""
    rate, per_chip, step, wait, mfu = (figures[f"median_{key}"] for key in MEDIANS)
    mean, device, host = (figures[k] for k in ("tokens_per_second", "peak_device_memory_gib", "peak_host_memory_gib"))
    speed = UNKNOWN if mean is None else f"{mean:,.0f} while in training steps"
    if rate is not None:
        each = "" if per_chip in (None, rate) else f", {per_chip:,.0f} per chip"
        speed += f"; the median log line has {rate:,.0f}{each}"
    found: list[Row] = [("Tokens per second", speed)]
    if step is not None:
        waited = "" if wait is None else f", {share(wait)} of it waiting for data"
        found.append(("Seconds per step", f"{step:,.3g} (median){waited}"))
    if mfu is not None:
        found.append(("MFU", f"{share(mfu)} of the chips' bfloat16 peak (median): {MFU_RULE}"))
    if device is not None:
        found.append(("Peak memory", f"{device:,.2f} GiB, of the fullest device"))
    elif host is not None:
        found.append(("Peak memory", f"{host:,.2f} GiB, of the whole process; its devices do not tell theirs"))
    return found


def _model(run: RunRecord, model: dict[str, Any]) -> Inline:
    name, revision = run.setting("model.name") or model.get("name"), run.setting("model.revision")
    parts = [Code(str(name)) if name else UNKNOWN]
    parts += [", revision ", Code(str(revision))] if revision else []
    facts = f"{whole(model.get('parameters'))} parameters, {brief(model.get('dtype') or UNKNOWN)}"
    return [*parts, f"; family {brief(model.get('family') or UNKNOWN)}, {facts}"]


def _trained(run: RunRecord, model: dict[str, Any]) -> Inline:
    trainable, parameters = number(model.get("trainable")), number(model.get("parameters"))
    of_all = f", {trainable / parameters * 100:.2f} % of the model's" if trainable and parameters else ""
    count = f"; {whole(trainable)} trainable parameters{of_all}"
    if "lora" not in run.config:
        return UNKNOWN + count
    if run.config["lora"] is None:
        return "all weights" + count
    targets, start = run.setting("lora.targets"), run.setting("model.adapter")
    settings = [f"{name} {brief(run.setting(f'lora.{name}'))}" for name in ("rank", "alpha", "dropout")]
    settings += [name for name in ("rslora", "dora") if run.setting(f"lora.{name}") is True]
    targets = ", ".join(map(str, targets)) if isinstance(targets, list) else str(targets)
    begun = ["; started from ", Code(str(start))] if start else []
    return [f"LoRA adapter: {', '.join(settings)}, targets ", Code(targets), *begun, count]


def adapter(run: RunRecord) -> str:
    """What was trained, in a few words."""
    if "lora" not in run.config:
        return UNKNOWN
    if run.config["lora"] is None:
        return "all weights"
    rank, alpha, dropout = (brief(run.setting(f"lora.{name}")) for name in ("rank", "alpha", "dropout"))
    kinds = [name for name in ("rslora", "dora") if run.setting(f"lora.{name}") is True]
    return ", ".join([f"LoRA r {rank}, α {alpha}, dropout {dropout}", *kinds])


def _source(run: RunRecord) -> Inline:
    files = run.setting("data.files")
    if isinstance(files, list) and files:
        name, where = ", ".join(map(str, files)), ""
    else:
        name, subset = run.setting("data.name"), run.setting("data.subset")
        where = (f", subset {brief(subset)}" if subset else "") + f", split {brief(run.setting('data.split'))}"
    form, template = (run.fact(f"data.{key}") or run.setting(f"data.{key}") for key in ("format", "template"))
    return [Code(str(name)) if name else UNKNOWN, f"{where}; format {brief(form)}, template {brief(template)}"]


def _amounts(data: dict[str, Any]) -> list[Row]:
    held = f"{whole(data.get('train_rows'))} for training, {whole(data.get('validation_rows'))} held out"
    lost = f"{whole(data.get('cut'))} cut to the length, {whole(data.get('dropped'))} dropped"
    tokens = f"{whole(data.get('train_tokens'))} in the training rows, {whole(data.get('longest'))} in the longest"
    packed = f"sequences of {whole(data.get('length'))}, {share(data.get('fill'))} filled"
    return [("Rows", f"{held}; {lost}"), ("Tokens", f"{tokens}; {packed}")]


def _settings(run: RunRecord) -> list[Row]:
    def told(**names: str) -> str:
        return ", ".join(f"{words.replace('_', ' ')} {brief(run.setting(key))}" for words, key in names.items())

    optim = told(learning_rate="optim.learning_rate", schedule="optim.schedule", warmup="optim.warmup",
                 weight_decay="optim.weight_decay", beta1="optim.beta1", beta2="optim.beta2",
                 epsilon="optim.epsilon", clip="optim.clip")  # fmt: skip
    batch = told(sequences_per_step="optim.batch_size", micro_batches="optim.accumulation_steps",
                 epochs="optim.epochs", max_steps="optim.max_steps", seed="run.seed")  # fmt: skip
    evaluation = told(every_steps="eval.every_steps", patience="eval.patience", min_delta="eval.min_delta")
    return [("Optimizer", f"AdamW: {optim}"), ("Batch", batch), ("Evaluation", evaluation)]


def _device(device: dict[str, Any]) -> Inline:
    if not device:
        return UNKNOWN
    platform, kind, processes = (device.get(key) for key in ("platform", "kind", "processes"))
    named = [Code(str(platform))] if kind in (None, platform) else [Code(str(platform)), " ", Code(str(kind))]
    return [
        f"{whole(device.get('count'))} × ",
        *named,
        f", in {whole(processes)} process{'' if processes == 1 else 'es'}",
    ]


def _facts(facts: dict[str, Any]) -> Inline:
    return Code(", ".join(f"{name} {brief(value)}" for name, value in facts.items())) if facts else UNKNOWN
