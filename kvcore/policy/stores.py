"""Stores: room for what an engine wants to write, and what becomes of it."""

from collections.abc import Iterable, Sequence
from itertools import repeat

from kvcore.policy.decisions import Place, RefuseReason
from kvcore.policy.ending import finish, settle_lost
from kvcore.policy.events import RoomAsked, StoreAborted, StoreCommitted
from kvcore.policy.room import evicted, make_room, refuse, write_through
from kvcore.policy.state import State
from kvcore.policy.tier import Entry
from kvcore.policy.types import Chunk


def room_asked(state: State, event: RoomAsked) -> None:
    """A request wants to write chunks to tier 0."""
    request = state.requests.get(event.request)
    if request is None or request.ended:
        refuse(state, event.request, 0, event.chunks, "unknown")
        return
    tier = state.tiers[0]
    wanted: Sequence[Chunk] = event.chunks
    busy = tier.writing or tier.leaving or event.request in state.lost
    if busy or state.config.admission != "always" or not tier.resident.keys().isdisjoint(wanted):
        wanted = sort_out(state, event)
    if not wanted:
        return
    pages = state.instances[request.instance].chunk_pages
    fit = make_room(state, 0, wanted, pages, request.name, request.salt)
    if fit:
        placed = tuple(wanted[:fit])
        request.writing.update(tier.reserve(placed, pages, request.salt))
        state.decide(Place(request=request.name, tier=0, chunks=placed))


def sort_out(state: State, event: RoomAsked) -> list[Chunk]:
    """Return the chunks of an ask that are to be written, refusing the others."""
    tier, second_use = state.tiers[0], state.config.admission == "second-use"
    lost = state.lost.get(event.request)
    wanted: list[Chunk] = []
    others: dict[RefuseReason, list[Chunk]] = {}
    for chunk in event.chunks:
        if chunk in tier.resident:
            others.setdefault("resident", []).append(chunk)
        elif chunk in tier.writing:
            others.setdefault("storing", []).append(chunk)
        elif chunk in tier.leaving or (lost is not None and chunk in lost.entries):
            others.setdefault("cleared", []).append(chunk)
        elif second_use and chunk not in state.missed:
            others.setdefault("first_use", []).append(chunk)
            state.missed[chunk] = None
        else:
            wanted.append(chunk)
    while len(state.missed) > state.config.admission_memory:
        state.missed.popitem(last=False)
    for reason, chunks in others.items():
        refuse(state, event.request, 0, tuple(chunks), reason)
    return wanted


def store_committed(state: State, event: StoreCommitted) -> None:
    """Chunks are written."""
    if event.tier:
        copied(state, event)
        return
    request = state.requests.get(event.request)
    settled = settle_lost(state, event.request, event.chunks)
    if request is None:
        if not settled:
            refuse(state, event.request, 0, event.chunks, "unknown")
        return
    written: Sequence[Chunk] = event.chunks
    asked = [*map(request.writing.pop, written, repeat(None))]
    if None in asked:
        written = [chunk for chunk, entry in zip(written, asked, strict=True) if entry is not None]
    arrived = state.tiers[0].commit(written)
    request.new.update(zip(written, arrived, strict=True))
    request.held += arrived
    finish(state, request)


def copied(state: State, event: StoreCommitted) -> None:
    """A lower tier has taken over chunks."""
    tier = state.tiers[event.tier]
    arrived: list[Entry] = []
    for chunk in reversed(event.chunks):
        if chunk not in tier.writing:
            continue
        (entry,) = tier.commit((chunk,))
        if not entry.entered:  # cleared on its way
            tier.remove((chunk,), "cleared")
        else:
            arrived.append(entry)
        evicted(state, event.tier, tier.unpin((entry,)))
    release_sources(state, event.tier, event.chunks)
    write_through(state, event.tier, arrived, event.request)


def release_sources(state: State, index: int, chunks: Iterable[Chunk]) -> None:
    """The copy of `chunks` into a tier has ended, well or not: let go of where they came from."""
    sources = [entry for chunk in chunks if (entry := state.copying.pop((index, chunk), None)) is not None]
    evicted(state, index - 1, state.tiers[index - 1].unpin(sources))


def store_aborted(state: State, event: StoreAborted) -> None:
    """Chunks will not be written."""
    tier = state.tiers[event.tier]
    if event.tier:
        for chunk in event.chunks:
            entry = tier.writing.pop(chunk, None)
            if entry is not None:
                tier.abandon(entry)
        release_sources(state, event.tier, event.chunks)
        return
    request = state.requests.get(event.request)
    settle_lost(state, event.request, event.chunks)
    if request is None:
        return
    for chunk in event.chunks:
        entry = request.writing.pop(chunk, None)
        if entry is not None:
            del tier.writing[chunk]
            tier.release((entry,))
    finish(state, request)
