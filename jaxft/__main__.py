"""`jaxft VERB …`: the same as `python -m jaxft.VERB …`."""

from __future__ import annotations

import importlib
import sys

from jaxft.errors import UserError, run_process

VERBS = {
    "plan": "compile the training step for a TPU slice, without one",
    "preview": "show a run's rows as they will be trained, without weights",
    "train": "fine-tune a model and export the best adapter",
    "evaluate": "score a base model, or base against tuned, on the same prompts",
    "generate": "continue prompts with a base model or an adapter",
    "export": "write an adapter anew, or merge it into its base",
    "report": "write a run folder's report again, or compare runs",
}


def _dispatch(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: jaxft VERB …   (the same as python -m jaxft.VERB …; --help after a verb shows its options)\n")
        for verb, what in VERBS.items():
            print(f"  {verb:<10}{what}")
        return 0
    if argv[0] not in VERBS:
        raise UserError(f"unknown verb {argv[0]!r}; verbs are {', '.join(VERBS)}")
    return importlib.import_module(f"jaxft.{argv[0]}").main(argv[1:])


def main() -> None:
    """The console script."""
    run_process(_dispatch)


if __name__ == "__main__":
    sys.argv[0] = "jaxft"
    main()
