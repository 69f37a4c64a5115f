"""Who may still be writing into an arena: a table in the arena itself, so that it outlives the server.

A page that is being written carries a writer's number. A writer is one engine: the worker processes of all its ranks.
When a server takes an arena over, pages marked by a writer stay out of use until each of its processes has said that
its copies are drained, or is proved gone. Proof is the process id together with the process's start time, as ids are
reused.
"""

import os
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvcore.live.limits import ArenaError

NO_WRITER = 0
MEMBER_SLOTS = 1024
MEMBER = np.dtype(
    [("writer", "<u4"), ("pad", "<u4"), ("name", "<u8"), ("pid", "<u8"), ("start", "<u8"), ("pid_namespace", "<u8")]
)


class WriterTable:
    """The processes that may write into an arena, grouped by writer.

    `slots` is an array of MEMBER, `counter` a one-element array with the last number given; both live in the arena.
    Only the server changes them.
    """

    def __init__(self, slots: NDArray[np.void], counter: NDArray[np.uint32]) -> None:
        self._slots = slots
        self._counter = counter

    def join(self, member: str, pid: int, writer: int = NO_WRITER) -> int:
        """Enter a process under `writer`, or under a new number where that is NO_WRITER. Returns the number.

        `member` tells apart several workers in one process ("engine/rank"). `pid` is as this process sees it: a peer's
        credentials on a unix socket, rather than what the peer says, which may be from another pid namespace. A pid
        that is not visible here (0) is taken to live until it leaves.

        Raises:
            ArenaError: every slot is taken.
        """
        unused = np.flatnonzero(self._slots["writer"] == NO_WRITER)
        if unused.size == 0:
            raise ArenaError(f"the arena's table of workers is full: {self._slots.size} processes have registered")
        if writer == NO_WRITER:
            self._counter[0] += 1
            writer = int(self._counter[0])
        start = process_start(pid)
        row = self._slots[unused[0]]
        row["name"] = _name(member)
        row["pid"] = pid if start is not None else 0
        row["start"] = start or 0
        row["pid_namespace"] = pid_namespace()
        row["writer"] = writer  # last: a row that names a writer is whole
        return writer

    @property
    def free(self) -> int:
        """How many processes more can be entered."""
        return int(np.count_nonzero(self._slots["writer"] == NO_WRITER))

    def leave(self, member: str, pid: int) -> None:
        """Forget a process that has drained its copies or is known to be gone. Unknown ones are no error."""
        theirs = (self._slots["name"] == _name(member)) & np.isin(self._slots["pid"], (0, pid))
        self._slots["writer"][theirs] = NO_WRITER

    def clear(self) -> None:
        """Forget every process: nobody but the server maps the arena."""
        self._slots["writer"][:] = NO_WRITER

    def alive(self, writer: int) -> bool:
        """Whether any process of this writer may still be writing. Forgets those that are proved gone."""
        left = False
        for index in np.flatnonzero(self._slots["writer"] == writer):
            row = self._slots[index]
            if _is_gone(int(row["pid"]), int(row["start"]), int(row["pid_namespace"])):
                row["writer"] = NO_WRITER
            else:
                left = True
        return left


def process_start(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if there is no such process (any more).

    A killed process that its parent has not collected counts as none: the kernel takes memory and devices away first.
    Not so one whose first thread ended before the others, which shows the same state.
    """
    if pid <= 0:
        return None
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        fields = text[text.rindex(")") + 2 :].split()
        if fields[0] in "ZX" and len(os.listdir(f"/proc/{pid}/task")) <= 1:
            return None
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[19])


def pid_namespace() -> int:
    """Return which pid namespace this process counts in; 0 where that is not told."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _is_gone(pid: int, start: int, namespace: int) -> bool:
    if pid == 0 or namespace != pid_namespace():
        return False  # out of sight is no proof
    return process_start(pid) != start


def _name(member: str) -> int:
    return int.from_bytes(blake2b(member.encode(), digest_size=8).digest(), "little")
