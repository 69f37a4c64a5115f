"""The scheduler's half of the connectors: what to look up, what to ask room for, and when a request lets go.

It knows vLLM's objects by their attributes only, so it runs without vLLM. Nothing here waits for the server for longer
than `Options.grant_wait_s`, but for a lookup while the engine has nothing else to do.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvcore.live.client import NotYet
from kvcore.live.wire import Granted, Registered
from kvcore.policy.hashing import chunk_names, trace_ids
from kvcore.vllm.jobs import StepPlan, StepReport
from kvcore.vllm.links import SchedulerLink
from kvcore.vllm.namespace import Hasher
from kvcore.vllm.output import Blocks, last_step, scheduled
from kvcore.vllm.requests import EngineRequest, Life, Tracked
from kvcore.vllm.stats import Counters

_LOG = logging.getLogger("kvcore.vllm")
LoadMode = Literal["sync", "async", "auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the scheduler's half works.

    Attributes:
        block_tokens: Tokens of an engine block.
        load_mode: sync: a hit is copied at the start of the step that computes the rest. async: the request waits
            outside the batch until its hit is there. auto: async where the device copies by itself and other requests
            run meanwhile, else sync.
        copies_in_step: Whether workers have ended a step's stores when the step ends (the CPU backend).
        grant_wait_s: How long a request's last step waits for room that it asked for; others take it when it comes.
        plans_ahead: Whether a step is planned while the one before it runs (vLLM's async scheduling). The first step of
            a long prompt of which nothing is cached then does not wait for the names of its blocks and its lookup.
    """

    block_tokens: int
    load_mode: LoadMode = "auto"
    copies_in_step: bool = True
    grant_wait_s: float = 0.002
    plans_ahead: bool = False


class SchedulerSide:
    """Follows every request through the engine's scheduler.

    Args:
        link: The line to the server.
        hasher: Names a request's blocks; None for a request that cannot be cached.
        options: See `Options`.
        clock: Seconds of the wall clock, comparable to the requests' `arrival_time`.
    """

    def __init__(
        self,
        link: SchedulerLink,
        hasher: Hasher,
        options: Options,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._link = link
        self._hasher = hasher
        self._options = options
        self._clock = clock
        self._tracked: dict[str, Tracked] = {}
        self._asking: dict[str, tuple[str, Life]] = {}
        """Lives with unanswered asks, by name, each with its request."""
        self._unrecorded: list[Tracked] = []
        self._late: dict[str, Life] = {}
        """Finished requests with unanswered asks: stored yet, unless their blocks are handed out again before."""
        self._loading: dict[str, int] = {}
        """Tokens of asynchronous loads under way, by request."""
        self._put_off: dict[Life, Tracked] = {}
        """Lives with nothing to load: those of which nothing is cached are named and looked up behind their first step,
        of those that the engine's own cache holds already the answer is taken in there."""
        self._abandoned: list[tuple[Tracked, Life]] = []
        """Lives that were aborted, or preempted, while their lookup was under way."""
        self._waiting_first: dict[str, Tracked] = {}
        self._plan = StepPlan()
        self._failures: dict[int, int] = {}
        self._session: Registered | None = None
        """The last one in which a step was planned."""
        self.counters = Counters()

    # Called by the scheduler, in this order, for a request that waits

    def matched(self, request: EngineRequest, computed: int) -> tuple[int | None, bool]:
        """Answer `get_num_new_matched_tokens`: tokens to load behind `computed`, and whether outside the batch.

        A request whose prompt has to be computed (for its log-probabilities, say) is none of ours.
        """
        if getattr(request, "skip_reading_prefix_cache", False):
            return 0, False
        if computed == 0 and self._puts_off(request):
            return 0, False
        tracked = self._track(request)
        if tracked is None or tracked.unlucky:
            return 0, False
        life = self._life(tracked)
        if life is None:
            return 0, False
        life.computed = computed
        life.unawaited = computed >= self._most_loadable(life, request)
        if life.found is None or life.found.load_start * life.session.chunk_tokens > computed:
            self._look_up(tracked, life)  # again where the engine's own cache has lost some since
        if life.found is None:
            at_hand = tracked.life is life
            if at_hand and life.unawaited:
                self._put_off[life] = tracked
            return (None if at_hand and not life.unawaited else 0), False
        external, life.asynchronous = self._loadable(life, request)
        return external, life.asynchronous

    def allocated(self, request: EngineRequest, blocks: Sequence[int], external: int) -> None:
        """Take in `update_state_after_alloc`; the second call for an asynchronous load only brings more blocks."""
        tracked = self._tracked.get(request.request_id)
        life = None if tracked is None else tracked.life
        if tracked is None or life is None:
            return
        life.blocks = list(blocks)
        if life.allocated:
            return
        life.allocated = True
        if tracked.l0_tokens is None:
            tracked.l0_tokens = life.computed
        copy, left_out = life.load(tracked.id, external, self._options.block_tokens)
        if life.session is self._link.registered:
            self._link.drop_load(life.name, left_out)
        if (
            copy is not None
        ):  # also where the server was lost just now: vLLM counts on it, and the worker will say that it failed
            life.loading = copy.asynchronous
            if copy.asynchronous:
                self._loading[tracked.id] = copy.tokens
            tracked.scheduled_s = tracked.scheduled_s or self._clock()
            tracked.load_started_s = self._clock()
            self._plan.loads.append(copy)

    def plan(self, output: Any) -> StepPlan:
        """Answer `build_connector_meta` for a `SchedulerOutput`: everything that workers do in this step."""
        completes = self._look_up_put_off()
        for request_id in output.preempted_req_ids or ():
            tracked = self._tracked.get(request_id)
            if tracked is not None and tracked.request.num_preemptions > tracked.preemptions:
                self._preempt(tracked)
        handed_out = [copy.blocks[copy.blocks >= 0] for copy in self._plan.loads]
        for request_id, blocks, computed in scheduled(output):
            if blocks.ids:  # a step that decodes brings none, mostly
                handed_out.append(blocks.written(computed // self._options.block_tokens))
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                upto = computed + output.num_scheduled_tokens.get(request_id, 0)
                completes |= self._advance(tracked, blocks, upto)
        self._drop_unscheduled()
        self._record_finished()
        written = np.concatenate(handed_out) if handed_out else np.empty(0, np.int64)
        self._settle_late(written)
        self._end_abandoned()
        self._hand_out(self._options.grant_wait_s if completes else 0.0)
        plan, self._plan = self._plan, StepPlan()
        plan.handed_out = written
        plan.computes = bool(output.num_scheduled_tokens)
        # vLLM zeroes the new blocks of some models while it prepares the step, which must not overtake a load.
        zeroed = bool(getattr(output, "new_block_ids_to_zero", None))
        plan.load_at_once = not zeroed and any(not copy.asynchronous for copy in plan.loads)
        plan.failures_seen = dict(self._failures)
        plan.grants_lost = self._came_back()
        return plan

    def _came_back(self) -> bool:
        """Return whether this is the first step in another session with the same server."""
        before, session = self._session, self._link.registered
        if session is None:
            return False
        self._session = session
        return before is not None and session is not before and session.epoch == before.epoch

    def reported(self, report: StepReport | None, invalid_blocks: Iterable[int], received: Iterable[str]) -> None:
        """Take in what workers said after a step: its stalls, blocks that were not loaded, ended async loads."""
        if report is not None:
            for request_id, stalled in report.load_stalls.items():
                finished = (tracked for tracked in self._unrecorded if tracked.id == request_id)
                if (tracked := self._tracked.get(request_id) or next(finished, None)) is not None:
                    tracked.load_s += stalled
            for rank, failures in report.failures.items():
                self._failures[rank] = max(failures, self._failures.get(rank, 0))
        if bad := frozenset(invalid_blocks):
            self._taint(bad)
        for request_id in received:
            self._loading.pop(request_id, None)
            tracked = self._tracked.get(request_id)
            if tracked is not None and tracked.life is not None:
                tracked.life.loading = False
                if tracked.load_started_s is not None:
                    tracked.load_s = self._clock() - tracked.load_started_s
        self._note_first_tokens()
        self._record_finished()

    def finished(self, request: EngineRequest) -> None:
        """Take in `request_finished`.

        Its blocks need not be held for stores under way: the workers see to it that a block is not written again
        before it has been read (`StepPlan.handed_out`). So an idle engine holds nothing. Room that is granted later
        is used if the blocks still hold what they held.
        """
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return
        if tracked.life in self._put_off:
            self._look_up_put_off()
            self._put_off = {life: other for life, other in self._put_off.items() if other is not tracked}
        del self._tracked[tracked.id]
        self._note_first_tokens(tracked)
        self._waiting_first.pop(tracked.id, None)
        self._unrecorded.append(tracked)
        life = tracked.life
        if life is None:
            return
        current = life.session is self._link.registered
        if current and life.found is None:
            self._abandoned.append((tracked, life))  # what the answer says is to be loaded must be given back
            self._end_abandoned()  # now, if it has come: there may be no step for a long time
            return
        if current and not life.allocated:
            self._drop_found(life)
        self._end(life)
        if life.allocated and current and life.asks:
            self._late[life.name] = life

    def counted(self) -> dict[str, int | float]:
        """Return what was counted since the last call."""
        return self.counters.take()

    def forget(self, mark: str) -> None:
        """Name everything differently from now on, so that nothing stored before is matched again."""
        self._look_up_put_off()  # under the names that are right for what is computed by now
        self._hasher = self._hasher.marked(mark)
        for tracked in self._tracked.values():
            tracked.hashes = None  # for its next life
            if tracked.life is not None:
                self._disown(tracked, tracked.life)

    def _disown(self, tracked: Tracked, life: Life) -> None:
        """Store nothing that is computed from now on under names of before, and load nothing by them."""
        life.tainted = life.tainted or life.upto < tracked.prompt_tokens
        if not life.allocated and life not in self._put_off:
            self._give_back(tracked, life)
            tracked.end_life()

    def close(self) -> None:
        """Leave the server."""
        self._record_finished()
        self._link.leave()

    # Lookups

    def _track(self, request: EngineRequest) -> Tracked | None:
        tracked = self._tracked.get(request.request_id)
        if tracked is not None:
            return tracked
        hashes = self._hasher(request)
        if hashes is None:
            return None
        tracked = Tracked(request, hashes, self._clock())
        self._tracked[tracked.id] = tracked
        return tracked

    def _life(self, tracked: Tracked) -> Life | None:
        """Return the request's life in the session at hand, anew where it has ended; None: away, or in vain."""
        session = self._link.registered
        life = tracked.life
        if life is not None and life.allocated:
            if tracked.request.num_preemptions == tracked.preemptions and life.session is session:
                tracked.unlucky = True  # it comes back since its load failed: to load again would fail again
                self._end(life)
                tracked.end_life()
                return None
            self._preempt(tracked)
        elif life is not None and life.session is not session:
            tracked.end_life()
        if tracked.life is None and session is not None:
            tracked.life = Life(tracked.wire_name(), session, self._chunks(tracked, session))
        return tracked.life

    def _hashes(self, tracked: Tracked) -> list[bytes]:
        if tracked.hashes is None:
            tracked.hashes = self._hasher(tracked.request) or []
        return tracked.hashes

    def _chunks(self, tracked: Tracked, session: Registered) -> tuple[bytes, ...]:
        return chunk_names(self._hashes(tracked), session.chunk_tokens // self._options.block_tokens)

    def _puts_off(self, request: EngineRequest) -> bool:
        """Return whether nothing of a new request is cached, and its lookup is put off: the head of it is nowhere.

        It has the answer of a lookup that finds nothing. Where the head is somewhere, or the server does not say, the
        request is looked up like any other.
        """
        session = self._link.registered
        if not self._options.plans_ahead or session is None or request.request_id in self._tracked:
            return False
        head = self._hasher.new_head(request, session.chunk_tokens // self._options.block_tokens)
        if head is None:
            return False
        started = time.perf_counter()
        held = self._link.held(head, patient=not self._tracked)
        self.counters.lookup_seconds += time.perf_counter() - started
        if held is not False or self._link.registered is not session:
            return False
        tracked = Tracked(request, None, self._clock())
        tracked.life = life = Life(tracked.wire_name(), session, ())
        self._tracked[tracked.id] = tracked
        self._put_off[life] = tracked
        return True

    def _look_up_put_off(self) -> bool:
        """Take in the answers for requests whose first step has been planned; return as `_advance` does."""
        waiting, self._put_off = self._put_off, {}
        completes = False
        for life, tracked in waiting.items():
            if tracked.life is not life or life.session is not self._link.registered:
                continue
            if life.upto:
                life.chunks = life.chunks or self._chunks(tracked, life.session)
                self._look_up(tracked, life)
            if life.found is None:
                self._put_off[life] = tracked
                continue
            self._drop_found(life)  # what others stored since is computed already
            completes |= self._ask_room(tracked, life) and bool(life.asks) and last_step(tracked.request)
        return completes

    def _drop_unscheduled(self) -> None:
        """Forget what was put off of requests that did not get into the step: they are asked about anew."""
        waiting, self._put_off = self._put_off, {}
        for life, tracked in waiting.items():
            if life.upto:
                self._put_off[life] = tracked
            elif tracked.life is life and not life.unawaited:  # of the others an answer is on its way
                del self._tracked[tracked.id]

    def _look_up(self, tracked: Tracked, life: Life) -> None:
        """Ask the server; the life ends where the server turns out to be away."""
        again, started = life.found is not None, time.perf_counter()
        found = self._link.lookup(
            life.name,
            life.chunks,
            computed_chunks=life.computed // life.session.chunk_tokens,
            salt=tracked.salt,
            input_tokens=tracked.prompt_tokens,
            resumed=tracked.request.num_preemptions > 0,
            queued_bytes=sum(self._loading.values()) * life.session.shard_bytes // life.session.chunk_tokens,
            probe=self._hasher.probe(tracked.request, life.session.chunk_tokens),
            waited_ms=1000.0 * max(0.0, self._clock() - tracked.arrived_s),
            patient=len(self._tracked) == 1,  # vLLM looks up its own cache anew after each NOT_YET
            wait=not life.unawaited,
        )
        self.counters.lookup_seconds += time.perf_counter() - started
        if self._link.registered is not life.session:
            tracked.end_life()
        elif isinstance(found, NotYet):
            life.found = None
        else:
            life.found = found
            life.asked = min(sum(found.hits), len(life.chunks))
            if not again:
                self.counters.lookups += 1
                self.counters.matched_tokens += life.asked * life.session.chunk_tokens

    def _end_abandoned(self) -> None:
        """Take the answers to lookups of requests that were aborted meanwhile, and give back what they found."""
        waiting, self._abandoned = self._abandoned, []
        for tracked, life in waiting:
            if life.session is not self._link.registered:
                continue
            self._look_up(tracked, life)
            if life.found is not None:
                self._drop_found(life)
                self._end(life)
            else:
                self._abandoned.append((tracked, life))

    def _most_loadable(self, life: Life, request: EngineRequest) -> int:
        """Return the tokens that could be had without computing, if every chunk were cached."""
        return min(len(life.chunks) * life.session.chunk_tokens, self._all_but_one(request))

    def _all_but_one(self, request: EngineRequest) -> int:
        """Return the tokens of the blocks that a step need not compute: it must compute at least one token."""
        block = self._options.block_tokens
        return (int(request.num_tokens) - 1) // block * block

    def _loadable(self, life: Life, request: EngineRequest) -> tuple[int, bool]:
        """Return how many tokens to load, and whether asynchronously."""
        found = life.found
        if found is None or not found.load_chunks or life.session is not self._link.registered:
            return 0, False
        chunk_tokens = life.session.chunk_tokens
        end = (found.load_start + found.load_chunks) * chunk_tokens
        if found.load_start * chunk_tokens > life.computed or end <= life.computed:
            return 0, False
        asynchronous = self._asynchronous(request)
        if not asynchronous and end >= request.num_tokens:
            end = self._all_but_one(request)
        return (end - life.computed, asynchronous) if end > life.computed else (0, False)

    def _asynchronous(self, request: EngineRequest) -> bool:
        if self._options.load_mode != "auto":
            return self._options.load_mode == "async"
        if self._options.copies_in_step:
            return False
        return any(
            other.first_token_s is None for name, other in self._waiting_first.items() if name != request.request_id
        )

    def _drop_found(self, life: Life) -> None:
        if life.found is not None and life.found.load_chunks:
            start = life.found.load_start
            self._link.drop_load(life.name, life.chunks[start : start + life.found.load_chunks])

    # Steps

    def _advance(self, tracked: Tracked, blocks: Blocks, upto: int) -> bool:
        """Take in that this step computes a request up to token `upto`; return whether to wait for room.

        A request that goes on keeps its blocks, so what comes for it later is used later.
        """
        if tracked.first_token_s is None:
            tracked.scheduled_s = tracked.scheduled_s or self._clock()
            self._waiting_first[tracked.id] = tracked
        life = tracked.life
        if life is None:
            return False
        if not life.ended and not self._compute(tracked, life, blocks, upto):
            return False
        return bool(life.asks) and last_step(tracked.request)

    def _compute(self, tracked: Tracked, life: Life, blocks: Blocks, upto: int) -> bool:
        """Take in that it is computed up to token `upto`; return whether that is all of its prompt."""
        if life.session is not self._link.registered:
            tracked.end_life()
            return False
        blocks.apply(life)
        life.upto = upto
        return life.found is not None and self._ask_room(tracked, life)

    def _ask_room(self, tracked: Tracked, life: Life) -> bool:
        """Ask room for the chunks that are computed; return whether the prompt is."""
        chunks = min(life.upto, tracked.prompt_tokens) // life.session.chunk_tokens
        if chunks > life.asked and not life.tainted:
            self._link.ask(life.name, life.chunks[life.asked : chunks])
            life.asks.append((life.asked, chunks))
            self._asking[life.name] = (tracked.id, life)
            life.asked = chunks
        if life.upto < tracked.prompt_tokens:
            return False
        self._end(life)
        return True

    def _hand_out(self, wait_s: float) -> None:
        """Turn the grants that have come into copies; wait a little where the blocks are free after this step."""
        until = time.monotonic() + wait_s
        while self._asking:
            for name, granted in self._link.granted():
                self._granted(name, granted)
            if not self._asking or time.monotonic() >= until:
                break
            time.sleep(50e-6)
        session = self._link.registered
        for name, (_, life) in list(self._asking.items()):
            if life.session is not session:  # no answer will come: one of a server that is there always does
                life.asks.clear()
                del self._asking[name]

    def _settle_late(self, handed_out: NDArray[np.int64]) -> None:
        """Store nothing of finished requests whose room comes after their blocks have been handed out again."""
        for name, life in list(self._late.items()):
            if not life.asks:
                del self._late[name]
            elif np.isin(handed_out, life.blocks).any():
                life.tainted = True

    def _granted(self, name: str, granted: Granted) -> None:
        request_id, life = self._asking.get(name, (None, None))
        if request_id is None or life is None:
            return
        start, _ = life.asks.pop(0)
        if not life.asks:
            del self._asking[name]
        for reason, count in granted.refused.items():
            self.counters.refused[reason] = self.counters.refused.get(reason, 0) + count
        if not granted.chunks:
            return
        chunks = [start + i for i in granted.chunks]
        if life.tainted:
            self._link.drop_store(name, tuple(life.chunks[i] for i in chunks))
            return
        life.stored = True
        block_tokens = self._options.block_tokens
        copy = life.store(request_id, chunks, granted.pages, granted.generations, granted.epoch, block_tokens)
        self._plan.stores.append(copy)

    def _preempt(self, tracked: Tracked) -> None:
        """End a life whose blocks are free from now on; what is granted to it later is given back."""
        life = tracked.life
        if life is not None:
            life.tainted = True
            self._give_back(tracked, life)
        tracked.end_life()
        tracked.preemptions = tracked.request.num_preemptions

    def _give_back(self, tracked: Tracked, life: Life) -> None:
        """End a life; what was found for it, or is still to be, is given back where nothing loads it."""
        if life.found is None:
            self._abandoned.append((tracked, life))
        else:
            if life.session is self._link.registered and not life.allocated:
                self._drop_found(life)
            self._end(life)

    def _taint(self, bad: frozenset[int]) -> None:
        """Stop storing for every request that has a block which was not loaded: what it computed rests on it."""
        for tracked in self._tracked.values():
            life = tracked.life
            if life is not None and not bad.isdisjoint(life.blocks):
                life.tainted = True
                tracked.unlucky = True  # it starts anew, and to load again would fail again
        for life in self._late.values():
            life.tainted = life.tainted or not bad.isdisjoint(life.blocks)

    def _end(self, life: Life) -> None:
        if not life.ended and life.session is self._link.registered:
            self._link.end(life.name)
        life.ended = True

    # The log

    def _note_first_tokens(self, only: Tracked | None = None) -> None:
        now = self._clock()
        for tracked in [only] if only is not None else list(self._waiting_first.values()):
            if tracked.first_token_s is None and tracked.request.num_output_tokens > 0:
                tracked.first_token_s = now
                self._waiting_first.pop(tracked.id, None)

    def _record_finished(self) -> None:
        """Tell the recorder of finished requests: not before their last step's load times are known."""
        for tracked in self._unrecorded:
            self._record(tracked)
        self._unrecorded.clear()

    def _record(self, tracked: Tracked) -> None:
        session: Registered | None = self._link.registered
        if session is None or not session.record:
            return
        self._link.record(
            tracked.id,
            input_length=tracked.prompt_tokens,
            block_size=self._options.block_tokens,
            hash_ids=trace_ids(self._hashes(tracked)).astype("<i8").tobytes(),
            **tracked.outcome(),
        )
