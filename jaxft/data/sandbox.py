"""Chat templates in a process of their own: a template is a program from a model's repository, and nothing in Jinja's sandbox
keeps it from running for ever or from making a string of many gigabytes.

The process has no more than LIMIT_BYTES of memory, CPU_SECONDS for a conversation, an empty environment, and the same
Jinja environment as transformers' own. It runs this file by its path, so it imports nothing but the standard library and Jinja.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

LIMIT_BYTES = 224 << 20  # rows have at most 10 MB; half of what a run takes that prepares the smallest model
OUTPUT_BYTES = 24 << 20
CPU_SECONDS = 10.0
WALL_SECONDS = 120.0


class TemplateFault(Exception):
    """Why a template gave no text."""


class Sandbox:
    """The process, started when first asked and again after it was ended; any thread may ask."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS, wall_seconds: float = WALL_SECONDS):
        self._cpu_seconds, self._wall_seconds = cpu_seconds, wall_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[str, int] = {}
        self._answers: queue.Queue[bytes] = queue.Queue()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """What `template` makes of JSON-ready `variables`. Raises TemplateFault."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            text = None if template in self._known else template
            number = self._known.setdefault(template, len(self._known))
            try:
                answer = json.loads(self._ask(json.dumps([number, text, variables]).encode()))
            except (OSError, ValueError, queue.Empty) as error:
                self.close()
                raise TemplateFault(self._why(error)) from error
        if "fault" in answer:
            raise TemplateFault(answer["fault"])
        return answer["text"]

    def close(self) -> None:
        """Ends the process."""
        process, self._process, self._known = self._process, None, {}
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> None:
        self.close()
        import jinja2
        import markupsafe

        places = {str(Path(module.__file__).parent.parent) for module in (jinja2, markupsafe)}
        arguments = ["-I", "-S", __file__, str(self._cpu_seconds), *places]
        piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen([sys.executable, *arguments], env={}, **piped)
        self._answers = queue.Queue()
        threading.Thread(target=_listen, args=(self._process.stdout, self._answers), daemon=True).start()
        atexit.register(self.close)

    def _ask(self, question: bytes) -> bytes:
        _send(self._process.stdin, question)
        return self._answers.get(timeout=self._wall_seconds)

    def _why(self, error: Exception) -> str:
        if isinstance(error, queue.Empty):
            return f"it has not ended for {self._wall_seconds:.0f} s"
        return f"it took more than {self._cpu_seconds:.0f} s or {LIMIT_BYTES >> 20} MB"


def _send(stream: BinaryIO, content: bytes) -> None:
    stream.write(len(content).to_bytes(8, "little") + content)
    stream.flush()


def _receive(stream: BinaryIO, limit: int) -> bytes:
    """Empty at the end of the stream, and where more than `limit` is announced."""
    length = int.from_bytes(stream.read(8), "little")
    return stream.read(length) if length <= limit else b""


def _listen(stream: BinaryIO, answers: queue.Queue[bytes]) -> None:
    with contextlib.suppress(ValueError):  # closed by the other thread
        while content := _receive(stream, OUTPUT_BYTES):
            answers.put(content)
    answers.put(b"")


def _serve(cpu_seconds: float) -> None:
    """The process: [number, template or None where known, variables] in, {"text"} or {"fault"} out, until the input ends."""
    environment, templates = _environment(), {}
    _limit_memory()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while question := _receive(source, 1 << 40):
        _limit_time(cpu_seconds)
        try:
            number, text, variables = json.loads(question)
            if text is not None:
                templates[number] = environment.from_string(text)
            made = templates[number].render(**variables)
            answer = json.dumps({"text": made}, ensure_ascii=False).encode()
            if len(answer) > OUTPUT_BYTES:
                raise MemoryError
        except MemoryError:
            answer = json.dumps({"fault": f"it takes more than {LIMIT_BYTES >> 20} MB"}).encode()
        except Exception as error:  # a template is a program, and fails like one
            answer = json.dumps({"fault": f"{str(error) or type(error).__name__:.2000}"}).encode()
        _limit_time(0)
        _send(sink, answer)


def _environment() -> Any:
    """As transformers makes it (utils/chat_template_utils.py), without the clock, for which callers have put a date."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, which marks what is an assistant's, as what is in it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(
                line
            )

    class Namespace(jinja2.utils.Namespace):
        """Without names that lead into Python."""

        def __init__(*arguments: Any, **named: Any):
            for name in dict(*arguments[1:], **named):
                _check_name(name)
            jinja2.utils.Namespace.__init__(*arguments, **named)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [Generation, jinja2.ext.loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "namespace": Namespace}
    return environment


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limits, macOS not this one
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(cpu_seconds: float) -> None:
    """The kernel ends this process after so many seconds more of computing; 0 lifts the limit."""
    with contextlib.suppress(ImportError, AttributeError):
        import signal

        signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds)


if __name__ == "__main__":
    sys.path += sys.argv[2:]
    _serve(float(sys.argv[1]))
