"""Room in a tier: who leaves for what comes in, and where to."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from kvcore.policy.decisions import Demote, Evict, EvictReason, Place, Refuse, RefuseReason
from kvcore.policy.state import State
from kvcore.policy.tier import Entry
from kvcore.policy.types import Chunk


def make_room(state: State, index: int, chunks: Sequence[Chunk], pages: int, name: str, salt: str) -> int:
    """Evict for as many leading `chunks` as can be had; refuse the rest; return how many fit."""
    tier = state.tiers[index]
    fit, by_quota = tier.room_for(len(chunks), pages, salt)
    if fit:
        leave(state, index, tier.quota_victims(fit * pages, salt), "quota")
        leave(state, index, tier.victims(fit * pages), "room")
    if fit < len(chunks):
        refuse(state, name, index, tuple(chunks[fit:]), "quota" if by_quota else "room")
    return fit


def leave(state: State, index: int, victims: list[Entry], reason: EvictReason) -> None:
    """Decide where victims go: down, or away."""
    demoted: dict[Chunk, Entry] = {}
    if victims and state.config.placement == "write-back" and index + 1 < len(state.tiers):
        demoted = reserve_below(state, index, victims)
        victims = [entry for entry in victims if entry.chunk not in demoted]
    if victims:
        state.decide(Evict(tier=index, chunks=tuple(entry.chunk for entry in victims), reason=reason))
    if demoted:
        state.decide(Demote(tier=index, chunks=tuple(demoted)))


def reserve_below(state: State, index: int, entries: Sequence[Entry], name: str = "") -> dict[Chunk, Entry]:
    """Make room for `entries`, the least worth keeping first, in the tier below `index`; return those that fit."""
    lower = state.tiers[index + 1]
    placed: dict[Chunk, Entry] = {}
    missing = [entry for entry in entries if not lower.holds(entry.chunk)]
    for (pages, salt), group in groupby(missing, key=lambda entry: (entry.pages, entry.salt)):
        chunks = [entry.chunk for entry in group][::-1]
        fit = make_room(state, index + 1, chunks, pages, name, salt)
        reserved = lower.reserve(chunks[:fit][::-1], pages, salt)
        lower.insert([*reserved.values()], state.now_ns)
        placed.update(reserved)
    return placed


def write_through(state: State, index: int, entries: Sequence[Entry], name: str) -> None:
    """Copy `entries` of tier `index`, tail first, to the tier below."""
    if state.config.placement != "write-through" or index + 1 >= len(state.tiers):
        return
    placed = reserve_below(state, index, entries, name)
    sources = [entry for entry in entries if entry.chunk in placed]
    state.tiers[index].pin(sources)
    state.copying.update({(index + 1, entry.chunk): entry for entry in sources})
    if placed:
        state.decide(Place(request=name, tier=index + 1, chunks=tuple(placed)[::-1]))


def take_out(state: State, index: int, chunks: Iterable[Chunk], reason: EvictReason) -> None:
    """Take `chunks` out of a tier: at once those that nobody holds, the others when they are let go of."""
    tier = state.tiers[index]
    there = [chunk for chunk in dict.fromkeys(chunks) if chunk in tier.resident]
    evicted(state, index, tier.remove(there, reason))


def evicted(state: State, index: int, entries: Sequence[Entry]) -> None:
    """Say that `entries` have left a tier, each for its reason."""
    for reason, group in groupby(entries, key=lambda entry: entry.reason):
        state.decide(Evict(tier=index, chunks=tuple(entry.chunk for entry in group), reason=reason))


def refuse(state: State, name: str, tier: int, chunks: tuple[Chunk, ...], reason: RefuseReason) -> None:
    """Say that `chunks`, if any, are not placed or not loaded."""
    if chunks:
        state.decide(Refuse(request=name, tier=tier, chunks=chunks, reason=reason))
