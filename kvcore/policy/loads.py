"""Lookups, and the way of what they found to the engine."""

from collections.abc import Iterable, Sequence
from itertools import takewhile

from kvcore.policy.cost import chunks_worth_loading
from kvcore.policy.decisions import Load, Matched
from kvcore.policy.ending import finish, settle_lost
from kvcore.policy.events import InstanceRegistered, LoadDone, LoadFailed, LookedUp
from kvcore.policy.request import Request
from kvcore.policy.room import make_room, refuse, take_out
from kvcore.policy.state import State
from kvcore.policy.tier import Entry
from kvcore.policy.types import Chunk


class UnknownInstanceError(ValueError):
    """A lookup names an instance that never registered, or has left."""


def looked_up(state: State, event: LookedUp) -> None:
    """A request asks what is cached of its prompt."""
    known = state.requests.get(event.request)
    if known is not None:
        state.decide(known.matched)
        return
    instance = state.instances.get(event.instance)
    if instance is None:
        raise UnknownInstanceError(f"request {event.request!r}: instance {event.instance!r} is not registered")
    if event.request in state.lost:  # its old writes may still end: a new life under that name could take them over
        state.decide(Matched(request=event.request, hits=(0,) * len(state.tiers), resumed=event.resumed))
        return
    request = Request(
        name=event.request, instance=event.instance, salt=event.salt, chunks=event.chunks, resumed=event.resumed
    )
    state.requests[event.request] = request
    where = find(state, request)
    hits = tuple(where.count(tier) for tier in range(len(state.tiers))) if len(state.tiers) > 1 else (len(where),)
    request.matched = Matched(request=event.request, hits=hits, resumed=event.resumed)
    state.decide(request.matched)
    plan_loads(state, request, where, event, instance)


def find(state: State, request: Request) -> tuple[int, ...]:
    """Pin every resident chunk of the chain; return the tier of each leading hit."""
    chunks = request.chunks
    places: list[list[Entry | None]] = []
    for tier in state.tiers:
        found = [*map(tier.resident.get, chunks)]
        entries = [entry for entry in found if entry is not None] if None in found else found
        tier.pin(entries)  # type: ignore[arg-type]  # no None is left in it
        request.found.append(entries)  # type: ignore[arg-type]
        places.append(found)
    if len(places) == 1:
        first = places[0]
        return (0,) * (first.index(None) if len(request.found[0]) < len(chunks) else len(chunks))
    best = [next((i for i, entry in enumerate(row) if entry is not None), -1) for row in zip(*places, strict=True)]
    return tuple(takewhile(lambda tier: tier >= 0, best))


def plan_loads(
    state: State,
    request: Request,
    where: tuple[int, ...],
    event: LookedUp,
    instance: InstanceRegistered,
) -> None:
    """Decide which hits the engine loads, and fetch those that are not in tier 0."""
    computed, end = event.computed_chunks, len(where)
    if state.config.load_cost is not None and end > computed:
        end = chunks_worth_loading(
            state.config.load_cost,
            tiers=where,
            computed=computed,
            total=len(event.chunks),
            chunk_bytes=instance.chunk_bytes,
            queued_bytes=event.queued_bytes,
        )
        refuse(state, request.name, 0, event.chunks[end : len(where)], "recompute")
    if any(where[computed:end]):
        end = fetch(state, request, where, (computed, end), instance.chunk_pages)
    request.run = event.chunks[computed:end]
    load_when_fetched(state, request)


def fetch(state: State, request: Request, where: tuple[int, ...], run: tuple[int, int], pages: int) -> int:
    """Bring the run's hits of lower tiers to tier 0; return where the run ends if not everything can come.

    What another request fetches already is awaited, not fetched twice.
    """
    top, chunks, end = state.tiers[0], request.chunks, run[1]
    below = [i for i in range(*run) if where[i]]
    blocked = next((i for i in below if top.holds(chunks[i]) and chunks[i] not in state.fetches), None)
    if blocked is not None:  # an engine is writing that very chunk anew
        refuse(state, request.name, 0, chunks[blocked:end], "storing")
        end = blocked
    fresh = [i for i in below if i < end and chunks[i] not in state.fetches]
    fit = make_room(state, 0, [chunks[i] for i in fresh], pages, request.name, request.salt)
    if fit < len(fresh):
        end = fresh[fit]
    for chunk in [chunks[i] for i in below if i < end and chunks[i] in state.fetches]:
        state.fetches[chunk].append(request)
        request.awaited[chunk] = None
    request.fetching = top.reserve([chunks[i] for i in fresh[:fit]], pages, request.salt)
    for chunk in request.fetching:
        state.fetches[chunk] = []
    for tier in range(1, len(state.tiers)):
        wanted = tuple(chunks[i] for i in fresh[:fit] if where[i] == tier)
        if wanted:
            state.decide(Load(request=request.name, tier=tier, chunks=wanted))
    return end


def load_when_fetched(state: State, request: Request) -> None:
    """Have the engine load the run once all of it is in tier 0."""
    if request.run and not request.fetching and not request.awaited and not request.ended:
        request.loading = len(request.run)
        state.decide(Load(request=request.name, tier=0, chunks=request.run))
        request.run = ()


def go_on(state: State, requests: Iterable[Request]) -> None:
    """Some of what `requests` waited for has ended, well or not."""
    for request in requests:
        load_when_fetched(state, request)
        finish(state, request)


def load_done(state: State, event: LoadDone) -> None:
    """A load has arrived: in the engine, or in tier 0 from below."""
    request = state.requests.get(event.request)
    if event.tier == 0:
        _engine_is_through(state, request, event.chunks)
        return
    settle_lost(state, event.request, event.chunks)
    if request is None:
        return
    arrived = request.new if state.config.promote_on_hit else request.passing
    waiters: dict[str, Request] = {}
    for chunk in event.chunks:
        if request.fetching.pop(chunk, None) is None:
            continue
        (entry,) = state.tiers[0].commit((chunk,))
        arrived[chunk] = entry
        request.held.append(entry)
        for waiter in state.fetches.pop(chunk):
            del waiter.awaited[chunk]
            state.tiers[0].pin((entry,))
            waiter.held.append(entry)
            waiters[waiter.name] = waiter
    go_on(state, [request, *waiters.values()])


def _engine_is_through(state: State, request: Request | None, chunks: Sequence[Chunk]) -> None:
    """A load into the engine has ended, well or not."""
    if request is not None:
        request.loading = max(0, request.loading - len(chunks))
        finish(state, request)


def load_failed(state: State, event: LoadFailed) -> None:
    """A load has not arrived."""
    request = state.requests.get(event.request)
    if event.tier == 0:
        _engine_is_through(state, request, event.chunks)
        return
    if event.gone:
        take_out(state, event.tier, event.chunks, "failed")
    settle_lost(state, event.request, event.chunks)
    if request is None:
        return
    waiters: dict[str, Request] = {}
    for chunk in event.chunks:
        entry = request.fetching.pop(chunk, None)
        if entry is not None:
            del state.tiers[0].writing[chunk]
            state.tiers[0].release((entry,))
            waiters.update(not_fetched(state, request, chunk))
    go_on(state, [request, *waiters.values()])


def not_fetched(state: State, request: Request, chunk: Chunk) -> dict[str, Request]:
    """A chunk does not come from below: end the runs that need it before it; return the others that waited."""
    waiters = {waiter.name: waiter for waiter in state.fetches.pop(chunk)}
    for waiter in waiters.values():
        del waiter.awaited[chunk]
    for one in (request, *waiters.values()):
        if chunk in one.run:
            one.run = one.run[: one.run.index(chunk)]
    return waiters
