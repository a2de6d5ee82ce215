"""How the processes of a run find each other: who is who, and a connection from each to process 0."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft import config
from jaxft.errors import UserError

LONGEST_BYTES = 1 << 20  # of a message
SEND_SECONDS = 5.0  # a process that takes nothing for so long is not waited for
REPEAT_SECONDS = 60.0  # between two lines about what is waited for


@dataclass(frozen=True)
class Place:
    """This process among the `count` of a run; `coordinator` is host:port of process 0."""

    coordinator: str
    count: int
    index: int

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of process 0."""
        return split_address(self.coordinator)


def split_address(text: str) -> tuple[str, int]:
    """`host:port` or `[ipv6]:port`."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def find_place(mesh: config.Mesh) -> Place | None:
    """What the flags say, or else the environment, as JAX reads it: Cloud TPU (GCE, GKE), SLURM, Open MPI, Kubernetes'
    indexed jobs. None for a process by itself. Raises UserError for an environment that contradicts itself."""
    if mesh.coordinator is not None:
        place = Place(mesh.coordinator, int(mesh.num_processes or 1), int(mesh.process_id or 0))
    else:
        place = _from_environment()
    return place if place is not None and place.count > 1 else None


def _from_environment() -> Place | None:
    from jax._src import clusters  # not public, and the only way to know before anything is started

    # A notebook's pod is no job; asking Kubernetes about it raises.
    indexed = "KUBERNETES_SERVICE_HOST" not in os.environ or "JOB_COMPLETION_INDEX" in os.environ
    asked = os.environ.get("JAX_COORDINATOR_ADDRESS")
    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method]
    kind = next((k for k in kinds if (indexed or k.__name__ != "K8sCluster") and k.is_env_present()), None)
    if kind is None:
        return None
    try:
        count, index = kind.get_process_count(), kind.get_process_id()
        if count <= 1:
            return None
        found = asked or kind.get_coordinator_address(60, os.environ.get("JAX_COORDINATOR_PORT"))
    except Exception as error:  # of a cluster's own client
        raise UserError(
            f"processes: {kind.name or kind.__name__} was found and does not say which process this is ({error}); "
            "set mesh.coordinator, mesh.num_processes and mesh.process_id"
        ) from error
    return Place(found, count, index)


class Wire:
    """A connection that carries messages, each a line of JSON."""

    def __init__(self, connection: socket.socket):
        self.connection, self._rest, self._sending = connection, b"", threading.Lock()
        self.kept: list[dict[str, Any]] = []  # read already, and for whoever reads next
        connection.settimeout(SEND_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A host that is gone sends nothing, not even the end: the system asks after 6 s of silence and gives up at 18.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 6), ("TCP_KEEPINTVL", 4), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 18000)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def fileno(self) -> int:
        """For selectors."""
        return self.connection.fileno()

    def send(self, message: Mapping[str, Any]) -> bool:
        """Whether it went out."""
        try:
            with self._sending:
                self.connection.sendall(json.dumps(message).encode() + b"\n")
            return True
        except OSError:
            return False

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that have come; waits for some bytes. None where the other end is gone or speaks otherwise."""
        if self.kept:
            kept, self.kept = self.kept, []
            return kept
        try:
            got = self.connection.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        *lines, self._rest = (self._rest + got).split(b"\n")
        if not got or len(self._rest) > LONGEST_BYTES:
            return None
        try:
            found = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return found if all(isinstance(message, dict) for message in found) else None

    def close(self) -> None:
        """The other end sees that this one is gone."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


def readable(sources: Sequence[Any], seconds: float) -> list[Any]:
    """Those of `sources` that have something to read, waiting so long for one; `select` would end at 1024 of them."""
    with selectors.DefaultSelector() as selector:
        for source in sources:
            selector.register(source, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(seconds)]


@dataclass(frozen=True)
class Peer:
    """Another process of the run."""

    index: int
    host: str
    wire: Wire

    def __str__(self) -> str:
        return f"process {self.index} ({self.host})"


class Told:
    """Says what is waited for: first after `after_seconds`, and every minute from then on."""

    def __init__(self, say: Callable[[str], None], after_seconds: float):
        self._say, self._next = say, time.monotonic() + after_seconds

    def waiting(self, what: str) -> None:
        """Says it, where it is time to."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + REPEAT_SECONDS
            self._say(f"waiting for {what}")


def meet(place: Place, about: Mapping[str, Any], told: Told, limit_seconds: float) -> dict[int, Peer]:
    """Connections to the others: all of them on process 0, process 0 alone on another.

    `about` is what has to be the same on all (JSON-ready, flat). Raises UserError where it is not, where two processes
    have one number, and where somebody has not come after `limit_seconds`.
    """
    hello = {"index": place.index, "count": place.count, "host": socket.gethostname(), "about": dict(about)}
    deadline = time.monotonic() + limit_seconds
    if place.index == 0:
        return _Door(place, hello).wait(told, deadline, limit_seconds)
    return {0: _call(place, hello, told, deadline, limit_seconds)}


class _Door:
    """Process 0's side: everybody who has come so far."""

    def __init__(self, place: Place, hello: Mapping[str, Any]):
        self._place, self._hello = place, hello
        self._here: dict[int, Peer] = {}
        self._strangers: list[Wire] = []  # connected, and have not said who they are
        host, port = place.address
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._server = socket.create_server(address[:2], family=family, backlog=place.count)
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen on {place.coordinator} ({error.strerror or error}); mesh.coordinator is a free port "
                "on an address of this host"
            ) from error

    def wait(self, told: Told, deadline: float, limit_seconds: float) -> dict[int, Peer]:
        with self._server:
            while missing := [i for i in range(1, self._place.count) if i not in self._here]:
                what = _missing(missing, self._place.count)
                if time.monotonic() > deadline:
                    self._refuse_all(f"{what} did not come within {limit_seconds:.0f} s")
                    raise UserError(f"waited {limit_seconds:.0f} s for {what}; {REMEDY}")
                told.waiting(f"{what}; {REMEDY}")
                self._listen(what)
        for peer in self._here.values():
            peer.wire.send({"go": self._hello["host"]})
        return dict(sorted(self._here.items()))

    def _listen(self, missing: str) -> None:
        """Half a second of whoever comes, says who it is, or leaves again."""
        wires = [*self._strangers, *(peer.wire for peer in self._here.values())]
        ready = readable([self._server, *wires], 0.5)
        if self._server in ready:
            self._strangers.append(Wire(self._server.accept()[0]))
        for wire in self._strangers[:]:
            if wire in ready:
                self._strangers.remove(wire)
                said = wire.read()
                self._greet(wire, said[0]) if said else wire.close()
        for peer in [p for p in self._here.values() if p.wire in ready and p.wire.read() is None]:
            del self._here[peer.index]
            peer.wire.close()
        if not ready:
            for peer in self._here.values():
                peer.wire.send({"missing": missing})

    def _greet(self, wire: Wire, hello: Mapping[str, Any]) -> None:
        try:
            index, count, host, about = hello["index"], hello["count"], hello["host"], hello["about"]
            peer = Peer(int(index), str(host), wire)
            differs = _differing(about, self._hello["about"])
        except (KeyError, TypeError, ValueError, AttributeError):
            wire.close()
            return
        if count != self._place.count or not 0 < peer.index < count:
            wire.send({"refused": f"this is process {index} of {count}, and process 0 counts {self._place.count}"})
        elif peer.index in self._here:
            wire.send({"refused": f"{self._here[peer.index]} is here already; each needs a mesh.process_id of its own"})
        elif differs:
            said = f"{peer} was started otherwise than process 0: {'; '.join(differs)}; every process runs the same command"
            wire.send({"refused": said})
            self._refuse_all(said)
            raise UserError(said)
        else:
            self._here[peer.index] = peer
            return
        wire.close()

    def _refuse_all(self, why: str) -> None:
        for peer in self._here.values():
            peer.wire.send({"refused": why})


REMEDY = "every process runs the same command"


def _missing(indices: list[int], count: int) -> str:
    shown = ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
    return f"process{'es' if len(indices) > 1 else ''} {shown} of {count}"


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    keys = sorted(theirs.keys() | ours.keys())
    return [f"{key} {theirs.get(key)!r}, not {ours.get(key)!r}" for key in keys if theirs.get(key) != ours.get(key)]


def _call(place: Place, hello: Mapping[str, Any], told: Told, deadline: float, limit_seconds: float) -> Peer:
    """Another process's side: calls process 0 until it answers, and stays on the line until all are there."""
    nobody = what = f"process 0 at {place.coordinator}"
    wire: Wire | None = None
    try:
        while time.monotonic() < deadline:
            told.waiting(f"{what}; {REMEDY}")
            if wire is None:
                wire, what = _dial(place, hello), nobody
                continue
            if not readable([wire], 0.5):
                continue
            said = wire.read()
            if said is None:  # process 0 has gone; another may be started in its place
                wire.close()
                wire = None
            for number, message in enumerate(said or ()):
                if "refused" in message:
                    raise UserError(str(message["refused"]))
                if "go" in message:
                    wire.kept = said[number + 1 :]  # process 0 may have gone on already
                    met, wire = Peer(0, str(message["go"]), wire), None
                    return met
                what = str(message.get("missing", what))
    finally:
        if wire is not None:
            wire.close()
    raise UserError(f"waited {limit_seconds:.0f} s for {what}; {REMEDY}")


def _dial(place: Place, hello: Mapping[str, Any]) -> Wire | None:
    connection = connect(place.address)
    if connection is None:
        time.sleep(0.3)
        return None
    wire = Wire(connection)
    wire.send(hello)
    return wire


def connect(address: tuple[str, int]) -> socket.socket | None:
    """A connection; None where nobody listens, also where the name is not known yet."""
    try:
        connection = socket.create_connection(address, timeout=2.0)
    except OSError:
        return None
    if connection.getsockname() != connection.getpeername():
        return connection
    connection.close()  # TCP lets a port that nobody listens on connect to itself
    return None
