"""A server that starts where another ended: what the journal proves is kept, the rest is given up in order.

The journal's last segment is replayed; where it is torn or damaged at its beginning, the one before it, which tells
almost the same of L2. A journal with no segment to believe is not taken for one of an empty L2. Whatever was under way
then has ended with the server: fetches failed, copies to L2 were not made, engines' requests are over. Chunks whose
pages were handed out again, in the instant before the end that the journal does not tell of, are cleared. Pages that a
worker may still be writing stay with the arena's allocator until that worker has drained its copies or is proved gone.

An arena is gone after a clean stop or a reboot, and another one where L1 is of another size. Then, and where any other
setting has changed, L1 is cleared as a whole, before anything else, and what lies in L2 is kept, or as much of it as an
L2 that is smaller now has room for: a chunk's name and checksum tell whether it is there still. A start with which what
L2 holds would be lost is refused.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvcore.live.book import GENERATION, Book, page_ids
from kvcore.live.transport import QUARANTINE
from kvcore.policy import (
    Chunk,
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
    TierCleared,
)
from kvcore.policy.snapshot import dump, reconfigured, surplus
from kvtraces.journal import (
    Engine,
    Head,
    JournalError,
    JournalWriter,
    Pages,
    Snapshot,
    Step,
    read_segment,
    restore_core,
    segments,
    take_snapshot,
)

_LOG = logging.getLogger("kvcore.server")
_OF_L2: Final = {"chunk_tokens": "--chunk-size", "page_bytes": "--page-size", "l2": "--l2"}
"""What a journal says of a server without which it does not tell what L2 holds, and the setting."""


class _Unusable(Exception):  # noqa: N818 - a reason, told in a log line
    """Why a journal does not prove what the arena holds."""


class OtherL2Error(ValueError):
    """A server would start so that what L2 holds is lost; the message says what to do instead."""


class DamagedJournalError(ValueError):
    """No segment of a journal tells what L2 holds; the message says what to do."""


@dataclass(slots=True, eq=False)
class State:
    """A core and the book of its pages."""

    core: Core
    book: Book
    now_ns: int = 0
    """Time of the last event."""
    strays: list[Chunk] = field(default_factory=list)
    """Chunks that may lie in L2 and are not kept there, as nobody was there to delete them when they were given up."""

    @classmethod
    def empty(cls, config: CoreConfig) -> "State":
        """Return the state of a server that has seen nothing."""
        return cls(Core(config), Book())


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a journal tells."""

    head: Head
    """Of the server that wrote it."""
    state: State
    has_l1: bool
    """Whether its pages are the arena's; where not, only what lies in L2 is to be kept."""

    def without_l1(self) -> "Found | None":
        """Return what is left of it where the arena is another after all."""
        return replace(self, has_l1=False) if len(self.head.config.tiers) > 1 else None

    def head_for(self, new: Head) -> Head:
        """Return the head of the segment that begins with this, written by the server of the `new` one.

        Where only L2 is kept that is the old head, until L1 is cleared and the next segment begins: a server that dies
        in between is not to be followed by one that takes the old arena's pages for the new one's.
        """
        return new if self.has_l1 else self.head


def recover(folder: Path, head: Head, *, epoch: int) -> Found | None:
    """Return what was at the end of a journal; None, with the reason logged, where nothing of it can be kept.

    Args:
        folder: The journal.
        head: Of the server that starts.
        epoch: The arena's, before it was taken over; 0 where it is new.

    Raises:
        OtherL2Error: What it tells of L2 cannot be kept under the settings of the server that starts.
        DamagedJournalError: It can no longer tell of L2: what lies there would be deleted.
    """
    reason = damage = ""
    for path in reversed(segments(folder)):
        try:
            found = _replay(path, head, epoch)
        except _Unusable as error:
            reason = str(error)
            break
        except (OtherL2Error, OSError):
            raise
        except Exception as error:  # damage and other versions show anywhere, and are told
            reason = str(error) if path.name in str(error) else f"{path.name}: {type(error).__name__}: {error}"
            damage = damage or reason
            epoch = 0  # one before it may tell of an earlier arena
        else:
            if damage:
                _LOG.warning("the journal cannot be believed to its end (%s): going on from %s", damage, path)
            return found
    if damage and len(head.config.tiers) > 1:
        raise DamagedJournalError(
            f"it does not tell any more what lies in L2 ({damage}): remove the folder, which gives up what L2 holds"
        )
    if reason:
        _LOG.warning("journal %s does not tell what the arena or L2 holds (%s): starting empty", folder, reason)
    return None


def _replay(path: Path, new: Head, epoch: int) -> Found:
    head: Head | None = None
    state: State | None = None
    has_l1 = False
    placed: deque[Place | Load] = deque()
    try:
        for located in read_segment(path):
            record = located.record
            match record:
                case Head():
                    has_l1 = _has_l1(record, new, epoch)
                    head, state = record, None if record.has_snapshot else State.empty(record.config)
                case Snapshot() if head is not None:
                    state = State(restore_core(head, record), Book.restore(record.pages))
                case Step() if state is not None:
                    if apply(state, record.event) != record.decisions:
                        raise ValueError(f"{path.name} at byte {located.offset} does not replay")
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
                case Engine() if state is not None:
                    pass  # the engines that run now say it again
                case _:
                    raise ValueError(f"{path.name} at byte {located.offset}: no head and state before it")
    except JournalError as error:
        if state is None:
            raise
        _LOG.warning("the journal ends at %s", error)
    if head is None or state is None:
        raise JournalError(f"{path.name} ends within what it begins with")
    found = Found(head, state, has_l1)
    _check_l2(found, new, path.parent)
    return found


def _has_l1(old: Head, new: Head, epoch: int) -> bool:
    """Return whether a journal tells what the arena holds; raise _Unusable where it tells of nothing else."""
    same_chunks = all(old.meta.get(key) == new.meta.get(key) for key in ("page_bytes", "chunk_tokens"))
    if same_chunks and epoch and old.meta.get("epoch") == epoch and old.config == new.config:
        return True
    if len(old.config.tiers) == 1:
        raise _Unusable("it is of another arena" if same_chunks else "its chunks or pages are of another size")
    return False


def _check_l2(found: Found, new: Head, folder: Path) -> None:
    """Raise OtherL2Error where what lies in L2 would be lost, and _Unusable where that is nothing.

    The same names are other bytes where a chunk has more tokens, and take other room where pages are larger. What is
    deleted from a folder is what the journal does not tell of, so it must not come to tell of another one.
    """
    old, below = found.head, found.state.core.tiers[1:]
    changed = [key for key in _OF_L2 if old.meta.get(key) != new.meta.get(key)]
    if not changed:
        return
    if any(tier.resident for tier in below):
        was = ", ".join(f"{_OF_L2[key]} {old.meta.get(key)} (now {new.meta.get(key) or 'none'})" for key in changed)
        raise OtherL2Error(
            f"the journal {folder} tells what lies in {old.meta.get('l2')}, with {was}: go back to that, or start "
            f"with another --journal and another --l2, or remove the journal, which gives up what L2 holds"
        )
    if not found.has_l1:
        raise _Unusable("it is of another arena, and of an L2 that is empty")


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


def go_on(journal: JournalWriter, found: Found, head: Head, generations: NDArray[np.uint64], now_ns: int) -> State:
    """Write down and carry out what ended with the earlier server; return the state in which the next one starts.

    `journal` is at a new segment that begins with what was found, under `found.head_for(head)`. Without L1 it is in the
    next one, under `head`, when this returns.
    """
    state = found.state
    _carry_out(journal, state, end_of_what_was_under_way(state, now_ns, has_l1=found.has_l1))
    if not found.has_l1:
        if state.core.config != head.config:
            if chunks := surplus(state.core, head.config):
                _carry_out(journal, state, [Cleared(now_ns=now_ns, chunks=chunks)])
            state.core = reconfigured(state.core, head.config)
        journal.head = head
        journal.rotate(take_snapshot(state.core, state.book.dump()))
    elif (changed := clear_of_changed(state, generations, now_ns)) is not None:
        _carry_out(journal, state, [changed])
    journal.flush()
    return state


def _carry_out(journal: JournalWriter, state: State, events: Iterable[Event]) -> None:
    for event in events:
        decisions = apply(state, event)
        journal.step(event, decisions)
        if isinstance(event, StoreAborted) and event.tier:  # it may have been written just before the end
            state.strays += event.chunks
        for decision in decisions:
            if isinstance(decision, Evict) and decision.tier:
                state.strays += decision.chunks


def end_of_what_was_under_way(state: State, now_ns: int, *, has_l1: bool = True) -> Iterator[Event]:
    """Yield the events that end everything that died with the server, each to be applied before the next is asked for.

    Without L1 it is cleared first. What was on its way there is then given up without a word of its source, and nothing
    is copied down from there when a request ends.
    """
    core = state.core
    dumped = dump(core)
    fetches = [(one["name"], one["fetching"]) for one in dumped["requests"]]
    fetches += [(name, fetching) for name, _, _, _, fetching in dumped["lost"]]
    if not has_l1:
        yield TierCleared(now_ns=now_ns, tier=0)
    for request, chunks in fetches:
        if not chunks:
            continue
        if has_l1:
            yield LoadFailed(now_ns=now_ns, request=request, tier=1, chunks=tuple(chunks), gone=False)
        else:
            yield StoreAborted(now_ns=now_ns, request=request, tier=0, chunks=tuple(chunks))
    for _, name, *_ in dumped["instances"]:
        yield InstanceLeft(now_ns=now_ns, instance=name)
    for index, tier in enumerate(core.tiers[1:], 1):  # last: with its engine a request ends, and is copied down
        if tier.writing:
            yield StoreAborted(now_ns=now_ns, request="", tier=index, chunks=tuple(tier.writing))


def clear_of_changed(state: State, generations: NDArray[np.uint64], now_ns: int) -> Cleared | None:
    """Return the event that drops the chunks whose pages are no longer of their generations, if there are any."""
    changed = [
        chunk
        for chunk, room in state.book.resident.items()
        if not np.array_equal(generations[page_ids([room])], np.frombuffer(room.generations, GENERATION))
    ]
    return Cleared(now_ns=now_ns, chunks=tuple(changed)) if changed else None
