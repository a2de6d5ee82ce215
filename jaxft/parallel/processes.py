"""A run of several processes: started together, agreeing on what one of them decides, and ending together.

JAX's own coordination service starts with the devices. Beside it stands a connection from each process to process 0,
over which a death is seen at once and told to all by name; JAX alone takes 100 seconds, or ends with a page of C++.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import queue
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from jaxft import config
from jaxft.errors import EXIT_AGAIN, OutOfResources, Stopped, UserError, exit_code, one_line, ran_out
from jaxft.parallel.meeting import Peer, Place, Told, find_place, meet, readable
from jaxft.parallel.relay import Relay

T = TypeVar("T")

START_SECONDS = 300.0  # that a process waits for the others
SAY_SECONDS = 10.0  # after which it says so
BEAT_SECONDS = 2.0
SILENCE_SECONDS = 24.0  # without a beat in a training step; stopped, or the machine is out of reach
SILENCE_OTHERWISE_SECONDS = 240.0  # tokenising and the like may hold Python's lock, and with it the beats
PAUSE_SECONDS = 5.0  # without a turn here: this process stood still itself, and cannot tell who else did
GRACE_SECONDS = 10.0  # for this process to end by itself, once another has ended
# Settings in which processes of one run may differ.
OWN = ("mesh.coordinator", "mesh.process_id", "data.cache", "run.dir", "run.compilation_cache")
AGAIN = "run the same command again to resume from the newest checkpoint"
# JAX's own watch must not be quicker: it names nobody.
JAX_HEARTBEAT_SECONDS = 3600


@dataclass
class _Seen:
    """When a peer was last heard, and how long it said that it may be silent."""

    at: float = field(default_factory=time.monotonic)
    silence: float = SILENCE_OTHERWISE_SECONDS
    left: bool = False


class Processes:
    """This process among those of a run; `ALONE` where there is but one. Values that are agreed on are JSON-ready."""

    def __init__(self, index: int = 0, count: int = 1, peers: Mapping[int, Peer] | None = None):
        self.index, self.count, self._peers = index, count, dict(peers or {})
        self.phase, self._stepping = "starting", False
        self.asked: int | None = None  # on process 0: the exit code with which another one wants all to stop
        self._seen = {peer: _Seen() for peer in self._peers}
        self._gone, self._leaving, self._failed = threading.Event(), threading.Event(), threading.Event()
        self._shared: queue.Queue[Any] = queue.Queue()
        self._arrived: queue.Queue[int] = queue.Queue()
        for work in (self._beat, self._listen) if self._peers else ():
            threading.Thread(target=work, name="peers", daemon=True).start()

    @property
    def first(self) -> bool:
        """Whether this is the one process that writes and prints."""
        return self.index == 0

    def named(self, error: object) -> str:
        """A message with this process before it, where there are several."""
        return f"process {self.index} of {self.count}: {error}" if self.count > 1 else str(error)

    def doing(self, phase: str, stepping: bool = False) -> None:
        """What is said of this process when another ends; a training step is `stepping`, and may be silent less long."""
        changed, self.phase, self._stepping = stepping != self._stepping, phase, stepping
        if changed:
            self._tell(self._beats())

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on process 0, on every process; it is called there alone. All call this in the same order."""
        if self.count == 1:
            return make()
        if self.first:
            made = make()
            self._tell({"share": made})
            return made
        return self._shared.get()

    def same(self, what: str, value: Any) -> None:
        """Raises UserError on a process where `value` is not that of process 0."""
        value = json.loads(json.dumps(value))
        if self.from_first(lambda: value) != value:
            raise UserError(f"{what} here {'is' if value else 'is missing and is'} not what process 0 has")

    def barrier(self) -> None:
        """Returns once all have come here."""
        if self.count > 1 and not self.first:
            self._tell({"here": self.index})
        for _ in range(self.count - 1 if self.first else 0):
            self._arrived.get()
        self.from_first(lambda: None)

    def ask(self, code: int) -> None:
        """Asks process 0 to have all of them stop at one step, and to leave with this exit code."""
        if not self.first:
            self._tell({"stop": code})

    def end(self, code: int, why: object, stacks: bool = False) -> None:
        """Tells the others that this process ends before the run does, with what exit code and why."""
        self._leaving.set()
        self._tell({"end": code, "why": one_line(why), "stacks": stacks, "index": self.index})

    def leave(self) -> None:
        """Leaves a run that is done, with all the others."""
        self._leaving.set()
        self._tell({"left": self.index})

    def hear_out(self) -> None:
        """Returns where no other process has ended; a collective fails when one does, and then the reason is said for it."""
        self._failed.set()
        if self._gone.wait(GRACE_SECONDS):
            time.sleep(GRACE_SECONDS)  # the process ends meanwhile

    def _tell(self, message: Mapping[str, Any], but: int | None = None) -> None:
        for peer in self._peers.values():
            if peer.index != but:
                peer.wire.send(message)

    def _beats(self) -> dict[str, Any]:
        return {"silence": SILENCE_SECONDS if self._stepping else SILENCE_OTHERWISE_SECONDS}

    def _beat(self) -> None:
        while not self._gone.is_set():
            self._tell(self._beats())
            self._gone.wait(BEAT_SECONDS)

    def _listen(self) -> None:
        """Hears the others out until one ends, or all have left."""
        turn = time.monotonic()
        while open_to := [peer for peer in self._peers.values() if not self._seen[peer.index].left]:
            wires = [peer.wire for peer in open_to]
            ready = [wire for wire in wires if wire.kept] or readable(wires, 1.0)
            if time.monotonic() - turn > PAUSE_SECONDS:
                for seen in self._seen.values():
                    seen.at = time.monotonic()
            turn = time.monotonic()
            for peer in open_to:
                seen = self._seen[peer.index]
                if peer.wire in ready:
                    self._hear(peer, seen)
                elif not self._leaving.is_set() and time.monotonic() - seen.at > seen.silence:
                    self._end_with(f"{peer} has not answered for {seen.silence:.0f} s", EXIT_AGAIN, peer.index)

    def _hear(self, peer: Peer, seen: _Seen) -> None:
        said = peer.wire.read()
        if said is None:
            seen.left = True
            if not self._leaving.is_set():
                self._end_with(f"{peer} died", EXIT_AGAIN, peer.index)
        for message in said or ():
            seen.at = time.monotonic()
            seen.silence = float(message.get("silence", seen.silence))
            seen.left = seen.left or "left" in message
            if "share" in message:
                self._shared.put(message["share"])
            elif "stop" in message:
                self.asked = message["stop"]
            elif "here" in message:
                self._arrived.put(message["here"])
            elif "lost" in message:
                self._end_with(message["lost"], message["code"], None, message.get("stacks", False))
            elif "end" in message:
                said = f"{peer} ended: {message['why']}"
                self._end_with(said, message["end"], peer.index, message["stacks"])

    def _end_with(self, what: str, code: int, index: int | None, stacks: bool = False) -> None:
        """Ends this process because another has; process 0 tells the rest."""
        phase = self.phase
        if self.first:
            self._tell({"lost": what, "code": code, "stacks": stacks}, but=index)
        self._gone.set()
        if self._leaving.is_set():  # by itself, and for a reason of its own
            return
        if stacks:
            dump_stacks()
        elif code != EXIT_AGAIN:
            self._failed.wait(GRACE_SECONDS)  # what is wrong there may be wrong here too, and is then said here
            if self._leaving.is_set():
                return
        again = f" while this one was at {phase}; {AGAIN}" if code == EXIT_AGAIN else ""
        leave_with(code, self.named(f"{what}{again}"))


ALONE = Processes()


def dump_stacks() -> None:
    """The Python stacks of all threads, on stderr."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stderr that is no file
        faulthandler.dump_traceback(sys.stderr, all_threads=True)


def leave_with(code: int, line: str, mistake: bool = True) -> None:
    """Ends the process from any thread, with one line; nothing is waited for, since what hangs would be waited for too."""
    print(("error: " if mistake else "") + one_line(line), file=sys.stderr)
    _exit(code)


def _exit(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def joined(
    settings: config.Mesh,
    about: Mapping[str, Any],
    start_seconds: float = START_SECONDS,
    say_seconds: float = SAY_SECONDS,
) -> Iterator[Processes]:
    """The processes of a run, all started and connected, for as long as the run goes on; `ALONE` where there is but one.

    Call it before anything touches a device. `about` is what has to be the same on all: flat, JSON-ready. Raises UserError
    where somebody is missing or started otherwise. Processes other than the first print nothing but errors from here on.
    """
    place = find_place(settings)
    if place is None:
        _add_up_as_several()
        yield ALONE
        return
    us = _met(place, about, start_seconds, say_seconds)
    with guarded(us):
        _start_jax(place, us, start_seconds)
        if not us.first:
            _be_quiet()
        stopped = None
        try:
            yield us
        except Stopped as error:
            if not error.together:
                raise
            stopped = error
        us.doing("its end")
        us.barrier()
        _stop(us)
    if stopped is not None:
        raise stopped


@contextlib.contextmanager
def guarded(us: Processes) -> Iterator[None]:
    """Tells the others where this process ends by an error, and has it end then, whatever it was doing with them."""
    try:
        yield
    except BaseException as raised:
        error = ran_out(raised) or raised
        if not isinstance(error, (UserError, OutOfResources, Stopped, KeyboardInterrupt)):
            us.hear_out()
        code = exit_code(error)
        us.end(code, error if str(error) else type(error).__name__)
        # JAX would wait for the others at exit, and Orbax for what it was writing with them.
        atexit.register(_exit, code)
        threading.Thread(target=lambda: time.sleep(GRACE_SECONDS) or _exit(code), daemon=True).start()
        if isinstance(error, (UserError, OutOfResources)):
            raise type(error)(us.named(error)) from error
        raise


def _met(place: Place, about: Mapping[str, Any], start_seconds: float, say_seconds: float) -> Processes:
    import jax

    prefix = f"process {place.index} of {place.count}: "
    told = Told(lambda line: print(prefix + line, file=sys.stderr, flush=True), say_seconds)
    try:
        peers = meet(place, {"jax": jax.__version__, **about}, told, start_seconds)
    except UserError as error:
        raise UserError(prefix + str(error)) from error
    return Processes(place.index, place.count, peers)


def _start_jax(place: Place, us: Processes, start_seconds: float) -> None:
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # which would take SIGTERM
    relay = None if us.first else Relay(place.address)
    jax.distributed.initialize(
        place.coordinator if relay is None else relay.address,
        place.count,
        place.index,
        initialization_timeout=int(max(60, start_seconds)),
        heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS,
        coordinator_bind_address=place.coordinator,  # by itself it listens on every interface
    )


def _add_up_as_several() -> None:
    """Has several CPU devices of one process add up in the order in which processes do (gloo's), so that a run on 1 × 4
    and on 2 × 2 is the same to the last bit. Such devices are there only where somebody asked for them, to rehearse."""
    import jax
    from jax._src import xla_bridge  # the public question of this is to start the devices

    asked = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    several = int(asked[1]) if asked else jax.config.jax_num_cpu_devices
    if several < 2 or xla_bridge.backends_are_initialized() or jax.distributed.is_initialized():
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = "{}:{}".format(*free.getsockname())
    jax.config.update("jax_enable_preemption_service", False)  # which would take SIGTERM
    options = {"coordinator_bind_address": address, "cluster_detection_method": "deactivate"}
    jax.distributed.initialize(address, 1, 0, **options)


def _stop(us: Processes) -> None:
    import jax

    jax.distributed.shutdown()  # which waits for all
    us.leave()


def _be_quiet() -> None:
    """Sends standard output nowhere, that of libraries too."""
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
