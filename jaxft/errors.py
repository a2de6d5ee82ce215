"""What a user can mend, as exceptions, and how a verb ends: one line on stderr and a documented exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

EXIT_USER, EXIT_RESOURCES, EXIT_AGAIN, EXIT_INTERRUPTED = 2, 3, 75, 130


class UserError(Exception):
    """The user's mistake (config, data, weights): says what was seen, what was expected, and the remedy."""


class OutOfResources(Exception):
    """Memory or disk ran out: says what was needed, what was free, and what to reduce."""


def run_verb(main: Callable[[list[str]], int | None]) -> None:
    """Runs `main(argv)` and leaves the process with jaxft's exit codes.

    A `UserError` prints one line and exits 2, `OutOfResources` exits 3, Ctrl-C exits 130. `--debug` anywhere on the
    command line keeps the traceback. Anything else is a defect and shows its traceback.
    """
    argv = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(argv) != len(sys.argv) - 1
    try:
        code = main(argv) or 0
    except (UserError, OutOfResources) as error:
        if debug:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = exit_code(error)
    except KeyboardInterrupt:
        print("error: interrupted; a training run resumes with the same command", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # `jaxft … | head`: the reader has left, so there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.stdout.flush()
    sys.exit(code)


def exit_code(error: BaseException) -> int:
    """What a process that ends by `error` leaves with."""
    codes = ((UserError, EXIT_USER), (OutOfResources, EXIT_RESOURCES), (KeyboardInterrupt, EXIT_INTERRUPTED))
    return next((code for kind, code in codes if isinstance(error, kind)), 1)


def one_line(error: object) -> str:
    """The message with line breaks and control characters made visible, so that data cannot drive the terminal."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
