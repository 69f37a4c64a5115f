"""A server that starts where another died: what the journal proves is kept, the rest is given up in order.

The journal's last segment is replayed. Whatever was under way then has ended with the server: fetches failed, copies to
L2 were not made, engines' requests are over. Chunks whose pages were handed out again, in the instant before the end
that the journal does not tell of, are cleared. Pages that a worker may still be writing stay with the arena's
allocator until that worker has drained its copies or is proved gone.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvcore.live.book import GENERATION, Book, page_ids
from kvcore.live.transport import QUARANTINE
from kvcore.policy import (
    Cleared,
    Core,
    CoreConfig,
    Decision,
    Demote,
    Event,
    Evict,
    InstanceLeft,
    Load,
    LoadFailed,
    Place,
    Refuse,
    StoreAborted,
)
from kvcore.policy.snapshot import dump
from kvtraces.journal import (
    Head,
    JournalError,
    Pages,
    Snapshot,
    Step,
    read_segment,
    restore_core,
    segments,
)

_LOG = logging.getLogger("kvcore.server")


class _Unusable(Exception):  # noqa: N818 - a reason, told in a log line
    """Why a journal does not prove what the arena holds."""


@dataclass(slots=True, eq=False)
class State:
    """A core and the book of its pages."""

    core: Core
    book: Book
    now_ns: int = 0
    """Time of the last event."""

    @classmethod
    def empty(cls, config: CoreConfig) -> "State":
        """Return the state of a server that has seen nothing."""
        return cls(Core(config), Book())


def recover(folder: Path, config: CoreConfig, *, epoch: int, page_bytes: int) -> State | None:
    """Return the state at the end of a journal; None, with the reason logged, where it does not fit the arena.

    Args:
        folder: The journal.
        config: The core's configuration; one that has changed cannot go on where another ended.
        epoch: The arena's, before it was taken over.
        page_bytes: Size of the arena's pages.
    """
    paths = segments(folder)
    if not paths:
        return None
    try:
        return _replay(paths[-1], config, epoch=epoch, page_bytes=page_bytes)
    except (_Unusable, JournalError, msgspec.MsgspecError) as error:
        _LOG.warning("journal %s does not tell what the arena holds (%s): starting empty", folder, error)
        return None


def _replay(path: Path, config: CoreConfig, *, epoch: int, page_bytes: int) -> State:
    head: Head | None = None
    state: State | None = None
    placed: deque[Place | Load] = deque()
    try:
        for located in read_segment(path):
            record = located.record
            match record:
                case Head():
                    _check(record, config, epoch, page_bytes)
                    head, state = record, State.empty(config)
                case Snapshot() if head is not None:
                    state = State(restore_core(head, record), Book.restore(record.pages))
                case Step() if state is not None:
                    if apply(state, record.event) != record.decisions:
                        raise _Unusable(f"{path.name} at byte {located.offset} does not replay")
                    placed = deque(_taking_pages(record.decisions))
                case Pages() if state is not None:
                    decision = placed.popleft()
                    state.book.place(
                        decision.request,
                        decision.chunks,
                        record.ids,
                        record.generations,
                        record.chunk_bytes,
                        fetched=isinstance(decision, Load),
                    )
                case _:
                    raise _Unusable(f"{path.name} at byte {located.offset}: no head before it")
    except JournalError as error:
        if state is None:
            raise
        _LOG.warning("the journal ends at %s", error)
    if state is None:
        raise _Unusable(f"{path.name} is empty")
    return state


def _check(head: Head, config: CoreConfig, epoch: int, page_bytes: int) -> None:
    if head.config != config:
        raise _Unusable("its settings of tiers, policy or quotas are others")
    if head.meta.get("epoch") != epoch or head.meta.get("page_bytes") != page_bytes:
        raise _Unusable("it is of another arena")


def _taking_pages(decisions: Iterable[Decision]) -> Iterator[Place | Load]:
    for decision in decisions:
        match decision:
            case Place(tier=0) if decision.request != QUARANTINE:
                yield decision
            case Load() if decision.tier > 0:
                yield decision


def apply(state: State, event: Event) -> tuple[Decision, ...]:
    """Feed an event to the core, and to the book what it decides, with no page given or taken in the arena."""
    decisions = state.core.handle(event)
    state.now_ns = event.now_ns
    state.book.learn(event, decisions)
    for decision in decisions:
        match decision:
            case Evict(tier=0):
                state.book.drop(decision)
            case Demote(tier=0):
                for chunk in decision.chunks:
                    state.book.resident.pop(chunk)
            case Refuse():
                state.book.refuse(decision)
    return decisions


def end_of_what_was_under_way(state: State, now_ns: int) -> list[Event]:
    """Return the events that end everything that died with the server."""
    events: list[Event] = []
    for request, rooms in state.book.fetches.items():
        events.append(LoadFailed(now_ns=now_ns, request=request, tier=1, chunks=tuple(rooms)))
    for index, tier in enumerate(state.core.tiers[1:], 1):
        if tier.writing:
            events.append(StoreAborted(now_ns=now_ns, request="", tier=index, chunks=tuple(tier.writing)))
    events += [InstanceLeft(now_ns=now_ns, instance=name) for _, name, *_ in dump(state.core)["instances"]]
    return events


def clear_of_changed(state: State, generations: NDArray[np.uint64], now_ns: int) -> Cleared | None:
    """Return the event that drops the chunks whose pages are no longer of their generations, if there are any."""
    changed = [
        chunk
        for chunk, room in state.book.resident.items()
        if not np.array_equal(generations[page_ids([room])], np.frombuffer(room.generations, GENERATION))
    ]
    return Cleared(now_ns=now_ns, chunks=tuple(changed)) if changed else None
