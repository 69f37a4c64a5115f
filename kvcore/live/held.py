"""What a server can match, roughly, in a file that engines of its host read without asking.

A prompt whose first chunk is nowhere has no hit, and most new prompts are such. The way to the server and back costs
their first step half a millisecond, so the server counts its chunks, of all tiers, in a million cells, each chunk in
the cell that its name gives. An empty cell says that none of its chunks is held; one that is not says nothing, and
the server is asked. What has changed since is seen as late as in an answer, so nothing is decided by it that an answer
of a moment ago would not have decided.

The file `kvcore-<name>.held` lies beside the arena: a token, by which a reader knows that it is this server's, then a
byte a cell.
"""

import mmap
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from kvcore.policy.core import Core
from kvcore.policy.tier import Entry, Followed
from kvcore.policy.types import Chunk

__all__ = ["HeldTable", "HeldView"]

_CELLS: Final = 1 << 20
_HEADER_BYTES: Final = 4096
_TOKEN_BYTES: Final = 8
_MOST: Final = 255
"""A cell that has come so far is never empty again: how many it stands for is not known."""


def _cell(chunk: Chunk) -> int:
    number = chunk if isinstance(chunk, int) else int.from_bytes(chunk[:4], "little")
    return _HEADER_BYTES + (number & (_CELLS - 1))


class HeldTable:
    """A server's table. Only its request loop writes.

    Args:
        path: The file; one that an earlier server left there is replaced.

    Raises OSError where there is no room for it; nothing is left then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token = secrets.randbits(8 * _TOKEN_BYTES - 1)
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, _HEADER_BYTES + _CELLS)  # a write beyond what there is would kill the process
            self._cells = mmap.mmap(fd, _HEADER_BYTES + _CELLS)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(fd)
        self._cells[:_TOKEN_BYTES] = self.token.to_bytes(_TOKEN_BYTES, "little")

    def follow(self, core: Core) -> None:
        """Count the core's chunks, and from now on every one that comes or goes."""
        for tier in core.tiers:
            tier.resident = _Counted(self, tier.resident)

    def came(self, chunk: Chunk) -> None:
        """Count a chunk of a tier."""
        cell = _cell(chunk)
        count = self._cells[cell]
        if count < _MOST:
            self._cells[cell] = count + 1

    def went(self, chunk: Chunk) -> None:
        """Count it no more."""
        cell = _cell(chunk)
        count = self._cells[cell]
        if 0 < count < _MOST:
            self._cells[cell] = count - 1

    def all_went(self, chunks: Sequence[Chunk]) -> None:
        """Count many chunks no more: at once, for a clear of everything is one turn of the request loop."""
        cells = np.frombuffer(self._cells, np.uint8)
        at, times = np.unique(np.fromiter(map(_cell, chunks), np.int64, len(chunks)), return_counts=True)
        before = cells[at]
        cells[at] = np.where(before < _MOST, before - np.minimum(before, times), before)

    def close(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
        self._cells.close()


class HeldView:
    """A reader's table: `attach`."""

    def __init__(self, cells: mmap.mmap) -> None:
        self._cells = cells

    @classmethod
    def attach(cls, path: Path, token: int) -> Self | None:
        """Map a server's table; None where it is not here, as for one of another host, or not the server's."""
        if not token:
            return None
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            cells = mmap.mmap(fd, _HEADER_BYTES + _CELLS, prot=mmap.PROT_READ)
        except (OSError, ValueError):  # shorter than a table
            return None
        finally:
            os.close(fd)
        if int.from_bytes(cells[:_TOKEN_BYTES], "little") == token:
            return cls(cells)
        cells.close()
        return None

    def may_hold(self, chunk: Chunk) -> bool:
        """Return whether a chunk can be matched in any tier: False is sure, True is not."""
        return self._cells[_cell(chunk)] != 0

    def close(self) -> None:
        """Unmap it."""
        self._cells.close()


class _Counted(Followed):
    """A tier's matchable chunks, counted as they come and go.

    It has what a tier does with them; what it does not do is refused, rather than missed in the count.
    """

    __slots__ = ("_table",)

    def __init__(self, table: HeldTable, entries: dict[Chunk, Entry]) -> None:
        super().__init__()
        self._table = table
        self.update(entries.items())

    def update(self, entries: Iterable[tuple[Chunk, Entry]]) -> None:  # type: ignore[override]
        for chunk, entry in entries:
            self[chunk] = entry

    def __setitem__(self, chunk: Chunk, entry: Entry) -> None:
        if chunk not in self:
            self._table.came(chunk)
        super().__setitem__(chunk, entry)

    def pop(self, chunk: Chunk) -> Entry:  # type: ignore[override]
        entry = super().pop(chunk)
        self._table.went(chunk)
        return entry

    def __delitem__(self, chunk: Chunk) -> None:
        self.pop(chunk)

    def drop(self, chunks: Sequence[Chunk]) -> None:
        super().drop(chunks)
        self._table.all_went(chunks)

    def _refused(self, *_: Any) -> Any:
        raise TypeError("a tier's chunks are counted one by one")

    clear = popitem = setdefault = __ior__ = _refused
