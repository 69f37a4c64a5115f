"""A worker's half of the connectors: copies, checked by generations, and their acknowledgements.

What the scheduler's half plans is carried out here and nothing is decided. A copy counts, in logs, metrics and
acknowledgements, when its bytes have arrived and the pages were the chunk's before and after.
"""

import logging
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvcore.live.arena import Arena, ArenaError
from kvcore.live.wire import Registered
from kvcore.vllm.jobs import Copy, StepPlan, StepReport
from kvcore.vllm.links import WorkerLink
from kvcore.vllm.mover import Cache, Mover, TransferFactory
from kvcore.vllm.stats import Counters
from kvkernels import Handle, LayoutError

_LOG = logging.getLogger("kvcore.vllm")


@dataclass(slots=True)
class _Running:
    """A copy under way."""

    copy: Copy
    handle: Handle
    mover: Mover
    started: float
    valid: NDArray[np.bool_]
    """Chunks whose pages were of the right generation before the copy, and are copied."""


class WorkerSide:
    """Copies for one rank.

    Args:
        cache: The engine's KV cache.
        rank: The worker's rank among those of its instance.
        shards: Parts of a chunk; ranks from there on hold the same KV as rank 0 and store nothing.
        factory: Makes the backend that copies.
        copy_thread: Whether asynchronous loads need a thread, since the backend's calls return when they are done.
        layerwise: Whether attention waits for its own layer's load only (`wait_for_layer`), or the step for all.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        rank: int,
        shards: int,
        factory: TransferFactory,
        copy_thread: bool,
        layerwise: bool = False,
    ) -> None:
        self._cache = cache
        self._rank = rank
        self._shard = rank if rank < shards else 0
        self._stores = rank < shards
        self._factory = factory
        self._layerwise = layerwise
        self._link: WorkerLink | None = None
        self._mover: Mover | None = None
        self._unusable: Registered | None = None
        self._lock = threading.Lock()
        """Held while a copy begins: `drain` must not return in between."""
        self._thread = ThreadPoolExecutor(1, "kvcore-load") if copy_thread else None
        self._loading: list[_Running] = []
        self._storing: list[_Running] = []
        self._released: set[str] = set()
        self._received: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._failed_steps = 0
        self._report = StepReport()
        self.counters = Counters()

    def connect(self, link: WorkerLink) -> None:
        """Set the line to the server, whose `drain` is this object's."""
        self._link = link

    def drain(self) -> None:
        """Return when no copy begun before is under way; called from another thread, when the server is away."""
        with self._lock:
            running = [*self._loading, *self._storing]
        for one in running:
            one.handle.wait()

    # A step, in this order

    def preempt(self, plan: StepPlan) -> None:
        """Order the step's work behind the reading of blocks that are free from this step on."""
        gone = frozenset(plan.preempted)
        for one in self._storing:
            if one.copy.name in gone:
                one.handle.wait_sources()

    def start_loads(self, plan: StepPlan) -> None:
        """Begin the step's loads; on a backend that works in the calling thread they end here."""
        for copy in plan.loads:
            self._begin_load(copy)
        self._end_loads()
        if not self._layerwise:
            for one in self._loading:
                if not one.copy.asynchronous:
                    for layer in range(one.mover.layout.num_layers):
                        one.handle.wait_layer(layer)

    def wait_for_layer(self, layer_name: str) -> None:
        """Order the loads of one layer before its attention."""
        if not self._layerwise or not self._loading:
            return
        layer = self._cache.layer_of.get(layer_name)
        for one in self._loading:
            if layer is not None and not one.copy.asynchronous:
                one.handle.wait_layer(layer)

    def finish_step(self, plan: StepPlan) -> None:
        """End the step's synchronous loads and begin its stores."""
        for one in self._loading:
            if not one.copy.asynchronous:
                one.handle.wait()
        self._end_loads()
        seen = plan.failures_seen.get(self._rank, 0)
        for copy in plan.stores:
            self._begin_store(copy, trusted=seen >= self._failed_steps)
        self._end_stores()
        self._released.update(plan.released)

    def finished(self) -> tuple[set[str], set[str]]:
        """Return the requests whose stores have ended for good, and those whose asynchronous loads have ended."""
        self._end_loads()
        self._end_stores()
        storing = {one.copy.request for one in self._storing}
        sent = self._released - storing
        self._released &= storing
        received, self._received = self._received, set()
        return sent, received

    def bad_blocks(self) -> set[int]:
        """Return the blocks that were to be loaded and were not, since the last call."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def report(self) -> StepReport | None:
        """Return what the scheduler's half is to know of this step."""
        report, self._report = self._report, StepReport()
        if self._failed_steps:
            report.failures[self._rank] = self._failed_steps
        return report if report.failures or report.load_seconds else None

    def close(self) -> None:
        """Wait for what is under way and leave the server."""
        before = self._end_all()
        if before is not None:
            before.arena.close()
        if self._thread is not None:
            self._thread.shutdown()
        if self._link is not None:
            self._link.leave()

    # Copies

    def _current(self, epoch: int) -> Mover | None:
        """Return the mover of the registration at hand; None where it is not of `epoch`, or nobody is registered."""
        registered = None if self._link is None else self._link.registered
        if registered is None or registered.epoch != epoch or registered is self._unusable:
            return None
        if self._mover is None or self._mover.registered is not registered:
            before = self._end_all()
            same = before is not None and before.registered.epoch == registered.epoch
            try:
                arena = before.arena if before is not None and same else Arena.attach(Path(registered.arena_path))
                self._mover = Mover(self._cache, registered, self._shard, self._factory, arena)
            except (ArenaError, LayoutError, ValueError) as error:
                self._unusable = registered
                _LOG.error("kvcore cannot use the server's arena, nothing is loaded or stored: %s", error)
            if before is not None and not same:
                before.arena.close()
        return self._mover

    def _end_all(self) -> Mover | None:
        """End what is under way in the registration before; return its mover, closed but for the arena."""
        for one in [*self._loading, *self._storing]:
            one.handle.wait()
        self._end_loads()
        self._end_stores()
        before, self._mover = self._mover, None
        if before is not None:
            before.close()
        return before

    def warm_up(self) -> bool:
        """Map the arena now rather than in the first request; return whether it is mapped, as it is not while away."""
        registered = None if self._link is None else self._link.registered
        if registered is None:
            return False
        with self._lock:
            return self._current(registered.epoch) is not None

    def _begin_load(self, copy: Copy) -> None:
        with self._lock:
            mover = self._current(copy.epoch)
            if mover is None:
                self._load_failed(copy, np.ones(len(copy.chunks), bool))
                return
            valid = self._generations_hold(mover, copy)
            handle: Handle = _NOTHING
            started = time.perf_counter()
            if valid.any():
                pages, blocks = copy.pages[valid], copy.blocks[valid]
                if copy.asynchronous and self._thread is not None:
                    handle = _InThread(self._thread.submit(mover.load, pages, blocks))
                else:
                    handle = mover.load(pages, blocks)
            self._loading.append(_Running(copy, handle, mover, started, valid))

    def _begin_store(self, copy: Copy, *, trusted: bool) -> None:
        if not self._stores:
            return
        with self._lock:
            mover = self._current(copy.epoch) if trusted else None
            if mover is None:
                self._store_failed(copy, np.ones(len(copy.chunks), bool))
                return
            valid = self._generations_hold(mover, copy)
            started = time.perf_counter()
            handle = mover.store(copy.pages[valid], copy.blocks[valid]) if valid.any() else _NOTHING
            self._storing.append(_Running(copy, handle, mover, started, valid))

    @staticmethod
    def _generations_hold(mover: Mover, copy: Copy) -> NDArray[np.bool_]:
        """Return for every chunk whether its pages are still those that the server told of."""
        return np.asarray((mover.arena.generations[copy.pages] == copy.generations).all(axis=1))

    def _end_loads(self) -> None:
        for one in [one for one in self._loading if one.handle.done()]:
            self._loading.remove(one)
            good = one.valid & self._generations_hold(one.mover, one.copy)
            # What lies behind a chunk that failed is computed anew, whether it arrived or not.
            good = np.logical_and.accumulate(good)
            self._loaded(one, good)
            if not good.all():
                self._load_failed(one.copy, ~good)
            if one.copy.asynchronous:
                self._received.add(one.copy.request)

    def _loaded(self, one: _Running, good: NDArray[np.bool_]) -> None:
        copy, seconds = one.copy, time.perf_counter() - one.started
        self._report.load_seconds[copy.request] = seconds
        if self._link is None or not good.any():
            return
        blocks = copy.blocks[good]
        tokens, size = int((blocks >= 0).sum()) * self._cache.block_tokens, one.mover.block_bytes(blocks)
        self.counters.loaded_tokens += self._counted(tokens)
        self.counters.loaded_bytes += size
        self.counters.load_seconds += seconds
        names = _chosen(copy.chunks, good)
        self._link.loaded(copy.name, names, tokens=tokens, nbytes=size, seconds=seconds, epoch=copy.epoch)
        _LOG.info(
            "Retrieved %d tokens of request %s: %d bytes from %s in %.6f s%s",
            tokens, copy.request, size, _tiers(copy.tiers), seconds, self._where(),
        )  # fmt: skip

    def _load_failed(self, copy: Copy, failed: NDArray[np.bool_]) -> None:
        blocks = copy.blocks[failed]
        bad = blocks[blocks >= 0].tolist()
        self._bad_blocks.update(bad)
        self.counters.failed_tokens += self._counted(len(bad) * self._cache.block_tokens)
        if not copy.asynchronous:
            self._failed_steps += 1
        elif failed.all():
            self._received.add(copy.request)
        if self._link is not None:
            self._link.load_failed(copy.name, _chosen(copy.chunks, failed), epoch=copy.epoch)
        _LOG.warning(
            "Request %s: %d tokens are computed, not loaded: the server is away, or gave their pages to others",
            copy.request, len(bad) * self._cache.block_tokens,
        )  # fmt: skip

    def _end_stores(self) -> None:
        for one in [one for one in self._storing if one.handle.done()]:
            self._storing.remove(one)
            good = one.valid & self._generations_hold(one.mover, one.copy)
            if good.any():
                self._stored(one, good)
            if not good.all():
                self._store_failed(one.copy, ~good)

    def _stored(self, one: _Running, good: NDArray[np.bool_]) -> None:
        copy, seconds = one.copy, time.perf_counter() - one.started
        blocks = copy.blocks[good]
        tokens, size = blocks.size * self._cache.block_tokens, one.mover.block_bytes(blocks)
        self.counters.stored_tokens += self._counted(tokens)
        self.counters.stored_bytes += size
        self.counters.store_seconds += seconds
        if self._link is not None:
            names = _chosen(copy.chunks, good)
            self._link.committed(copy.name, names, tokens=tokens, nbytes=size, seconds=seconds, epoch=copy.epoch)
        _LOG.info(
            "Stored %d tokens of request %s: %d bytes to L1 in %.6f s%s",
            tokens, copy.request, size, seconds, self._where(),
        )  # fmt: skip

    def _store_failed(self, copy: Copy, failed: NDArray[np.bool_]) -> None:
        self.counters.aborted_tokens += self._counted(
            int(failed.sum()) * copy.blocks.shape[1] * self._cache.block_tokens
        )
        if self._link is not None:
            self._link.aborted(copy.name, _chosen(copy.chunks, failed), epoch=copy.epoch)

    def _counted(self, tokens: int) -> int:
        """Return the tokens to count: all ranks copy the same ones, so only the first counts them."""
        return 0 if self._rank else tokens

    def _where(self) -> str:
        return f" (rank {self._rank})" if self._rank else ""


class _InThread:
    """A load that another thread carries out."""

    def __init__(self, future: "Future[Handle]") -> None:
        self._future = future

    def done(self) -> bool:
        """Whether it has ended; raises what it raised."""
        return self._future.done() and self._future.result().done()

    def wait(self) -> None:
        """Block until it has ended."""
        self._future.result().wait()

    def wait_layer(self, layer: int) -> None:
        """Nothing: the request is not in the batch."""

    def wait_sources(self) -> None:
        """Block until it has ended: a load reads the arena alone, which nobody here overwrites."""
        self.wait()


class _Nothing:
    """No copy at all."""

    def done(self) -> bool:
        """Always."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""

    def wait_layer(self, layer: int) -> None:
        """Nothing to wait for."""

    def wait_sources(self) -> None:
        """Nothing to wait for."""


_NOTHING = _Nothing()


def _chosen(chunks: Iterable[bytes], wanted: NDArray[np.bool_]) -> tuple[bytes, ...]:
    return tuple(chunk for chunk, want in zip(chunks, wanted, strict=True) if want)


def _tiers(hits: tuple[int, ...]) -> str:
    """Name the tiers in which the prompt's chunks were found."""
    return "+".join(f"L{tier + 1}" for tier, count in enumerate(hits) if count) or "L1"
