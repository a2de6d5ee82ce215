"""A process's own end of the line to process 0, for JAX's coordination client.

When process 0 dies, that client ends its process at once with a page of C++ that names nobody. Connected through a relay
in its own process, it only finds that nothing comes, and `processes` has the time to say who died.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time

from jaxft.parallel.meeting import connect

DIAL_SECONDS = 60.0  # for process 0's service to be there


class Relay:
    """Passes bytes between connections to `address`, on the loopback interface, and `upstream`."""

    def __init__(self, upstream: tuple[str, int]):
        self._upstream = upstream
        self._server = socket.create_server(("127.0.0.1", 0))
        self._held: list[socket.socket] = [self._server]
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    @property
    def address(self) -> str:
        """host:port to connect to."""
        return "{}:{}".format(*self._server.getsockname())

    def close(self) -> None:
        """Ends all connections."""
        for end in self._held:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near = self._server.accept()[0]
            except OSError:  # closed
                return
            threading.Thread(target=self._connect, args=(near,), name="relay", daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        self._held.append(near)
        far = self._dial()
        if far is None:
            return  # `near` stays open and silent, as after a death
        self._held.append(far)
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_pass, args=(near, far, True), name="relay", daemon=True).start()
        _pass(far, near, False)

    def _dial(self) -> socket.socket | None:
        deadline = time.monotonic() + DIAL_SECONDS
        while time.monotonic() < deadline:
            far = connect(self._upstream)
            if far is not None:
                far.settimeout(None)
                return far
            time.sleep(0.05)
        return None


def _pass(source: socket.socket, target: socket.socket, ends: bool) -> None:
    """Copies until the source ends; `ends` tells the target so."""
    with contextlib.suppress(OSError):
        while got := source.recv(1 << 16):
            target.sendall(got)
    if ends:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
