"""Where in the arena every chunk lies: the request loop's own account of pages, kept in step with the core's.

It learns from events and decisions only, so that it can be rebuilt from a journal.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvcore.policy import (
    Chunk,
    Decision,
    Event,
    Evict,
    LoadDone,
    LoadFailed,
    Refuse,
    RoomAsked,
    StoreAborted,
    StoreCommitted,
)

PAGE_ID = np.dtype("<u4")
GENERATION = np.dtype("<u8")
_FREED = frozenset(("lease", "cleared", "left", "unknown"))
"""Reasons for which chunks that had been placed are refused: then their pages are free."""


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """A chunk's pages, as they travel."""

    ids: bytes
    """uint32, in the order in which the chunk's bytes fill them."""
    generations: bytes
    """uint64, one a page."""
    nbytes: int
    """Of the chunk, all shards together; the rest of the last page is unused."""

    @property
    def pages(self) -> int:
        """How many pages."""
        return len(self.ids) // PAGE_ID.itemsize


class Book:
    """Chunks and their rooms in L1: those that can be read, and those that a request's engine or L2 is filling."""

    def __init__(self) -> None:
        self.resident: dict[Chunk, Room] = {}
        self.writes: dict[str, dict[Chunk, Room]] = {}
        """By request, what its engine writes."""
        self.fetches: dict[str, dict[Chunk, Room]] = {}
        """By request, what comes from L2 for it."""
        self._asking = False

    def place(
        self, request: str, chunks: Sequence[Chunk], ids: bytes, generations: bytes, nbytes: int, *, fetched: bool
    ) -> list[Room]:
        """Enter `chunks` of `nbytes` each, to be filled, with the pages taken for them: equally many each, in order."""
        per_id, per_generation = len(ids) // len(chunks), len(generations) // len(chunks)
        rooms = [
            Room(
                ids[at * per_id : (at + 1) * per_id],
                generations[at * per_generation : (at + 1) * per_generation],
                nbytes,
            )
            for at in range(len(chunks))
        ]
        table = self.fetches if fetched else self.writes
        table.setdefault(request, {}).update(zip(chunks, rooms, strict=True))
        return rooms

    def learn(self, event: Event, decisions: tuple[Decision, ...]) -> tuple[list[Room], list[Room]]:
        """Take in an event with its decisions, before they are carried out.

        Returns the rooms of chunks that can be read from now on, and those that are free since their copy did not
        succeed.
        """
        self._asking = isinstance(event, RoomAsked)
        match event:
            case StoreCommitted(tier=0):
                return self._settle(self.writes, event, decisions), []
            case LoadDone() if event.tier:
                return self._settle(self.fetches, event, decisions), []
            case StoreAborted(tier=0):
                return [], self._take(self.writes, event.request, event.chunks)
            case LoadFailed() if event.tier:
                return [], self._take(self.fetches, event.request, event.chunks)
        return [], []

    def drop(self, decision: Evict) -> list[Room]:
        """Forget chunks that leave L1; return their rooms."""
        pop = self.resident.pop
        return [pop(chunk) for chunk in decision.chunks]

    def refuse(self, decision: Refuse) -> list[Room]:
        """Return the rooms that a refusal frees: of what had been placed, not of what is asked for only now."""
        if decision.tier or self._asking or decision.reason not in _FREED:
            return []
        return [
            room
            for rooms in (self.writes, self.fetches)
            for room in self._take(rooms, decision.request, decision.chunks)
        ]

    def dump(self) -> bytes:
        """Return the book in bytes, for a journal's snapshot."""
        rows = [
            _rows(self.resident),
            [[name, _rows(rooms)] for name, rooms in self.writes.items()],
            [[name, _rows(rooms)] for name, rooms in self.fetches.items()],
        ]
        return msgspec.msgpack.encode(rows)

    @classmethod
    def restore(cls, data: bytes) -> "Book":
        """Return a dumped book. Raises msgspec.MsgspecError or ValueError where it is none."""
        book = cls()
        resident, writes, fetches = msgspec.msgpack.decode(data)
        book.resident = _rooms(resident)
        book.writes = {name: _rooms(rows) for name, rows in writes}
        book.fetches = {name: _rooms(rows) for name, rows in fetches}
        return book

    def _settle(
        self,
        table: dict[str, dict[Chunk, Room]],
        event: StoreCommitted | LoadDone,
        decisions: tuple[Decision, ...],
    ) -> list[Room]:
        """Make written chunks readable, but for those that the core refuses."""
        rooms = table.get(event.request)
        if rooms is None:
            return []
        refused = {
            chunk
            for decision in decisions
            if isinstance(decision, Refuse) and decision.request == event.request and decision.reason in _FREED
            for chunk in decision.chunks
        }
        settled: list[Room] = []
        for chunk in event.chunks:
            if chunk not in refused and (room := rooms.pop(chunk, None)) is not None:
                self.resident[chunk] = room
                settled.append(room)
        if not rooms:
            del table[event.request]
        return settled

    @staticmethod
    def _take(table: dict[str, dict[Chunk, Room]], request: str, chunks: Iterable[Chunk]) -> list[Room]:
        rooms = table.get(request)
        if rooms is None:
            return []
        taken = [room for chunk in chunks if (room := rooms.pop(chunk, None)) is not None]
        if not rooms:
            del table[request]
        return taken


def page_ids(rooms: Iterable[Room]) -> NDArray[np.uint32]:
    """Return the pages of rooms, end to end."""
    return np.frombuffer(b"".join([room.ids for room in rooms]), PAGE_ID)


def _rows(rooms: dict[Chunk, Room]) -> list[list[Any]]:
    return [[chunk, room.ids, room.generations, room.nbytes] for chunk, room in rooms.items()]


def _rooms(rows: list[list[Any]]) -> dict[Chunk, Room]:
    return {chunk: Room(ids, generations, nbytes) for chunk, ids, generations, nbytes in rows}
