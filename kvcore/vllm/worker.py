"""A worker's half of the connectors: copies, checked by generations, and their acknowledgements.

What the scheduler's half plans is carried out here and nothing is decided. A copy counts, in logs, metrics and
acknowledgements, when its bytes have arrived and the pages were the chunk's before and after.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore.live.arena import Arena, ArenaError
from kvcore.live.wire import Registered
from kvcore.vllm.copies import NOTHING, Behind, InThread, LateBlocks, Running, begun, is_over, refused, wait_for
from kvcore.vllm.jobs import Copy, StepPlan, StepReport
from kvcore.vllm.links import WorkerLink
from kvcore.vllm.mover import Cache, Mover
from kvcore.vllm.stats import Counters
from kvcore.vllm.transfers import TransferFactory
from kvkernels import DeviceError, Handle, LayoutError

_LOG = logging.getLogger("kvcore.vllm")
_SAY_AGAIN_S = 60.0
_LATER_S = 0.003
"""A step's tokens are out by then, behind its last layer."""
_UNUSABLE_S = 60.0
"""How long a worker stays away from a server whose arena it cannot use: hits would be loads that fail."""


class WorkerSide:
    """Copies for one rank.

    Args:
        cache: The engine's KV cache.
        rank: The worker's rank among those of its instance.
        shards: Parts of a chunk; ranks from there on hold the same KV as rank 0, and say of its stores only whether
            their own loads before them have ended well.
        factory: Makes what copies.
        in_step: Whether a copy is done when the call that begins it returns, as without a copy engine. Asynchronous
            loads then run in a thread; otherwise stores end in one, so that they are acknowledged while the engine
            idles.
        layerwise: Whether attention waits for its own layer's load only (`wait_for_layer`), or the step for all.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        rank: int,
        shards: int,
        factory: TransferFactory,
        in_step: bool,
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
        self._lock = threading.RLock()
        """Held while a copy begins, for `drain` must not return in between, and while what has ended is counted."""
        self._in_step = in_step
        self._thread = ThreadPoolExecutor(1, "kvcore-load" if in_step else "kvcore-store")
        self._aside = ThreadPoolExecutor(1, "kvcore-aside")
        """Does what no step waits for."""
        self._closing = False
        self._loading: list[Running] = []
        self._storing: list[Running] = []
        self._guarded: StepPlan | None = None
        """The plan whose blocks were guarded last."""
        self._begun: StepPlan | None = None
        """The plan whose loads were begun last."""
        self._of_step: list[Running] = []
        """The synchronous loads of that plan."""
        self._engine_thread = 0
        self._received: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._step = 0
        self._failed_steps = 0
        self._failed_in: list[int] = []
        """The steps of those failed loads that no report has told of yet."""
        self._rejected = 0
        """Chunks that could not be packed."""
        self._rejected_said = -_SAY_AGAIN_S
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
            with suppress(Exception):  # whoever counts it is told
                one.handle.wait()

    # A step, in this order

    def step_begins(self, plan: StepPlan) -> None:
        """Begin the step's loads already now where that is safe: the engine takes milliseconds to prepare its input.

        That is so in the thread which runs the engine's steps: copies are ordered behind its current stream. Its blocks
        are guarded here in any case: a step without such loads comes to `start_loads` behind its forward pass.
        """
        if threading.get_ident() != self._engine_thread:
            return
        if plan.load_at_once:
            self._begin(plan)
        else:
            self._guard(plan)

    def start_loads(self, plan: StepPlan, *, one_graph: bool = False) -> None:
        """Begin the step's loads, if they are not under way yet, behind stores that read a block which it writes.

        With `one_graph` nothing can be ordered between the step's layers: all loads come before the first.
        """
        self._engine_thread = threading.get_ident()
        self._begin(plan)
        self._end_loads()
        if one_graph or not self._layerwise:
            for one in self._loading:
                if not one.copy.asynchronous:
                    self._order(one, one.mover.layout.num_layers)

    def _begin(self, plan: StepPlan) -> None:
        if plan is self._begun:
            return
        self._begun, self._of_step = plan, []
        self._step += 1
        self._guard(plan)
        for copy in plan.loads:
            self._begin_load(copy)
        if plan.grants_lost and self._link is not None:
            self._link.register_again()

    def _guard(self, plan: StepPlan) -> None:
        """Make this step wait, on the device, for stores that have not yet read a block which it may write."""
        if plan is self._guarded or not plan.handed_out.size:
            return
        self._guarded = plan
        with self._lock:
            storing = list(self._storing)
        for one in storing:
            if np.isin(one.copy.blocks, plan.handed_out).any():
                try:
                    one.handle.wait_sources()
                except Exception:  # it stores nothing, as whoever ends it is told; what it has begun is over first
                    with suppress(Exception):
                        one.handle.wait()

    def wait_for_layer(self, layer_name: str) -> None:
        """Order the loads of one layer before its attention."""
        if not self._loading:
            return
        layer = self._cache.layer_of.get(layer_name)
        for one in self._loading:
            if layer is not None and not one.copy.asynchronous:
                self._order(one, layer + 1)

    @staticmethod
    def _order(one: Running, layers: int) -> None:
        try:
            for layer in range(one.ordered, layers):
                one.handle.wait_layer(layer)
        except Exception as error:  # the step is lost, not the engine: its blocks are told of as not loaded
            refused(one, error)
        one.ordered = max(one.ordered, layers)

    def finish_step(self, plan: StepPlan) -> None:
        """Begin the step's stores. Its loads may still be under way: the device waits for them, not this thread.

        So the engine prepares its next step meanwhile; what became of the loads is asked for with the step's tokens.
        """
        with self._lock:  # one that another thread is just ending is over
            under_way = [one for one in self._of_step if not one.over and one.handle is not NOTHING]
        late = [one for one in under_way if one.ordered < one.mover.layout.num_layers]
        for one in late:
            # The engine did not ask for every layer: what it computed may rest on blocks not there yet.
            _LOG.error("Request %s: the engine did not wait for its load; set layerwise to false", one.copy.request)
            one.valid[:] = False
            self._order(one, one.mover.layout.num_layers)  # what is stored below ends behind it, and knows
        self._end_loads()
        for copy in plan.stores:
            self._begin_store(copy, plan.failures_seen.get(self._rank, 0))

    def received(self) -> set[str]:
        """Return the requests whose asynchronous loads have ended since the last call."""
        self._end_loads()
        with self._lock:
            received, self._received = self._received, set()
        return received

    def counted(self) -> dict[str, int | float]:
        """Return what was counted since the last call."""
        with self._lock:
            return self.counters.take()

    def bad_blocks(self) -> Set[int]:
        """Return the blocks that were to be loaded in this step and were not.

        While loads are under way it is a set that waits for them when it is looked at or sent to another process,
        which happens with the step's tokens: no token that rests on a failed load is ever given out.
        """
        with self._lock:
            bad, self._bad_blocks = self._bad_blocks, set()
        loads = list(self._of_step)

        def known() -> set[int]:
            self._settle(loads)
            for one in loads:
                bad.update(one.bad_blocks)
                one.bad_blocks.clear()
            return bad

        return known() if all(one.over for one in loads) else LateBlocks(known)

    def report(self) -> Callable[[], StepReport] | None:
        """Return what tells the scheduler's half of this step, once it is over; None where there is nothing to tell."""
        with self._lock:
            report, self._report = self._report, StepReport()
        loads, step = list(self._of_step), self._step
        if not (loads or report.load_stalls or self._failed_steps):
            return None

        def known() -> StepReport:
            self._settle(loads)
            with self._lock:  # a step that was begun behind this one may have failed loads already
                self._failed_in = [later for later in self._failed_in if later > step]
                failures = self._failed_steps - len(self._failed_in)
            if failures:
                report.failures[self._rank] = failures
            return report

        return known

    def _settle(self, loads: Sequence[Running]) -> None:
        """Return when these loads are over, well or not."""
        for one in loads:
            if not one.over:
                wait_for(one)
        self._end_loads()

    def close(self) -> None:
        """Wait for what is under way and leave the server."""
        self._closing = True
        with self._lock:  # another thread may be mapping an arena
            gone = self._let_go()
        if gone is not None:
            gone.release()  # here: when the interpreter ends, other threads take no work any more
        self._thread.shutdown()
        self._aside.shutdown()
        if self._link is not None:
            self._link.leave()

    # Copies

    def _current(self, epoch: int) -> Mover | None:
        """Return the mover of the registration at hand; None where it is not of `epoch`, or nobody is registered."""
        registered = None if self._link is None else self._link.registered
        if registered is None or registered.epoch != epoch or registered is self._unusable or self._closing:
            return None
        if self._mover is None or not self._mover.serves(registered):
            gone = self._let_go()
            if gone is not None:
                self._aside.submit(_released, gone)
            try:
                self._mover = Mover(self._cache, registered, self._shard, self._factory)
                self._unusable = None
            except (ArenaError, LayoutError, ValueError, RuntimeError) as error:  # the last: what torch raises
                self._say_unusable(registered, error)
        return self._mover

    def _say_unusable(self, registered: Registered, error: Exception) -> None:
        """Leave a server whose arena cannot be used, for a while: its hits would all be loads that fail."""
        if self._unusable is None:
            _LOG.error("kvcore cannot use the server's arena, nothing is loaded or stored: %s", error)
        self._unusable = registered
        if self._link is not None:
            self._link.register_again(_UNUSABLE_S)

    def _let_go(self) -> Mover | None:
        """End what is under way in the registration before; return its mover, whose release may take seconds."""
        self._settle(list(self._loading))
        for store in list(self._storing):
            self._end_store(store)
        gone, self._mover = self._mover, None
        if gone is not None:
            gone.close()
        return gone

    def warm_up(self) -> bool:
        """Map the arena now rather than in the first request; return whether it is mapped, as it is not while away."""
        registered = None if self._link is None else self._link.registered
        if registered is None:
            return False
        with self._lock:
            return self._current(registered.epoch) is not None

    def server_is_back(self) -> None:
        """Map the arena of a server that has come back before a request needs it; called from another thread.

        An arena that is mapped in a request, and pinned while more of them come, is slow for minutes. Only what needs
        no measurement is made here: that would copy while the engine computes.
        """
        registered = None if self._link is None else self._link.registered
        with self._lock:
            if registered is None or registered is self._unusable:
                return
            if self._unusable is not None:
                try:
                    Arena.attach(Path(registered.arena_path)).close()
                except ArenaError as error:
                    self._say_unusable(registered, error)
            elif self._mover is not None and self._mover.alike(registered):
                self._current(registered.epoch)

    def _begin_load(self, copy: Copy) -> None:
        with self._lock:
            mover = self._current(copy.epoch)
            if mover is None:
                self._load_failed(copy, np.ones(len(copy.chunks), bool))
                return
            valid = self._generations_hold(mover, copy)
            handle: Handle = NOTHING
            started = time.perf_counter()
            if valid.any():
                pages, blocks = copy.pages[valid], copy.blocks[valid]
                if copy.asynchronous and self._in_step:
                    handle = InThread(self._thread.submit(mover.load, pages, blocks))
                else:
                    handle = begun(mover.load, pages, blocks)
            one = Running(copy, handle, mover, started, valid, self._report, self._step)
            self._loading = [*self._loading, one]
            if not copy.asynchronous:
                self._of_step.append(one)

    def _begin_store(self, copy: Copy, failures_seen: int) -> None:
        with self._lock:
            mover = self._current(copy.epoch) if failures_seen >= self._failed_steps else None
            if mover is None:
                self._store_failed(copy, np.ones(len(copy.chunks), bool))
                return
            valid = self._generations_hold(mover, copy)
            started = time.perf_counter()
            handle: Handle = NOTHING
            if not self._stores:
                handle = Behind([one.handle for one in self._loading if not one.copy.asynchronous])
            elif valid.any():
                handle = begun(mover.store, copy.pages[valid], copy.blocks[valid], rest_s=_LATER_S)
            one = Running(copy, handle, mover, started, valid, failures_seen=failures_seen)
            self._storing.append(one)
        if self._in_step:
            self._end_store(one)
        else:
            self._thread.submit(self._end_store, one)

    @staticmethod
    def _generations_hold(mover: Mover, copy: Copy) -> NDArray[np.bool_]:
        """Return for every chunk whether its pages are still those that the server told of."""
        return np.asarray((mover.arena.generations[copy.pages] == copy.generations).all(axis=1))

    def _end_loads(self) -> None:
        """Count the loads that have ended; called in the engine's thread and where a step's outcome is asked for."""
        with self._lock:
            ended = [one for one in self._loading if is_over(one)]
            self._loading = [one for one in self._loading if one not in ended]
            for one in ended:
                self._end_load(one)

    def _end_load(self, one: Running) -> None:
        good = one.valid & self._generations_hold(one.mover, one.copy)
        # What lies behind a chunk that failed is computed anew, whether it arrived or not.
        good = np.logical_and.accumulate(good)
        self._loaded(one, good)
        if not good.all():
            self._load_failed(one.copy, ~good, one)
        if one.copy.asynchronous:
            self._received.add(one.copy.request)
        one.over = True

    def _loaded(self, one: Running, good: NDArray[np.bool_]) -> None:
        copy, (seconds, stalled) = one.copy, self._took(one)
        if not copy.asynchronous:
            one.report.load_stalls[copy.request] = stalled
        if self._link is None or not good.any():
            return
        blocks = copy.blocks[good]
        tokens, size = int((blocks >= 0).sum()) * self._cache.block_tokens, one.mover.block_bytes(blocks)
        self.counters.loaded_tokens += self._counted(tokens)
        self.counters.loaded_bytes += size
        self.counters.load_seconds += seconds
        loaded = _chosen(copy.chunks, good)
        say = partial(self._say_loaded, self._link, copy, loaded, tokens=tokens, nbytes=size, seconds=seconds)
        if self._in_step or self._closing:
            say()
        else:
            self._aside.submit(_a_little_later, say)

    def _say_loaded(self, link: WorkerLink, copy: Copy, chunks: tuple[bytes, ...], **counts: Any) -> None:
        """Acknowledge a load."""
        link.loaded(copy.name, chunks, **counts, epoch=copy.epoch)
        _LOG.info(
            "Retrieved %d tokens of request %s: %d bytes from %s in %.6f s%s",
            counts["tokens"], copy.request, counts["nbytes"], _tiers(copy.tiers), counts["seconds"], self._where(),
        )  # fmt: skip

    def _took(self, one: Running) -> tuple[float, float]:
        """Return the seconds of an ended copy, and how long a step stood still for it: all the while if nobody knows.

        A copy that waited for its turn behind the engine's work began later than it was asked for, and may have ended
        long before anybody asked again: the device knows better than this thread.
        """
        measured = one.handle.measured() if one.valid.any() else None
        if measured is None:
            seconds = time.perf_counter() - one.started
            return seconds, seconds
        return measured.seconds, measured.seconds if self._in_step else measured.stalled

    def _load_failed(self, copy: Copy, failed: NDArray[np.bool_], one: Running | None = None) -> None:
        blocks = copy.blocks[failed]
        bad = blocks[blocks >= 0].tolist()
        (self._bad_blocks if one is None or copy.asynchronous else one.bad_blocks).update(bad)
        self.counters.failed_tokens += self._counted(len(bad) * self._cache.block_tokens)
        if not copy.asynchronous:
            self._failed_steps += 1
            self._failed_in.append(self._step if one is None else one.step)
        elif failed.all():
            self._received.add(copy.request)
        if self._link is not None:
            self._link.load_failed(copy.name, _chosen(copy.chunks, failed), epoch=copy.epoch)
        _LOG.warning(
            "Request %s: %d tokens are computed, not loaded: the server is away, or gave their pages to others",
            copy.request, len(bad) * self._cache.block_tokens,
        )  # fmt: skip

    def _end_store(self, one: Running) -> None:
        """Wait for a store, then count and acknowledge it, once: two threads may come here with the same one."""
        rejected, seconds = list[int](), 0.0
        try:
            one.handle.wait()
            if one.valid.any():
                rejected, (seconds, _) = list(one.handle.rejected()), self._took(one)
        except Exception as error:  # in a thread whose faults nobody hears of
            _LOG.error("Request %s: nothing is stored: %s", one.copy.request, error)
            one.valid[:] = False
        with self._lock:
            if one not in self._storing:
                return
            self._storing.remove(one)
            self._end_loads()  # those before it have ended: the device read its blocks behind them
            if rejected:
                one.valid[one.copied[rejected]] = False
                self._reject(len(rejected))
            if one.failures_seen < self._failed_steps:
                one.valid[:] = False  # it may hold what was computed on blocks that were not loaded
            good = one.valid & self._generations_hold(one.mover, one.copy)
            if good.any():
                self._stored(one, good, seconds)
            if not good.all():
                self._store_failed(one.copy, ~good)

    def _stored(self, one: Running, good: NDArray[np.bool_], seconds: float) -> None:
        copy, names = one.copy, _chosen(one.copy.chunks, good)
        if not self._stores:
            if self._link is not None:
                self._link.committed(copy.name, names, epoch=copy.epoch)
            return
        blocks = copy.blocks[good]
        tokens, size = blocks.size * self._cache.block_tokens, one.mover.block_bytes(blocks)
        self.counters.stored_tokens += self._counted(tokens)
        self.counters.stored_bytes += size
        self.counters.store_seconds += seconds
        if self._link is not None:
            self._link.committed(copy.name, names, tokens=tokens, nbytes=size, seconds=seconds, epoch=copy.epoch)
        _LOG.info(
            "Stored %d tokens of request %s: %d bytes to L1 in %.6f s%s",
            tokens, copy.request, size, seconds, self._where(),
        )  # fmt: skip

    def _reject(self, chunks: int) -> None:
        """Say now and then that chunks cannot be packed: with some models that is every request's."""
        self._rejected += chunks
        now = time.monotonic()
        if now - self._rejected_said >= _SAY_AGAIN_S:
            self._rejected_said = now
            _LOG.warning(
                "%d chunks so far could not be packed and are not stored; with \"packing\": \"none\" they would be%s",
                self._rejected, self._where(),
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


def _chosen(chunks: Iterable[bytes], wanted: NDArray[np.bool_]) -> tuple[bytes, ...]:
    return tuple(chunk for chunk, want in zip(chunks, wanted, strict=True) if want)


def _released(gone: Mover) -> None:
    """Let go of an earlier server's arena, in a thread whose faults nobody would hear of."""
    try:
        gone.release()
    except DeviceError as error:
        _LOG.error("kvcore cannot let go of an earlier server's arena, whose memory stays taken: %s", error)


def _a_little_later(say: Callable[[], None]) -> None:
    """Let the step that a load was for give its token out first: it needs the interpreter too."""
    time.sleep(_LATER_S)
    say()


def _tiers(hits: tuple[int, ...]) -> str:
    """Name the tiers in which the prompt's chunks were found."""
    return "+".join(f"L{tier + 1}" for tier, count in enumerate(hits) if count) or "L1"
