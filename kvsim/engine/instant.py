"""The shell in which nothing takes time: every copy has ended as soon as it is decided.

What the core does with a log when requests do not overlap: the exact hits, and the reference of the fast sweep.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvcore.policy import (
    Core,
    CoreConfig,
    Demote,
    Driver,
    Evict,
    InstanceRegistered,
    Load,
    LoadDone,
    LookedUp,
    Matched,
    Place,
    Refuse,
    RequestEnded,
    RoomAsked,
    StoreCommitted,
)
from kvsim.engine.chunks import chunk_chains, salts
from kvtraces import Log

INSTANCE = "engine-0"


class InstantTransport:
    """Ends every copy from within the call that asks for it, at the time `now_ns`."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.hits: tuple[int, ...] = ()
        """What the last lookup found, by tier."""
        self.driver: Driver | None = None

    def _report(self, event: LoadDone | StoreCommitted) -> None:
        if self.driver is None:
            raise RuntimeError("a transport without its driver")
        self.driver.handle(event)

    def load(self, decision: Load) -> None:
        """Copy towards the engine: done."""
        self._report(LoadDone(now_ns=self.now_ns, request=decision.request, tier=decision.tier, chunks=decision.chunks))

    def store(self, decision: Place) -> None:
        """Copy away from the engine, or down: done."""
        self._report(
            StoreCommitted(now_ns=self.now_ns, request=decision.request, tier=decision.tier, chunks=decision.chunks)
        )

    def demote(self, decision: Demote) -> None:
        """Copy to the tier below: done."""
        self._report(StoreCommitted(now_ns=self.now_ns, request="", tier=decision.tier + 1, chunks=decision.chunks))

    def drop(self, decision: Evict) -> None:
        """Free pages: there are none here."""

    def refuse(self, decision: Refuse) -> None:
        """Learn what is not stored: nothing is to be done."""

    def matched(self, decision: Matched) -> None:
        """Learn what a lookup found."""
        self.hits = decision.hits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CoreResult:
    """What the core found of a log of n requests in its t tiers.

    Attributes:
        chunk_tokens: Tokens of a chunk.
        accesses: [n] full chunks of each prompt.
        hits: [n, t] leading chunks found in each tier.
        input_tokens: Prompt tokens of all requests.
    """

    chunk_tokens: int
    accesses: NDArray[np.int64]
    hits: NDArray[np.int64]
    input_tokens: int

    @property
    def hit_chunks(self) -> NDArray[np.int64]:
        """[n] leading chunks found, in whichever tier."""
        return np.asarray(self.hits.sum(axis=1), dtype=np.int64)

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens of all leading chunks found."""
        return int(self.hits.sum()) * self.chunk_tokens

    @property
    def token_hit_ratio(self) -> float:
        """Share of all prompt tokens."""
        return self.hit_tokens / self.input_tokens if self.input_tokens else 0.0


def simulate_core(log: Log, config: CoreConfig, chunk_tokens: int) -> CoreResult:
    """Run a log through the core, one request after the other, each taking no time.

    Each request is looked up, asks room for every missing chunk, stores what it got, and ends, at its own timestamp
    (TTLs count from it).

    Args:
        log: The requests, in the order of their lookups.
        config: Tiers in pages (of a chunk each), policies and the rest.
        chunk_tokens: Tokens of a chunk.

    Raises:
        UsageError: The log has lengths alone, or a chunk is no whole number of its blocks.
    """
    chains = chunk_chains(log, chunk_tokens)
    transport = InstantTransport()
    driver = transport.driver = Driver(Core(config), transport)
    driver.handle(InstanceRegistered(now_ns=0, instance=INSTANCE, chunk_pages=1, chunk_bytes=0))
    hits = np.array(list(_replay(log, chains, driver, transport)), dtype=np.int64)
    return CoreResult(
        chunk_tokens=chunk_tokens,
        accesses=np.array([len(chain) for chain in chains], dtype=np.int64),
        hits=hits.reshape(len(log), len(config.tiers)),
        input_tokens=int(log.input_tokens.sum()),
    )


def _replay(
    log: Log, chains: list[tuple[int, ...]], driver: Driver, transport: InstantTransport
) -> Iterator[tuple[int, ...]]:
    tiers = driver.core.tiers
    times = np.maximum.accumulate(np.rint(1e6 * (log.timestamp_ms - log.timestamp_ms[:1])).astype(np.int64)).tolist()
    for i, (chain, now_ns, salt) in enumerate(zip(chains, times, salts(log), strict=True)):
        name = str(i)
        transport.now_ns = now_ns
        driver.handle(LookedUp(now_ns=now_ns, request=name, instance=INSTANCE, chunks=chain, salt=salt))
        yield transport.hits
        resident = tiers[0].resident
        missing = tuple(chunk for chunk in chain if chunk not in resident)
        if missing:
            driver.handle(RoomAsked(now_ns=now_ns, request=name, chunks=missing))
        driver.handle(RequestEnded(now_ns=now_ns, request=name))
