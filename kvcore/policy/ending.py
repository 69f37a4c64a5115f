"""The end of a request: well, or because its engine is not heard of any more."""

from collections.abc import Iterable

from kvcore.policy.decisions import RefuseReason
from kvcore.policy.events import InstanceLeft, LeaseExpired, RequestEnded
from kvcore.policy.request import Request
from kvcore.policy.room import evicted, refuse, write_through
from kvcore.policy.state import Lost, State
from kvcore.policy.tier import Entry
from kvcore.policy.types import Chunk


def request_ended(state: State, event: RequestEnded) -> None:
    """A request asks for no more room."""
    request = state.requests.get(event.request)
    if request is not None:
        request.ended = True
        finish(state, request)


def lease_expired(state: State, event: LeaseExpired) -> None:
    """A request's worker is not heard of."""
    request = state.requests.get(event.request)
    if request is not None:
        void(state, request, request.writing, request.writing, "lease")
        give_up(state, request)


def instance_left(state: State, event: InstanceLeft) -> None:
    """Nobody of the instance's reads or writes any more."""
    state.instances.pop(event.instance, None)
    for request in [r for r in state.requests.values() if r.instance == event.instance]:
        void(state, request, request.writing, request.writing, "left")
        give_up(state, request)
    for name in [name for name, lost in state.lost.items() if lost.instance == event.instance]:
        lost = state.lost[name]
        written = tuple(chunk for chunk in lost.entries if chunk not in lost.fetching)
        lost.reason = "left"
        settle_lost(state, name, written)


def give_up(state: State, request: Request) -> None:
    """End a request whose engine is not expected to say anything more."""
    request.ended = True
    request.loading = 0
    finish(state, request)


def finish(state: State, request: Request) -> None:
    """Once nothing of an ended request is under way, tell the policies what it used and let go of it."""
    if not request.ended or request.busy:
        return
    del state.requests[request.name]
    top = state.tiers[0]
    new: list[Entry] = []
    if request.new:
        mine, there = request.new.get, top.resident.get
        new = [e for chunk in reversed(request.chunks) if (e := mine(chunk)) is not None and there(chunk) is e]
        if len(new) < len(request.new):  # some were cleared meanwhile, or are no part of the prompt
            known = dict.fromkeys(request.chunks)
            new[:0] = [e for chunk, e in request.new.items() if chunk not in known and there(chunk) is e]
    if new:
        top.insert(new, state.now_ns)
        write_through(state, 0, new, request.name)
    if not request.resumed:
        for tier, found in zip(state.tiers, request.found, strict=True):
            # One that a request still at work has stored is not known to the policy yet, and will be the newest.
            tier.touch([entry.chunk for entry in reversed(found) if entry.entered], state.now_ns)
    for chunk, entry in request.passing.items():
        if top.resident.get(chunk) is entry:
            top.remove((chunk,), "passing")
    evicted(state, 0, top.unpin(request.held))
    for index, found in enumerate(request.found):
        evicted(state, index, state.tiers[index].unpin(found))


def void(
    state: State, request: Request, entries: dict[Chunk, Entry], chunks: Iterable[Chunk], reason: RefuseReason
) -> None:
    """Stop believing in what is being written to `chunks`; their pages stay taken until the writer is done."""
    for chunk in tuple(chunks):
        lost = state.lost.setdefault(request.name, Lost(request.instance, reason))
        del state.tiers[0].writing[chunk]
        lost.entries[chunk] = entries.pop(chunk)
        if entries is request.fetching:
            lost.fetching[chunk] = None


def settle_lost(state: State, name: str, chunks: Iterable[Chunk]) -> bool:
    """Free the pages of voided writes that have ended; return whether the request had any."""
    lost = state.lost.get(name)
    if lost is None:
        return False
    done = tuple(chunk for chunk in chunks if chunk in lost.entries)
    state.tiers[0].release([*map(lost.entries.pop, done)])
    for chunk in done:
        lost.fetching.pop(chunk, None)
    refuse(state, name, 0, done, lost.reason)
    if not lost.entries:
        del state.lost[name]
    return True
