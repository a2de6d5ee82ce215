"""`python -m jaxft.evaluate --model NAME --adapter FOLDER --tasks LIST`: base and tuned on the same prompts, with intervals."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxft import command_line
from jaxft.config import Model, Run
from jaxft.errors import UserError, run_verb

if TYPE_CHECKING:
    from jaxft.evals.material import Run as TrainingRun
    from jaxft.evals.measurement import Measurement, Side
    from jaxft.evals.native import Settings, Task
    from jaxft.evals.subject import Subject


@dataclass(frozen=True)
class Options:
    """Measure a model, and with an adapter base against tuned: scores with intervals, paired tests, mistakes, categories."""

    tasks: tuple[str, ...]
    """Names, with commas or spaces between: final_answer (the training template), gsm8k, gsm8k_cot, gsm8k_cot_zeroshot,
    their _refined forms, gsm8k_cot_self_consistency, final_answer_self_consistency; any other is lm-evaluation-harness's."""
    model: str | None = None
    """Hub id, local folder, or builtin:tiny; where None, the base that the adapter names."""
    adapter: str | None = None
    """A PEFT adapter folder, or a run folder."""
    no_base: bool = False
    """With an adapter, measure the tuned model alone."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, where neither adapter nor model brings one."""
    limit: int | None = None
    """First documents of each task; scores on a part are no benchmark figures."""
    num_fewshot: int | None = None
    """Shots, where the task allows another number than its own."""
    batch_size: int = 16
    """Prompts at a time."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Of weights and activations; auto is the run's, or the checkpoint's. Likelihoods are float32."""
    quantize: Literal["none", "int8", "nf4", "int4"] | None = None
    """How the base's linear layers are held; where None, as the adapter's run held them, or else as they are."""
    quantize_group: Literal[32, 64, 128] = 64
    """Inputs that share a scale of int4."""
    quantize_double: bool = False
    """Hold nf4's scales in eight bits too."""
    quantize_tables: bool = False
    """Hold embedding and head in int8 as well."""
    samples: int = 8
    """Answers per problem that vote in self-consistency; the harness's own task draws 64."""
    temperature: float | None = None
    """Of self-consistency; where None, the task's own (0.2)."""
    max_new_tokens: int | None = None
    """Longest answer of a native task, in tokens; where None, 256, with which the harness's tasks are published, and for
    final_answer the run's own."""
    seed: int = 1234
    """Of sampling. Shots are drawn with 1234, as the harness does."""
    chat: bool = False
    """Ask through the tokenizer's chat template, shots as turns."""
    template: str = "auto"
    """Of final_answer, where the adapter's run does not tell: plain, chat, or a Jinja template."""
    data: str | None = None
    """Dataset of native tasks: a Hub name or generated:word_problems. Where None, openai/gsm8k; for final_answer with a run
    folder, the run's own rows."""
    split: str = "test"
    """Split of the dataset that is asked; shots come from train."""
    test_files: tuple[str, ...] = ()
    """Files (JSONL, JSON, CSV, Parquet) to ask instead."""
    shot_files: tuple[str, ...] = ()
    """Files from which shots are drawn instead."""
    train_rows: int = 0
    """So many of the run's training rows are asked too, as final_answer asks: what the run's report needs to decide whether it
    is better on rows that it has seen."""
    train_files: tuple[str, ...] = ()
    """What the adapter was trained on, for the contamination check; where none, the run's own data."""
    include_path: str | None = None
    """Folder with task files of your own for lm-evaluation-harness."""
    task_data: str | None = None
    """Folder with downloads of the harness's data sets under their Hub names, such as allenai/ai2_arc in it, to work without
    a network."""
    out: str | None = None
    """Folder to write, new or empty; where None, one below evaluations/, in the run folder if there is one."""
    compilation_cache: str | None = Run.compilation_cache
    """Folder where compiled programs are kept for the next start; None keeps none."""


def main(argv: list[str]) -> None:
    """Measures, prints the table and the verdicts, and writes results.json and a file of samples per task."""
    about = Options.__doc__ or ""
    options = command_line.parse(Options, argv, prog="python -m jaxft.evaluate", description=about, flags=True)
    _check(options)
    names = list(dict.fromkeys(name for word in options.tasks for name in word.replace(",", " ").split()))
    import jax

    from jaxft.evals import harnessed, material, native, results, table
    from jaxft.evals.subject import BASE, TUNED, open_model
    from jaxft.parallel.compilation import keep_compiled

    run = material.run_of(Path(options.adapter)) if options.adapter else None
    adapter = str(run.adapter) if run else options.adapter
    model = _base(options, adapter, run)
    out = Path(options.out) if options.out else _folder(run, model)
    results.check_new(out)
    own = [native.TASKS[name] for name in names if name in native.TASKS]
    foreign = [name for name in names if name not in native.TASKS]
    if not names:
        raise UserError(f"--tasks: none given; native ones are {', '.join(native.TASKS)}")
    if options.train_rows:
        _check_train_rows(options, names, run)
        own.append(native.SEEN)
    # Rows and tasks before weights: what is missing shows at once.
    rows = _rows(options, own, run)
    native_names = list(native.TASKS)
    tasks = harnessed.loaded(foreign, options.include_path, native_names, options.task_data) if foreign else None
    warnings = harnessed.cautions(tasks, options.num_fewshot) if tasks else {}
    trained = material.trained_questions(run, options.train_files) if options.train_files or run else []
    keep_compiled(options.compilation_cache)
    sides = (BASE,) if not adapter else (TUNED,) if options.no_base else (BASE, TUNED)
    subject = open_model(_opened(options, model, adapter, run), sides)
    writes = jax.process_index() == 0
    if writes:
        named = f"model: {model}, held as {subject.origin['held_as']}" + (f"; adapter {adapter}" if adapter else "")
        print("\n".join([f"{named}; measuring {' and '.join(sides)}", *warnings.values()]), flush=True)
    facts = _facts(options, names, run, {task.name: material.described(rows[task.name]) for task in own})
    measured: list[Measurement] = []
    for more, said in _measured(options, own, rows, tasks, subject, run, writes):
        measured += more
        found = results.content(measured, tuple(trained), subject.origin, said, facts)
        if writes:  # after each task, so that an evaluation that is cut short keeps what it had done
            results.write(out, found, measured)
    if writes:
        print("\n".join(["", *table.lines(found), f"results: {out / 'results.json'}"]))


def _check(options: Options) -> None:
    for name in ("limit", "batch_size", "samples", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UserError(f"--num-fewshot: expected 0 or more, found {options.num_fewshot}")
    if options.train_rows < 0:
        raise UserError(f"--train-rows: expected 0 or more, found {options.train_rows}")
    if options.quantize_double and options.quantize != "nf4":
        raise UserError("--quantize-double: is for --quantize nf4 alone, which was not given")
    if options.quantize_tables and options.quantize in (None, "none"):
        raise UserError("--quantize-tables: needs --quantize int8, int4 or nf4, which was not given")
    if options.no_base and not options.adapter:
        raise UserError("--no-base: there is no adapter; a base model alone needs no such flag")


def _check_train_rows(options: Options, names: list[str], run: TrainingRun | None) -> None:
    from jaxft.evals.native import TRAINING

    if run is None:
        raise UserError("--train-rows: which rows were trained on, a run folder tells; give one as --adapter")
    if TRAINING not in names or options.data or options.test_files:
        raise UserError(
            f"--train-rows: compares with {TRAINING} on the run's own held-out rows; add it to --tasks, and leave --data and "
            "--test-files out"
        )


def _base(options: Options, adapter: str | None, run: TrainingRun | None) -> str:
    if options.model:
        return options.model
    if adapter is None:
        raise UserError("--model: missing; give a Hub id, a local folder or builtin:tiny")
    from jaxft.weights.peft import base_name

    return (run and run.model.name) or base_name(Path(adapter))


def _opened(options: Options, model: str, adapter: str | None, run: TrainingRun | None) -> Model:
    """What is opened: as the options say and, where they are silent, as the run did."""
    own = run.model if run else Model()
    held = own if options.quantize is None else options
    return Model(
        name=model,
        adapter=adapter,
        tokenizer=options.tokenizer or (None if options.model else own.tokenizer),
        dtype=own.dtype if options.dtype == "auto" else options.dtype,
        quantize=held.quantize,
        quantize_group=held.quantize_group,
        quantize_double=held.quantize_double,
        quantize_tables=held.quantize_tables,
        quantize_skip=own.quantize_skip if held is own else (),
    )


def _folder(run: TrainingRun | None, model: str) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    if run is not None:
        return run.folder / "evaluations" / stamp
    return Path("evaluations") / f"{Path(model.replace(':', '_')).name}-{stamp}"


def _rows(options: Options, own: list[Task], run: TrainingRun | None) -> dict[str, Any]:
    """Task -> its rows and its pool; each source is read once."""
    from jaxft.evals import material, native

    given = options.data or options.test_files
    found: dict[bool, material.Material] = {}
    rows = {}
    for task in own:
        of_run = run is not None and task.in_training_template and not given
        if of_run not in found:
            found[of_run] = (
                material.of_run(run)
                if of_run
                else material.of_options(options.data, options.split, options.test_files, options.shot_files)
            )
        held = found[of_run]
        if task.seen:
            held = material.seen(run, held, options.train_rows)
        asked = held.asked if task.seen else held.asked[: options.limit]
        native.check_rows(asked, f"{task.name}: {held.source}")
        needed = 0 if task.in_training_template or task.protocol.exemplars else task.protocol.shots
        needed = options.num_fewshot if needed and options.num_fewshot is not None else needed
        if needed > len(held.pool):
            raise UserError(
                f"{task.name}: {needed} shots are drawn from {len(held.pool)} rows; give --shot-files or --num-fewshot"
            )
        rows[task.name] = material.Material(asked, held.pool, held.source)
    return rows


def _measured(
    options: Options,
    own: list[Task],
    rows: dict[str, Any],
    tasks: dict[str, Any] | None,
    subject: Subject,
    run: TrainingRun | None,
    writes: bool,
) -> Iterator[tuple[list[Measurement], dict[str, Any]]]:
    """Each native task's measurement, then those of the harness's tasks with what it says of them."""
    from jaxft.evals import harnessed, native

    def told(task: str) -> Any:
        def tell(side: str, found: Side) -> None:
            if writes:
                print(f"{task}: {side} answered {len(found.answers):,} documents in {found.seconds:.0f} s", flush=True)

        return tell

    settings = _settings(options, subject, run) if own else None
    for task in own:
        held = rows[task.name]
        yield [native.measure(task, subject, held.asked, held.pool, settings, told(task.name))], {}
    if tasks is not None:
        yield harnessed.measure(
            tasks, subject, limit=options.limit, shots=options.num_fewshot, batch_size=options.batch_size,
            seed=options.seed, chat=options.chat, told=told("lm-evaluation-harness"),
        )  # fmt: skip


def _settings(options: Options, subject: Subject, run: TrainingRun | None) -> Settings:
    from jaxft.data.chat import choose_template
    from jaxft.evals.native import Settings
    from jaxft.evals.protocols import MAX_NEW_TOKENS

    template = run.data.template if run and options.template == "auto" else options.template
    return Settings(
        template=choose_template(template, subject.tokenizer),
        shots=options.num_fewshot,
        samples=options.samples,
        temperature=options.temperature,
        seed=options.seed,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens or MAX_NEW_TOKENS,
        in_training_template=options.max_new_tokens or (run.max_new_tokens if run else MAX_NEW_TOKENS),
        chat=options.chat,
    )


def _facts(options: Options, names: list[str], run: TrainingRun | None, rows: dict[str, Any]) -> dict[str, Any]:
    import jax

    from jaxft.evals import results

    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": asdict(options) | {"tasks": names},
        "software": results.software(),
        "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
        "seeds": {"sampling": options.seed, "shots": 1234, "bootstrap": 0},
        "run": None if run is None else str(run.folder),
        "rows": rows,
    }


if __name__ == "__main__":
    run_verb(main)
