"""The unix socket that members keep open: its closing proves a process gone."""

import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kvcore.live.members import Member, UnknownMemberError

_TOKEN_BYTES = 8
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

    def close(self) -> None:
        """Close everything and remove the path."""
        for fd in tuple(self._peers):
            self._drop(fd)
        self._unwatch(self._listener.fileno())
        self._listener.close()
        with suppress(FileNotFoundError):
            self.path.unlink()

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            peer, _ = self._listener.accept()
            peer.setblocking(False)
            self._peers[peer.fileno()] = peer
            self._watch(peer.fileno())

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
            with suppress(UnknownMemberError, OSError):
                self._members[fd] = self._here(int.from_bytes(data, "little"), pid)
                peer.send(b"\x01")
                return
        self._close(fd)

    def _close(self, fd: int) -> None:
        member = self._members.get(fd)
        self._drop(fd)
        if member is not None and member.here:
            self._gone(member)

    def _drop(self, fd: int) -> None:
        self._unwatch(fd)
        self._peers.pop(fd).close()
        self._members.pop(fd, None)
