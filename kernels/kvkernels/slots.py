"""Chunk slots as pieces of an arena, resolved without a loop over rows.

A chunk may own several arena pages that are not adjacent, so its slot is an ordered list of `(offset, length)` pieces;
a row of KV may begin in one piece and end in the next. `SlotTable` lays all slots of a request end to end into one
virtual range and answers, for any ranges of it, which arena ranges hold them: one `searchsorted`, whatever the count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from kvkernels.arena import Ints
from kvkernels.errors import RequestError

__all__ = ["Piece", "Segments", "Slot", "SlotTable", "Slots", "merge_copies", "ordinals"]

Piece = tuple[int, int]
Slot = Sequence[Piece]
Slots = Sequence[Slot] | Ints
"""One slot a chunk; or all in one int64 array, (chunks, pieces a chunk, 2), which is read without a loop."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Contiguous arena ranges: `arena[offset:offset + length]` holds what lies `within` bytes into range `index`."""

    index: Ints
    within: Ints
    offset: Ints
    length: Ints

    def columns(self) -> tuple[Ints, Ints, Ints, Ints]:
        """index, within, offset and length."""
        return self.index, self.within, self.offset, self.length


class SlotTable:
    """All slots of one request; slot i covers the virtual range `[i * slot_bytes, (i + 1) * slot_bytes)`.

    Args:
        slots: (offset, length) pieces of every chunk, in order. Bytes beyond slot_bytes (a last page's slack) are left
            alone.
        slot_bytes: what one chunk needs.
        arena_bytes: size of the arena.
        split_bytes: pieces are cut at multiples of this arena offset (0: nowhere).

    Raises:
        RequestError: a slot is too small, or a piece is negative or outside the arena.
    """

    def __init__(self, slots: Slots, *, slot_bytes: int, arena_bytes: int, split_bytes: int = 0) -> None:
        self.slot_bytes = slot_bytes
        self.count = len(slots)
        offset, virtual, length = self._alike(slots, arena_bytes) or self._of_any(slots, arena_bytes)
        offset, virtual, length = _joined(offset, virtual, length)
        offset, virtual, length = _split(offset, virtual, length, split_bytes)
        self._virtual = np.append(virtual, self.count * slot_bytes)
        self._offset = offset
        self._length = length

    def _alike(self, slots: Slots, arena_bytes: int) -> tuple[Ints, Ints, Ints] | None:
        """Arena offsets, virtual starts and lengths of slots in one array whose pieces are of equal lengths.

        These are a server's, and this runs in the engine's own thread; None for any others.
        """
        if not isinstance(slots, np.ndarray) or not slots.size:
            return None
        length = slots[0, :, 1]
        if bool((slots[:, :, 1] != length).any()):
            return None
        start = np.cumsum(length) - length
        short = self.slot_bytes - start
        if int(length.min()) <= 0 or int(short[-1]) <= 0 or int(length[-1]) < int(short[-1]):
            return None
        offset = slots[:, :, 0]
        if int(offset.min()) < 0 or bool((offset + length > arena_bytes).any()):
            return None
        virtual = np.arange(self.count, dtype=np.int64)[:, None] * self.slot_bytes + start
        return offset.ravel(), virtual.ravel(), np.tile(np.minimum(length, short), self.count)

    def _of_any(self, slots: Slots, arena_bytes: int) -> tuple[Ints, Ints, Ints]:
        """The same of any slots. Raises RequestError."""
        slot_bytes = self.slot_bytes
        flat, counts = _flat(slots)
        offset, length = flat[:, 0], flat[:, 1]
        if flat.size and (flat.min() < 0 or bool((offset + length > arena_bytes).any())):
            raise RequestError(f"a slot piece lies outside the arena of {arena_bytes} bytes")
        owner = np.repeat(np.arange(self.count), counts)
        start = _starts_within(length, counts)
        sums = np.bincount(owner, weights=length, minlength=self.count)
        if bool((sums < slot_bytes).any()):
            short = int(np.argmax(sums < slot_bytes))
            raise RequestError(f"slot {short} holds {int(sums[short])} bytes where a chunk takes {slot_bytes}")
        length = np.minimum(length, slot_bytes - start)
        used = length > 0
        offset, length = offset[used], length[used]
        return offset, owner[used] * slot_bytes + start[used], length

    @property
    def pieces(self) -> tuple[Ints, Ints]:
        """Arena offsets and lengths of all pieces in use."""
        return self._offset, self._length

    def overlapping(self) -> bool:
        """Whether two pieces share an arena byte, so that storing would write it twice."""
        order = np.argsort(self._offset, kind="stable")
        ends = (self._offset + self._length)[order]
        return bool((self._offset[order][1:] < ends[:-1]).any())

    def resolve(self, starts: Ints, lengths: Ints) -> Segments:
        """The arena ranges behind the virtual ranges `[starts, starts + lengths)`, split at piece borders."""
        first = self._virtual.searchsorted(starts, side="right") - 1
        last = self._virtual.searchsorted(starts + lengths, side="left") - 1
        counts = last - first + 1
        if counts.size and int(counts.max()) == 1:  # the common case, and this runs in the engine's own thread
            offset = self._offset[first] + starts - self._virtual[first]
            return Segments(np.arange(len(starts)), np.zeros_like(starts), offset, lengths)
        index = np.repeat(np.arange(len(starts), dtype=np.int64), counts)
        piece = np.repeat(first, counts) + ordinals(counts)
        begin = np.maximum(starts[index], self._virtual[piece])
        end = np.minimum((starts + lengths)[index], self._virtual[piece + 1])
        return Segments(index, begin - starts[index], self._offset[piece] + begin - self._virtual[piece], end - begin)


def merge_copies(
    host: Ints, device: Ints, length: Ints, *, split_bytes: int = 0, owner: Ints | None = None
) -> tuple[Ints, Ints, Ints, Ints]:
    """Join neighbouring copies that are adjacent on both sides.

    Args:
        host: arena offsets (not addresses: borders are counted from the arena's start).
        device: where the copies lie on the other side.
        length: bytes of each.
        split_bytes: no joined copy reaches across a multiple of this arena offset (0: no such borders).
        owner: copies of different owners are not joined: their `device` counts from different places.

    Returns:
        The index of each joined copy's first part, and host, device and length of the joined copies.
    """
    if len(length) < 2:
        return np.arange(len(length)), host, device, length
    joined = (host[1:] == host[:-1] + length[:-1]) & (device[1:] == device[:-1] + length[:-1])
    if split_bytes:
        joined &= host[1:] % split_bytes != 0
    if owner is not None:
        joined &= owner[1:] == owner[:-1]
    heads = np.flatnonzero(np.concatenate(([True], ~joined)))
    return heads, host[heads], device[heads], np.add.reduceat(length, heads)


def ordinals(counts: Ints) -> Ints:
    """0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, and so on."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) - np.repeat(ends - counts, counts)


def _flat(slots: Slots) -> tuple[Ints, Ints]:
    """All pieces one below the other, (pieces, 2), and how many are each slot's."""
    if isinstance(slots, np.ndarray):
        return slots.reshape(-1, 2), np.full(len(slots), slots.shape[1], np.int64)
    counts = np.fromiter((len(slot) for slot in slots), np.int64, len(slots))
    return np.fromiter(chain.from_iterable(chain.from_iterable(slots)), np.int64).reshape(-1, 2), counts


def _starts_within(length: Ints, counts: Ints) -> Ints:
    """Where each piece begins in its own slot."""
    before = np.cumsum(length) - length
    firsts = np.cumsum(counts) - counts
    base = np.zeros(len(counts), np.int64)
    filled = counts > 0
    base[filled] = before[firsts[filled]]
    return before - np.repeat(base, counts)


def _joined(offset: Ints, virtual: Ints, length: Ints) -> tuple[Ints, Ints, Ints]:
    """The same pieces, neighbours in the arena as one: they are neighbours in the virtual range anyway."""
    if len(length) < 2:
        return offset, virtual, length
    heads = np.flatnonzero(np.concatenate(([True], offset[1:] != offset[:-1] + length[:-1])))
    return offset[heads], virtual[heads], np.add.reduceat(length, heads)


def _split(offset: Ints, virtual: Ints, length: Ints, split_bytes: int) -> tuple[Ints, Ints, Ints]:
    if not split_bytes or not len(length):
        return offset, virtual, length
    first = offset // split_bytes
    counts = (offset + length - 1) // split_bytes - first + 1
    if int(counts.max()) == 1:
        return offset, virtual, length
    which = np.repeat(np.arange(len(length)), counts)
    border = (first[which] + ordinals(counts)) * split_bytes
    begin = np.maximum(offset[which], border)
    end = np.minimum((offset + length)[which], border + split_bytes)
    return begin, virtual[which] + begin - offset[which], end - begin
