"""The live shell's Transport: it gives placed chunks pages, tells engines where to copy, and copies to and from L2.

It decides nothing. Engines' copies end when their workers say so; L2's when the pool's threads have posted them.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from kvcore.live.allocator import PageAllocator
from kvcore.live.arena import Arena, views
from kvcore.live.book import Book, Room, page_ids
from kvcore.live.stores.pool import Completion, Outcome, StorePool
from kvcore.live.writers import NO_WRITER
from kvcore.policy import (
    Chunk,
    Clock,
    Decision,
    Demote,
    Event,
    Evict,
    Load,
    LoadDone,
    LoadFailed,
    Matched,
    Place,
    Refuse,
    StoreAborted,
    StoreCommitted,
)

QUARANTINE: Final = "(quarantine)"
"""The request that holds, in the core, the pages which a worker of an earlier server may still be writing."""

_COPIED_OUT_BYTES: Final = 64 << 20
"""How much one demotion copies out of the arena at most: the request loop waits for it."""


class PageJournal(Protocol):
    """Who is told of the pages that a placing decision was given, in the order of the decisions."""

    def pages(self, ids: bytes, generations: bytes, chunk_bytes: int) -> None:
        """Note them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a request's chunks look like in the arena."""

    chunk_pages: int
    chunk_bytes: int
    writer: int
    """The mark of the instance's workers in the arena."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """Whose copy to or from L2 it is."""

    request: str
    chunk: Chunk


@dataclass(slots=True, eq=False)
class Answer:
    """What the decisions of the event at hand say to the request that is asking."""

    matched: Matched | None = None
    placed: tuple[Chunk, ...] = ()
    rooms: list[Room] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)


class LiveTransport:
    """Implements `kvcore.policy.Transport`.

    `handle` must be set to `Driver.handle` before the first decision. `shape_of` returns the shape of the chunks of a
    request at work.
    """

    def __init__(
        self,
        arena: Arena,
        allocator: PageAllocator,
        book: Book,
        *,
        clock: Clock,
        shape_of: Callable[[str], Shape],
        pool: StorePool | None = None,
        staging_pages: int = 0,
        journal: PageJournal | None = None,
    ) -> None:
        self.book = book
        self.allocator = allocator
        self.answers: defaultdict[str, Answer] = defaultdict(Answer)
        """By request; cleared by whoever handled the event."""
        self.runs: dict[str, tuple[Chunk, ...]] = {}
        """By request, chunks in L1 that its engine is to load; whoever tells it takes them out."""
        self.fetching: dict[Chunk, None] = {}
        """Chunks on their way from L2 to L1."""
        self.dropped_l2_chunks = 0
        """Not written to L2 for want of room in the queue."""
        self.handle: Callable[[Event], None] = _no_driver
        self._arena = arena
        self._clock = clock
        self._shape_of = shape_of
        self._pool = pool
        self._staging_pages = staging_pages
        self._staged: dict[Chunk, Room] = {}
        """Chunks that have left L1 and are still read, to be written to L2."""
        self._late_gets: deque[tuple[str, Chunk, Room]] = deque()
        """Fetches that the pool's queue had no room for."""
        self.journal = journal

    def learn(self, event: Event, decisions: tuple[Decision, ...]) -> None:
        """Bring the book up to date with an event, before its decisions are carried out."""
        settled, freed = self.book.learn(event, decisions)
        if settled:
            self.allocator.settle(page_ids(settled))
        self._free(freed)

    # The Transport

    def matched(self, decision: Matched) -> None:
        """Note what a lookup found."""
        self.answers[decision.request].matched = decision

    def load(self, decision: Load) -> None:
        """Note what the engine is to load, or have the pool fetch it from L2."""
        if decision.tier == 0:
            self.runs[decision.request] = decision.chunks
            return
        rooms = self._place(decision, NO_WRITER, fetched=True)
        for chunk, room in zip(decision.chunks, rooms, strict=True):
            self.fetching[chunk] = None
            self._late_gets.append((decision.request, chunk, room))
        self._submit_gets()

    def store(self, decision: Place) -> None:
        """Give placed chunks pages, or have the pool write them to L2."""
        if decision.request == QUARANTINE:
            return  # its pages are those that the allocator does not hand out
        if decision.tier == 0:
            answer = self.answers[decision.request]
            answer.rooms = self._place(decision, self._shape_of(decision.request).writer, fetched=False)
            answer.placed = decision.chunks
            return
        late = [
            chunk
            for chunk in decision.chunks
            if not self._put(decision.request, chunk, self._parts(self.book.resident[chunk]))
        ]
        self._not_written(decision.request, decision.tier, late)

    def demote(self, decision: Demote) -> None:
        """Take over chunks that leave L1: keep their pages until the pool has written them, or copy a few out.

        What finds neither pages set aside for that nor time to copy does not reach L2.
        """
        late: list[Chunk] = []
        freed: list[Room] = []
        copies_bytes = _COPIED_OUT_BYTES
        for chunk in decision.chunks:
            room = self.book.resident.pop(chunk)
            if room.pages <= self._staging_pages and self._put("", chunk, self._parts(room)):
                self._staging_pages -= room.pages
                self._staged[chunk] = room
                continue
            freed.append(room)
            copies_bytes -= room.nbytes
            if copies_bytes < 0 or not self._put_copy(chunk, room):
                late.append(chunk)
        self._free(freed)
        self._not_written("", decision.tier + 1, late)

    def drop(self, decision: Evict) -> None:
        """Free the pages of evicted chunks, or have the pool delete them from L2."""
        if decision.tier == 0:
            self._free(self.book.drop(decision))
        elif self._pool is not None:
            self._pool.submit_delete([_digest(chunk) for chunk in decision.chunks])

    def refuse(self, decision: Refuse) -> None:
        """Free what had been placed; count the others for the request that is asking."""
        freed = self.book.refuse(decision)
        self._free(freed)
        if not freed and decision.tier == 0:
            refused = self.answers[decision.request].refused
            refused[decision.reason] = refused.get(decision.reason, 0) + len(decision.chunks)

    # L2

    def collect(self) -> list[Completion]:
        """Hand what the pool has done to the core; return it."""
        if self._pool is None:
            return []
        completions = self._pool.drain()
        groups: dict[tuple[str, str, Outcome], list[Chunk]] = {}
        for completion in completions:
            if not isinstance(completion.token, Ticket):
                continue  # a delete that failed: it is the service's to try again
            request, chunk = completion.token.request, completion.token.chunk
            groups.setdefault((completion.operation, request, completion.outcome), []).append(chunk)
            if completion.operation == "get":
                self.fetching.pop(chunk, None)
            elif (room := self._staged.pop(chunk, None)) is not None:
                self._staging_pages += room.pages
                self._free([room])
        for (operation, request, outcome), chunks in groups.items():
            self.handle(_ended(operation, outcome, self._clock.now_ns(), request, tuple(chunks)))
        self._submit_gets()
        return completions

    def _submit_gets(self) -> None:
        """Submit the fetches that wait, as many as the pool's queue has room for."""
        while self._late_gets and self._pool is not None:
            request, chunk, room = self._late_gets[0]
            if not self._pool.submit_get(Ticket(request, chunk), _digest(chunk), self._parts(room)):
                return
            self._late_gets.popleft()

    def _put(self, request: str, chunk: Chunk, parts: list[memoryview]) -> bool:
        """Return whether the chunk's way to L2 is queued."""
        if self._pool is None:
            raise AssertionError("a copy to L2 without L2")
        return self._pool.submit_put(Ticket(request, chunk), _digest(chunk), parts)

    def _put_copy(self, chunk: Chunk, room: Room) -> bool:
        """Return whether a copy of the chunk's bytes is on its way to L2; where the queue is full none is made."""
        if self._pool is None or not self._pool.has_room(room.nbytes):
            return False
        return self._put("", chunk, [memoryview(b"".join(self._parts(room)))])

    def _parts(self, room: Room) -> list[memoryview]:
        return views(self._arena, page_ids([room]), 0, room.nbytes)

    def _not_written(self, request: str, tier: int, chunks: Sequence[Chunk]) -> None:
        if chunks:
            self.dropped_l2_chunks += len(chunks)
            now_ns = self._clock.now_ns()
            self.handle(StoreAborted(now_ns=now_ns, request=request, tier=tier, chunks=tuple(chunks)))

    # Pages

    def _place(self, decision: Place | Load, writer: int, *, fetched: bool) -> list[Room]:
        """Take pages for the chunks of a decision, in one piece where possible."""
        shape = self._shape_of(decision.request)
        taken = self.allocator.take(len(decision.chunks) * shape.chunk_pages, writer)
        ids, generations = taken.tobytes(), self._arena.generations[taken].tobytes()
        if self.journal is not None:
            self.journal.pages(ids, generations, shape.chunk_bytes)
        return self.book.place(decision.request, decision.chunks, ids, generations, shape.chunk_bytes, fetched=fetched)

    def _free(self, rooms: Sequence[Room]) -> None:
        if rooms:
            self.allocator.give(page_ids(rooms))


def _ended(operation: str, outcome: Outcome, now_ns: int, request: str, chunks: tuple[Chunk, ...]) -> Event:
    """Return the event for chunks whose copy to or from L2 ended in one way."""
    copied = outcome is Outcome.DONE
    if operation == "get" and not copied:
        return LoadFailed(now_ns=now_ns, request=request, tier=1, chunks=chunks, gone=outcome is Outcome.MISS)
    kind = LoadDone if operation == "get" else StoreCommitted if copied else StoreAborted
    return kind(now_ns=now_ns, request=request, tier=1, chunks=chunks)


def _digest(chunk: Chunk) -> bytes:
    if not isinstance(chunk, bytes):
        raise TypeError(f"a server's chunks are digests, not {chunk!r}")
    return chunk


def _no_driver(event: Event) -> None:
    raise AssertionError(f"no driver to hand {event} to")
