"""The unix socket that members keep open: its closing proves a process gone."""

import logging
import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kvcore.live.limits import ArenaError
from kvcore.live.members import Member, UnknownMemberError

_LOG = logging.getLogger("kvcore.server")
_TOKEN_BYTES = 8
_HELLO_S = 5.0
"""How long a connection may stand without its token."""
_MOST_STRANGERS = 64
"""Connections without a token beyond which no more are accepted: descriptors are few, and libzmq needs some."""
_REST_S = 1.0
"""How long nothing is accepted once that has failed."""
_CREDENTIALS = struct.Struct("3i")


class Liveness:
    """Listens, and watches the connections; `watch` and `unwatch` add descriptors to the loop's poller.

    Raises OSError where the path cannot be bound.
    """

    def __init__(
        self,
        path: Path,
        *,
        here: Callable[[int, int], Member],
        gone: Callable[[Member], None],
        watch: Callable[[int], None],
        unwatch: Callable[[int], None],
    ) -> None:
        self.path = path
        self._here = here
        self._gone = gone
        self._watch = watch
        self._unwatch = unwatch
        self._peers: dict[int, socket.socket] = {}
        self._members: dict[int, Member] = {}
        self._strangers: dict[int, float] = {}
        """Connections of which no token has come, and since when they stand."""
        self._rests_until_s = 0.0
        """When to accept again; 0: it is done now."""
        with suppress(FileNotFoundError):
            path.unlink()  # the arena's lock is ours, so its last user is gone
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._listener.bind(os.fspath(path))
            os.chmod(path, 0o600)
            self._listener.listen(128)
        except OSError:
            self._listener.close()
            raise
        watch(self._listener.fileno())

    def ready(self, fd: int) -> bool:
        """Take in what happened on a descriptor; return whether it is one of these."""
        if fd == self._listener.fileno():
            self._accept()
        elif fd in self._peers:
            self._read(fd)
        else:
            return False
        return True

    def look(self, member: Member) -> None:
        """Take in at once whether a member's connection has ended: its process registers again right after that."""
        for fd in [fd for fd, one in self._members.items() if one is member]:
            self._read(fd)

    def sweep(self) -> None:
        """Close connections that do not say whose they are, and accept again after a rest; to be called often."""
        now_s = time.monotonic()
        for fd in [fd for fd, since_s in self._strangers.items() if now_s - since_s > _HELLO_S]:
            self._drop(fd)
        if self._rests_until_s and now_s >= self._rests_until_s:
            self._rests_until_s = 0.0
            self._watch(self._listener.fileno())

    def close(self) -> None:
        """Close everything and remove the path."""
        for fd in tuple(self._peers):
            self._drop(fd)
        if not self._rests_until_s:
            self._unwatch(self._listener.fileno())
        self._listener.close()
        with suppress(FileNotFoundError):
            self.path.unlink()

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptors, or no memory: it would fail again at once, and for ever
            self._rest(str(error.strerror))
            return
        peer.setblocking(False)
        self._peers[peer.fileno()] = peer
        self._strangers[peer.fileno()] = time.monotonic()
        self._watch(peer.fileno())
        if len(self._strangers) >= _MOST_STRANGERS:
            self._rest(f"{len(self._strangers)} have not said whose they are")

    def _rest(self, why: str) -> None:
        _LOG.error("workers' connections are not taken for %g s: %s", _REST_S, why)
        self._unwatch(self._listener.fileno())
        self._rests_until_s = time.monotonic() + _REST_S

    def _read(self, fd: int) -> None:
        peer = self._peers[fd]
        try:
            data = peer.recv(64)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if len(data) == _TOKEN_BYTES and fd not in self._members:
            pid, _, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
            with suppress(UnknownMemberError, OSError):  # it is told by the end of its connection
                if self._greet(fd, peer, int.from_bytes(data, "little"), pid):
                    return
        self._close(fd)

    def _greet(self, fd: int, peer: socket.socket, token: int, pid: int) -> bool:
        try:
            self._members[fd] = self._here(token, pid)
        except ArenaError as error:
            _LOG.warning("the worker of process %d is not let in: %s", pid, error)
            return False
        del self._strangers[fd]
        peer.send(b"\x01")
        return True

    def _close(self, fd: int) -> None:
        member = self._members.get(fd)
        self._drop(fd)
        if member is not None and member.here:
            self._gone(member)

    def _drop(self, fd: int) -> None:
        self._unwatch(fd)
        self._peers.pop(fd).close()
        self._strangers.pop(fd, None)
        self._members.pop(fd, None)
