"""What instances and operators say, beside requests."""

from collections.abc import Iterable, Sequence

from kvcore.policy.ending import void
from kvcore.policy.events import Cleared, InstanceRegistered, Pinned
from kvcore.policy.loads import go_on, not_fetched
from kvcore.policy.request import Request
from kvcore.policy.room import evicted, take_out
from kvcore.policy.state import State
from kvcore.policy.types import Chunk


def registered(state: State, event: InstanceRegistered) -> None:
    """An instance announced itself."""
    known = state.instances.get(event.instance)
    if known is not None and (known.chunk_pages, known.chunk_bytes) != (event.chunk_pages, event.chunk_bytes):
        raise ValueError(f"instance {event.instance!r} is registered with chunks of {known.chunk_bytes} bytes")
    state.instances[event.instance] = event


def cleared(state: State, event: Cleared) -> None:
    """The operator empties the cache, or takes chunks out of it."""
    if event.chunks is None:
        state.missed.clear()
    clear_tiers(state, range(len(state.tiers)), event.chunks)


def clear_tiers(state: State, indices: Sequence[int], chunks: tuple[Chunk, ...] | None) -> None:
    """Take `chunks`, or everything where None, out of some tiers, and void what is being written to them."""
    if 0 in indices:
        unpinned(state, tuple(state.tiers[0].kept) if chunks is None else chunks)
    for index in indices:
        take_out(state, index, tuple(state.tiers[index].resident) if chunks is None else chunks, "cleared")
    wanted = None if chunks is None else dict.fromkeys(chunks)
    for tier in [state.tiers[index] for index in indices if index]:
        for chunk, entry in tier.writing.items():
            if entry.entered and (wanted is None or chunk in wanted):
                tier.policy.forget((chunk,))
                tier.expiry.pop(chunk, None)
                entry.entered = False
    if 0 in indices:
        for request in tuple(state.requests.values()):
            clear_writes(state, request, wanted)


def clear_writes(state: State, request: Request, wanted: dict[Chunk, None] | None) -> None:
    """Void what is being written to tier 0 for a request, of `wanted` or all of it."""
    waiters: dict[str, Request] = {}
    for entries in (request.writing, request.fetching):
        hit = [chunk for chunk in entries if wanted is None or chunk in wanted]
        void(state, request, entries, hit, "cleared")
        if entries is request.fetching:
            for chunk in hit:
                waiters.update(not_fetched(state, request, chunk))
    go_on(state, [request, *waiters.values()])


def pinned(state: State, event: Pinned) -> None:
    """The operator keeps chunks in tier 0."""
    state.tiers[0].keep(event.chunks)


def unpinned(state: State, chunks: Iterable[Chunk]) -> None:
    """The operator keeps them no longer."""
    evicted(state, 0, state.tiers[0].let_go(chunks))
