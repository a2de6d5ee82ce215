"""The model card beside an adapter or a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

TASK = "text-generation"
NOT_TASKS = (
    "These two are teacher-forced: every token is guessed from the right ones before it. They do not say how many answers "
    "come out right when the model writes them itself."
)


def write_card(
    folder: Path, settings: dict[str, Any], results: dict[str, Any], best: Mapping[str, float] | None = None
) -> None:
    """README.md with the front matter that the Hub reads and what the weights were trained on.

    `settings` and `results` are a run folder's config.json and results.json; `best` is the evaluation line of the step whose
    weights these are. The front matter's model-index has what tasks measured by generation, and nothing teacher-forced.
    """
    base, lora = settings["model"]["name"], results["model"]["adapter"]
    title = f"{Path(base).name or base}, fine-tuned"
    scores = {task: sides["tuned"] for task, sides in results.get("tasks", {}).items() if "tuned" in sides}
    data = ModelCardData(
        # Only a Hub id is a link for the Hub; a folder's name means nothing elsewhere.
        base_model=base if base.count("/") == 1 and not base.startswith((".", "/")) else None,
        library_name="peft" if lora else "transformers",
        pipeline_tag=TASK,
        tags=["jaxft", "lora"] if lora else ["jaxft"],
        **(
            {"model_name": title, "eval_results": [_result(settings, *each) for each in scores.items()]}
            if scores
            else {}
        ),
    )
    lines = [*_trained(settings, results), *_teacher_forced(best or {}), *_tasks(settings, results)]
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n" + "\n".join(lines) + "\n")


def _trained(settings: dict[str, Any], results: dict[str, Any]) -> list[str]:
    model, optim, lora = results["model"], settings["optim"], results["model"]["adapter"]
    return [
        f"Trained by [jaxft](https://pypi.org/project/jaxft/) {results['jaxft']} from `{settings['model']['name']}` on "
        f"`{_source(settings['data'])}`: {results['data']['train_rows']:,} rows, {results['data']['trained_tokens']:,} "
        "supervised tokens an epoch.",
        "",
        f"- trainable parameters: {model['trainable']:,} of {model['parameters']:,}",
        "- every weight"
        if lora is None
        else f"- LoRA r={lora['rank']}, α={lora['alpha']:g}, dropout {lora['dropout']:g}",
        f"- AdamW, learning rate {optim['learning_rate']:g}, {optim['schedule']}",
    ]


def _teacher_forced(best: Mapping[str, float]) -> list[str]:
    if "eval_loss" not in best:
        return []
    return [
        "",
        "## Teacher-forced, on validation rows",
        "",
        f"- loss {best['eval_loss']:.4f} nats per supervised token",
        f"- next-token accuracy {100 * best['eval_mean_token_accuracy']:.1f} %",
        "",
        NOT_TASKS,
    ]


def _tasks(settings: dict[str, Any], results: dict[str, Any]) -> list[str]:
    lines = []
    for task, sides in results.get("tasks", {}).items():
        for side, scores in sides.items():
            low, high = scores["exact_match_interval"]
            share = f"{100 * scores['exact_match']:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f})"
            lines.append(f"- {task}, {side}: exact match {share} on {scores['problems']} problems")
    if not lines:
        return []
    source, split = _asked(settings["data"])
    return ["", f"## Tasks, by generation on `{source}`, {split}", "", *lines]


def _result(settings: dict[str, Any], task: str, scores: dict[str, Any]) -> EvalResult:
    data = settings["data"]
    source, split = _asked(data)
    named = not data["files"] and not data["test_files"] and ":" not in data["name"]
    low, high = scores["exact_match_interval"]
    return EvalResult(
        task_type=TASK,
        dataset_type=data["name"] if named else "custom",
        dataset_name=source,
        dataset_config=data["subset"] if named else None,
        dataset_split=split,
        metric_type="exact_match",
        metric_name=f"exact match, {task} in the training template",
        metric_value=round(scores["exact_match"], 4),
        metric_args={"problems": scores["problems"], "interval_95": [round(low, 4), round(high, 4)]},
    )


def _source(data: dict[str, Any]) -> str:
    return ", ".join(Path(file).name for file in data["files"]) or data["name"]


def _asked(data: dict[str, Any]) -> tuple[str, str]:
    """Where a task's problems are from: its source and its split, `validation` where those are rows held out of training."""
    if data["test_files"]:
        return ", ".join(Path(file).name for file in data["test_files"]), "test"
    test = None if data["files"] else data["test_split"]
    return _source(data), test or "validation"
