"""The SimPy shell of the policy core: a clock, a transport, and the two sides that they join."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvcore.policy import (
    Chunk,
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
from kvsim.engine.job import Job
from kvsim.engine.links import Link

if TYPE_CHECKING:
    from kvsim.engine.engine import Engine


OUTPUT = "+output"
"""Ends the name under which a request's output is stored."""


class SimClock:
    """SimPy's time, in ns."""

    def __init__(self, env: Any) -> None:
        self._env = env

    def now_ns(self) -> int:
        """Return the simulated time, in ns from the log's first arrival."""
        now: float = self._env.now
        return round(1e9 * now)


class Shell:
    """Moves the chunks that the core decides about over simulated links; it knows no policy.

    Args:
        env: The SimPy environment.
        config: The core's configuration.
        engines: Which share the cache.
        lower: The link to the lower tiers.
        chunk_tokens: Tokens of a chunk.
        chunk_bytes: Bytes of a chunk.
        chunk_pages: Pages of a chunk.
    """

    def __init__(
        self,
        env: Any,
        config: CoreConfig,
        engines: "Sequence[Engine]",
        *,
        lower: Link | None,
        chunk_tokens: int,
        chunk_bytes: int,
        chunk_pages: int,
    ) -> None:
        self._clock = SimClock(env)
        self._engines = engines
        self._lower = lower
        self._chunk_tokens = chunk_tokens
        self._chunk_bytes = chunk_bytes
        self._jobs: dict[str, Job] = {}
        self._fetches: dict[Chunk, None] = {}
        """Chunks on their way from a lower tier, for whichever request."""
        self._held: dict[Job, tuple[Chunk, ...]] = {}
        """Requests that wait for some of them, and what they hope to load."""
        self._names = [f"engine-{engine.number}" for engine in engines]
        self.driver = Driver(Core(config), self)
        self.refused: dict[str, int] = {}
        """Chunks that were not stored or not loaded, by reason."""
        self.evicted = 0
        self.stored = 0
        """Chunks written to tier 0 by engines."""
        for name in self._names:
            self.driver.handle(
                InstanceRegistered(now_ns=0, instance=name, chunk_pages=chunk_pages, chunk_bytes=chunk_bytes)
            )

    # The engine's side

    def look_up(self, job: Job, l0_tokens: int) -> None:
        """Ask what is cached of a prompt of which the engine has the first `l0_tokens` tokens."""
        self._jobs[job.name] = job
        job.ended = False
        job.run = ()
        job.run_start = l0_tokens // self._chunk_tokens
        self.driver.handle(
            LookedUp(
                now_ns=self._clock.now_ns(),
                request=job.name,
                instance=self._names[job.engine],
                chunks=job.chain,
                computed_chunks=job.run_start,
                salt=job.salt,
                queued_bytes=self._engines[job.engine].queued_bytes,
                resumed=job.preemptions > 0,
            )
        )
        if self._fetches and not job.run:
            wanted = job.chain[job.run_start : job.found]
            if not self._fetches.keys().isdisjoint(wanted):
                job.waits = True
                self._held[job] = wanted

    def loadable(self, job: Job, l0_tokens: int) -> int:
        """Return the tokens up to which a request can load what follows `l0_tokens`; 0 where it has nothing to load."""
        if not job.run:
            return 0
        end = (job.run_start + len(job.run)) * self._chunk_tokens
        if job.run_start * self._chunk_tokens <= l0_tokens < end:
            return end
        self.loaded(job)  # L0 has changed while the request waited for a lower tier: the load is of no use any more
        return 0

    def loaded(self, job: Job) -> None:
        """What a request was to load is in the engine."""
        chunks, job.run = job.run, ()
        if chunks:
            self.driver.handle(LoadDone(now_ns=self._clock.now_ns(), request=job.name, tier=0, chunks=chunks))

    def computed(self, job: Job) -> None:
        """A step has computed more of a prompt: ask room for its full chunks; say when the prompt is complete."""
        full = min(job.computed // self._chunk_tokens, len(job.chain))
        if full > job.asked:
            chunks = job.chain[job.asked : full]
            job.asked = full
            self.driver.handle(RoomAsked(now_ns=self._clock.now_ns(), request=job.name, chunks=chunks))
        if job.computed >= job.target and not job.ended:
            job.ended = True
            self.driver.handle(RequestEnded(now_ns=self._clock.now_ns(), request=job.name))

    def put_out(self, job: Job) -> None:
        """A request is over: store the full chunks that its output completed, in the name of a request of its own."""
        name = job.name + OUTPUT
        self._jobs[name] = job
        chunks = (*job.chain, *job.output_chain)
        now_ns = self._clock.now_ns()
        self.driver.handle(
            LookedUp(
                now_ns=now_ns,
                request=name,
                instance=self._names[job.engine],
                chunks=chunks,
                computed_chunks=len(chunks),
                salt=job.salt,
            )
        )
        self.driver.handle(RoomAsked(now_ns=now_ns, request=name, chunks=job.output_chain))
        self.driver.handle(RequestEnded(now_ns=now_ns, request=name))

    # The core's side

    def load(self, decision: Load) -> None:
        """Tell the engine what to load, or bring chunks up from a lower tier."""
        job = self._jobs[decision.request]
        if decision.tier == 0:
            job.run = decision.chunks
            return
        self._fetches.update(dict.fromkeys(decision.chunks))
        self._link.send(0, len(decision.chunks) * self._chunk_bytes, lambda: self._fetched(decision))

    def _fetched(self, decision: Load) -> None:
        for chunk in decision.chunks:
            del self._fetches[chunk]
        self.driver.handle(
            LoadDone(now_ns=self._clock.now_ns(), request=decision.request, tier=decision.tier, chunks=decision.chunks)
        )
        ready: dict[int, list[Job]] = {}
        for job, wanted in tuple(self._held.items()):
            if job.run or self._fetches.keys().isdisjoint(wanted):
                del self._held[job]
                job.waits = False
                ready.setdefault(job.engine, []).append(job)
        for number, jobs in ready.items():  # all of an engine's at once: they may go into one step
            self._engines[number].ready(jobs)

    def store(self, decision: Place) -> None:
        """Copy from the engine to tier 0, or down."""
        size = len(decision.chunks) * self._chunk_bytes
        if decision.tier:
            self._link.send(1, size, lambda: self._committed(decision.request, decision.tier, decision.chunks))
            return
        job = self._jobs[decision.request]
        job.stores += 1
        self.stored += len(decision.chunks)
        self._engines[job.engine].link.send(1, size, lambda: self._stored(job, decision))

    def _stored(self, job: Job, decision: Place) -> None:
        self._committed(decision.request, 0, decision.chunks)
        self._engines[job.engine].stored(job)

    def _committed(self, request: str, tier: int, chunks: tuple[Chunk, ...]) -> None:
        self.driver.handle(StoreCommitted(now_ns=self._clock.now_ns(), request=request, tier=tier, chunks=chunks))

    def demote(self, decision: Demote) -> None:
        """Write to the tier below; the bytes are taken over at once, into a buffer that is never full."""
        size = len(decision.chunks) * self._chunk_bytes
        self._link.send(1, size, lambda: self._committed("", decision.tier + 1, decision.chunks))

    @property
    def _link(self) -> Link:
        if self._lower is None:
            raise RuntimeError("a lower tier without its link")
        return self._lower

    def drop(self, decision: Evict) -> None:
        """Count what is evicted: there are no pages to free."""
        if decision.tier == 0:
            self.evicted += len(decision.chunks)

    def refuse(self, decision: Refuse) -> None:
        """Count what is not stored or not loaded."""
        self.refused[decision.reason] = self.refused.get(decision.reason, 0) + len(decision.chunks)

    def matched(self, decision: Matched) -> None:
        """Learn what a lookup found; the first answer is what the log's figures count."""
        job = self._jobs[decision.request]
        if decision.request != job.name:  # its output: everything of it is in the engine
            return
        if not job.matched or not decision.resumed:
            job.matched = decision.hits
        job.found = sum(decision.hits)
        job.asked = decision.hits[0] if not any(decision.hits[1:]) else 0
