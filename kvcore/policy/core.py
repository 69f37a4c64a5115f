"""The core: events in, decisions out."""

from collections.abc import Iterable, Iterator
from typing import assert_never

from kvcore.policy import ending, loads, operator, stores
from kvcore.policy.config import CoreConfig
from kvcore.policy.decisions import Decision
from kvcore.policy.events import (
    Cleared,
    Event,
    InstanceLeft,
    InstanceRegistered,
    LeaseExpired,
    LoadDone,
    LoadFailed,
    LookedUp,
    Pinned,
    QuotaSet,
    RequestEnded,
    RoomAsked,
    StoreAborted,
    StoreCommitted,
    TierCleared,
    Unpinned,
)
from kvcore.policy.invariants import check
from kvcore.policy.room import evicted
from kvcore.policy.state import State
from kvcore.policy.tier import Tier
from kvcore.policy.types import Chunk


class Core:
    """Decides what is cached where and what is evicted.

    A pure state machine: `handle` is the only mutator, time comes with the events, nothing is drawn at random, and
    decisions are equal for equal events. The semantics, for every policy: a lookup hits the leading resident chunks
    and pins every resident chunk of its chain; room is made inside the ask, and what does not fit is the tail; stored
    chunks can be matched from their commit, and enter the policy together when the request's stores have ended, tail to
    head; then the chunks found at the lookup are touched, tail to head, so that a prefix outlives its extensions.
    """

    def __init__(self, config: CoreConfig) -> None:
        self._state = State(config)

    @property
    def config(self) -> CoreConfig:
        """The configuration that the core was made with."""
        return self._state.config

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The tiers, to be read: what is in them and how full they are."""
        return self._state.tiers

    def handle(self, event: Event) -> tuple[Decision, ...]:  # noqa: C901, PLR0912 - one case for each event
        """Take in one event and return what is decided, in the order in which it is to be carried out.

        Raises:
            UnknownInstanceError: A lookup of an instance that is not registered; nothing has changed.
            ValueError: An instance registers again with chunks of another size; nothing has changed.
        """
        state = self._state
        state.now_ns = event.now_ns
        state.decisions = []
        if state.config.ttl_ns is not None:
            for index, tier in enumerate(state.tiers):
                evicted(state, index, tier.expired(event.now_ns))
        match event:
            case LookedUp():
                loads.looked_up(state, event)
            case RoomAsked():
                stores.room_asked(state, event)
            case StoreCommitted():
                stores.store_committed(state, event)
            case LoadDone():
                loads.load_done(state, event)
            case RequestEnded():
                ending.request_ended(state, event)
            case StoreAborted():
                stores.store_aborted(state, event)
            case LoadFailed():
                loads.load_failed(state, event)
            case LeaseExpired():
                ending.lease_expired(state, event)
            case InstanceRegistered():
                operator.registered(state, event)
            case InstanceLeft():
                ending.instance_left(state, event)
            case Cleared():
                operator.cleared(state, event)
            case TierCleared():
                operator.clear_tiers(state, (event.tier,), None)
            case Pinned():
                operator.pinned(state, event)
            case Unpinned():
                operator.unpinned(state, event.chunks)
            case QuotaSet():
                state.tiers[0].set_quota(event.salt, event.pages)
            case _:
                assert_never(event)
        return tuple(state.decisions)

    def check(self) -> None:
        """Verify every invariant of the state; raises AssertionError naming the one that does not hold."""
        check(self._state)

    def where(self, chunk: Chunk) -> int | None:
        """Return the first tier in which a chunk can be matched, None where there is none."""
        return next((index for index, tier in enumerate(self.tiers) if chunk in tier.resident), None)

    def due(self, now_ns: int) -> bool:
        """Whether chunks have expired that are still there: the next event, whatever it is, lets them leave."""
        return any(tier.due(now_ns) for tier in self.tiers)

    def knows(self, request: str) -> bool:
        """Whether a request of that name holds anything: a lookup under it is answered by what was decided for that."""
        return request in self._state.requests or request in self._state.lost

    def requests(self) -> Iterator[tuple[str, str]]:
        """Yield the name and the instance of every request that holds anything."""
        yield from [(request.name, request.instance) for request in self._state.requests.values()]
        yield from [(name, lost.instance) for name, lost in self._state.lost.items()]


def replay(core: Core, events: Iterable[Event]) -> Iterator[tuple[Event, tuple[Decision, ...]]]:
    """Feed `events` to `core` and yield each with its decisions: what was decided live is decided again."""
    for event in events:
        yield event, core.handle(event)
