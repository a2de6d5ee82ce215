"""What a run leaves for others: the adapter in PEFT's format, or the whole model in transformers'."""

from __future__ import annotations

import contextlib
from typing import Any

from jaxft import disk
from jaxft.learn.folder import RunFolder
from jaxft.learn.job import Job
from jaxft.learn.metrics import evaluation
from jaxft.learn.progress import tell
from jaxft.weights import merged, peft
from jaxft.weights.card import write_card
from jaxft.weights.model import Loaded


def export(job: Job, loaded: Loaded, folder: RunFolder, best: dict[str, Any]) -> None:
    """The adapter in PEFT's format, or with lora None the whole model in transformers'; all gather, process 0 writes."""
    source, model, writes = job.source, job.config.model, folder.processes.first
    whole = job.config.lora is None
    target, size = folder.path / ("model" if whole else "adapter"), sum(array.nbytes for array in best.values())
    with disk.new_folder(target, size) if writes else contextlib.nullcontext(target) as new:
        if whole:
            config = merged.config_for(source.folder, model.name, source.arch, source.plan, source.stored)
            tensors = merged.trained(loaded.rows, best, source.stored)
            if writes:
                merged.save(new, tensors, config, source.folder, source.tokenizer)
            else:
                merged.gather(tensors)
        else:
            named = model.name, source.commit or model.revision
            peft.save(new, loaded.rows, best, source.plan, source.arch, *named, writes=writes)
        if not writes:
            return
        if not whole:
            merged.copy_files(source.tokenizer, new)
        write_card(new, folder.settings, folder.results, evaluation(folder.path, folder.results["best_step"]))
    note = "" if whole else f" ({peft.vllm_verdict(source.plan, source.arch)})"
    tell(f"{target.name}: {folder.place / target.name}{note}")
