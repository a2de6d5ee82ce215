"""The model card beside an adapter or a whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_card(folder: Path, settings: dict[str, Any], results: dict[str, Any], best_loss: float | None) -> None:
    """README.md with the front matter that the Hub reads and what the weights were trained on.

    `settings` and `results` are a run folder's config.json and results.json.
    """
    base, lora, model = settings["model"]["name"], results["model"]["adapter"], results["model"]
    # Only a Hub id is a link for the Hub; a folder's name means nothing elsewhere.
    front = {"base_model": base if base.count("/") == 1 and not base.startswith((".", "/")) else None}
    front |= {"library_name": "peft" if lora else "transformers", "pipeline_tag": "text-generation"}
    tags = "tags:\n- jaxft\n" + ("- lora\n" if lora else "")
    head = "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items() if value)
    data = settings["data"]
    source = ", ".join(Path(f).name for f in data["files"]) or data["name"]
    lines = [
        f"Trained by [jaxft](https://pypi.org/project/jaxft/) {results['jaxft']} from `{base}` on `{source}`: "
        f"{results['data']['train_rows']:,} rows, {results['data']['trained_tokens']:,} supervised tokens an epoch.",
        "",
        f"- trainable parameters: {model['trainable']:,} of {model['parameters']:,}",
        "- every weight"
        if lora is None
        else f"- LoRA r={lora['rank']}, α={lora['alpha']:g}, dropout {lora['dropout']:g}",
        f"- AdamW, learning rate {settings['optim']['learning_rate']:g}, {settings['optim']['schedule']}",
    ]
    if best_loss is not None:
        lines.append(f"- validation loss {best_loss:.4f} per supervised token (teacher-forced)")
    for task, sides in results.get("tasks", {}).items():
        for side, scores in sides.items():
            low, high = scores["exact_match_interval"]
            share = f"{100 * scores['exact_match']:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f})"
            lines.append(f"- {task}, {side}: exact match {share} on {scores['problems']} problems")
    title = Path(base).name or base
    (folder / "README.md").write_text(f"---\n{head}{tags}---\n\n# {title}, fine-tuned\n\n" + "\n".join(lines) + "\n")
