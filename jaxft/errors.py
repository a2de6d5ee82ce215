"""What a user can mend, as exceptions, and how a verb ends: one line on stderr and a documented exit code."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator

# What a secret looks like in a message, a setting or a URL: a token of the Hub, of GitHub or of a model service, a password
# before a host; and the value of a key that is called so, which stands behind it.
SECRET = re.compile(r"\b(?:hf_|ghp_|github_pat_|sk-)[A-Za-z0-9_-]{20,}|(?<=://)[^/\s@]+(?=@)")
NAMED = re.compile(
    r"([?&](?:token|key|sig|signature|x-(?:amz|goog)-(?:signature|credential|security-token))="
    r"|\b[\w-]*(?:(?:hf|hub|auth|access|api|wandb|bearer)[_-]token|api[_-]?key|secret(?:[_-]key)?|passw(?:or)?d)['\"]?\s*[:=]\s*['\"]?"
    r"|\bauthorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic)\s+)(?!(?:null|none|true|false|[\d.]+)\b)[^\s'\",&]{4,}",
    re.IGNORECASE,
)
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")

EXIT_USER, EXIT_RESOURCES, EXIT_AGAIN, EXIT_INTERRUPTED = 2, 3, 75, 130


class UserError(Exception):
    """The user's mistake (config, data, weights): says what was seen, what was expected, and the remedy."""


class OutOfResources(Exception):
    """Memory or disk ran out: says what was needed, what was free, and what to reduce."""


class Stopped(BaseException):
    """A signal ended the run in order: says what is saved. `together` where all processes of the run end so, at one step."""

    def __init__(self, said: str, code: int, together: bool = False):
        super().__init__(said)
        self.code, self.together = code, together


def run_verb(main: Callable[[list[str]], int | None]) -> None:
    """Runs `main(argv)` and leaves the process with jaxft's exit codes.

    A `UserError` prints one line and exits 2, `OutOfResources` exits 3, Ctrl-C exits 130, a training run that SIGTERM
    stopped 75. `--debug` anywhere on the command line keeps the traceback. Anything else is a defect and shows its traceback.
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
    except Stopped as stopped:
        print(one_line(stopped), file=sys.stderr)
        code = stopped.code
    except BrokenPipeError:  # `jaxft … | head`: the reader has left, so there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        found = None if debug else ran_out(error)
        if found is None:
            raise
        print(f"error: {one_line(found)}", file=sys.stderr)
        code = EXIT_RESOURCES
    except KeyboardInterrupt:
        print("error: interrupted; a training run resumes with the same command", file=sys.stderr)
        code = EXIT_INTERRUPTED
    try:
        sys.stdout.flush()
    except OSError as error:  # standard output goes to a file on a full disk
        print(f"error: standard output: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or exit_code(error)
    sys.exit(code)


def run_process(main: Callable[[list[str]], int | None]) -> None:
    """`run_verb` where the process is there for nothing else: at the end it leaves at once.

    What is registered at exit runs, but Python does not take its modules apart, which after JAX takes a second or more.
    """
    code = [1]  # of a traceback
    atexit.register(lambda: _leave(code[0]))  # the first to be registered, and so the last to run
    try:
        run_verb(main)
    except SystemExit as ended:
        code[0] = ended.code
        raise


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def exit_code(error: BaseException) -> int:
    """What a process that ends by `error` leaves with."""
    if isinstance(error, Stopped):
        return error.code
    codes = ((UserError, EXIT_USER), (OutOfResources, EXIT_RESOURCES), (KeyboardInterrupt, EXIT_INTERRUPTED))
    code = next((code for kind, code in codes if isinstance(error, kind)), None)
    return code or (EXIT_RESOURCES if ran_out(error) else 1)


def ran_out(error: BaseException) -> OutOfResources | None:
    """What ran out (disk, memory of the host or of a device), where `error` or what caused it says so; else None."""
    if full := disk_full(error):
        return OutOfResources(_disk(*full))
    for cause in _causes(error):
        text = " ".join(str(cause).split())
        if isinstance(cause, MemoryError):
            return OutOfResources(f"the host's memory ran out{f': {text:.200}' if text else ''}; {LESS_HOST_MEMORY}")
        if "RESOURCE_EXHAUSTED" in text and type(cause).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
            return OutOfResources(f"a device's memory ran out: {text:.300}; {LESS_DEVICE_MEMORY}")
    return None


def disk_full(error: BaseException) -> tuple[object, str] | None:
    """The file, where it is known, and the system's words, where `error` or what caused it is a full disk."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in FULL:
            return cause.filename, str(cause.strerror)
        said = next((words for words in FULL_TEXTS if words in str(cause)), None)  # of a library's own type
        if said is not None:
            return None, said
    return None


LESS_HOST_MEMORY = "free some, or lower data.limit or data.max_length"
LESS_DEVICE_MEMORY = (
    "lower optim.batch_size (or raise optim.accumulation_steps), lower data.max_length, set model.remat nested, or spread "
    "the model over more devices (mesh.fsdp)"
)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _disk(file: object, why: object) -> str:
    """A line on a full disk; how much was to be written only a checkpoint or an export knows."""
    place = os.path.abspath(os.fsdecode(file)) if isinstance(file, (str, bytes, os.PathLike)) else os.getcwd()
    while not os.path.isdir(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
    name = f"{os.fsdecode(file)}: " if isinstance(file, (str, bytes, os.PathLike)) else ""
    free = shutil.disk_usage(place).free
    return f"{name}the disk is full ({why}): more needed, {free:,} bytes free; make room, then the same command again"


def redacted(text: str) -> str:
    """The text without what looks like a secret."""
    return NAMED.sub(r"\1***", SECRET.sub("***", text))


def one_line(error: object) -> str:
    """The message without secrets, with line breaks and control characters made visible: data cannot drive the terminal."""
    return visible(" ".join(redacted(str(error)).split()))


def visible(text: str, but: str = "") -> str:
    """The text with its control characters, except those in `but`, spelt out."""
    return "".join(c if c.isprintable() or c in but else repr(c)[1:-1] for c in text)
