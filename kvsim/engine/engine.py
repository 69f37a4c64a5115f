"""One engine: continuous batching under a token budget, as vLLM's scheduler does it."""

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

from kvsim.engine.decodes import Decodes
from kvsim.engine.gpu_cache import GpuCache
from kvsim.engine.heat import Heat
from kvsim.engine.job import Job
from kvsim.engine.links import Link
from kvsim.engine.settings import RunSettings
from kvsim.engine.shell import Shell
from kvsim.engine.steps import StepCosts


class Engine:
    """Runs jobs. Callbacks of SimPy events, not a process a request, carry it from step to step.

    A step computes the decodes first (a token each), then the prompts that it has begun, then admits waiting ones in
    order while budget, sequences and GPU blocks last; a prompt is admitted when the whole of it fits. Steps with
    prompts in them are an event each. Steps of decodes alone are one event from one change of the batch to the next:
    the first request that ends, or the end of the step in which a request arrives that can be admitted.

    With asynchronous scheduling a step is put together when the one before it begins, so that the device never waits:
    a request that comes while a step runs is not in the next one but in the one after it.
    """

    def __init__(
        self, env: Any, number: int, settings: RunSettings, costs: StepCosts, cache: GpuCache, link: Link
    ) -> None:
        self._env = env
        self.number = number
        self.cache = cache
        self.link = link
        self.unfinished = 0
        self.pending_tokens = 0
        """Prompt tokens sent here that are not computed yet."""
        self.busy_s = 0.0
        self.prefill_s = 0.0
        """Time of the steps that have prompts in them."""
        self.steps: list[tuple[float, float, int, int, int]] | None = None
        """Where a list: start, end, prompt tokens, decodes and engine steps of every event."""
        self._settings = settings
        self._costs = costs
        self._block = settings.l0_block_tokens
        self._layers = settings.profile.layers
        self._shell: Shell | None = None
        self._waiting: deque[Job] = deque()
        self._loaded_jobs: deque[Job] = deque()
        """Requests whose asynchronous load has arrived: they hold their blocks, so they come before all others."""
        self._running: dict[Job, None] = {}
        self._prefilling: list[Job] = []
        self._decodes = Decodes(self._block)
        self._blocked = False
        """Whether the head of the queue cannot be admitted before something ends."""
        self._idle = True
        self._version = 0
        self._began = 0.0
        self._known = 0.0
        """When the step that is being put together was: what came later is not in it."""
        self._others_first = False
        """Whether the step that is being put together comes behind one in which prompts are computed."""
        self._unblocked = 0.0
        """When the head of the queue last got what it had lacked."""
        self._left = 0
        """Requests that have ended since the step that is being put together was."""
        self._parts: list[tuple[Job, int]] = []
        self._loads: list[tuple[Job, int]] = []
        self._compute_s = 0.0
        self._heat = Heat(settings.profile.sustained)
        self._taken = 0
        """Blocks taken already for the next step of the decodes."""
        self._macro: tuple[int, float, float] | None = None
        """Of a run of decode steps: their number, the first one's time, and by how much each next one is longer."""

    def attach(self, shell: Shell) -> None:
        """Use the cache beyond L0 through `shell`."""
        self._shell = shell

    @property
    def queued_bytes(self) -> int:
        """What waits to be loaded, as it is stored."""
        return self.link.queued_bytes[0] // self._settings.profile.kv_copies

    # What happens from outside

    def enqueue(self, job: Job) -> None:
        """A request has come."""
        job.enqueued = job.came = self._env.now
        self._waiting.append(job)
        self._poke()

    def ready(self, jobs: Iterable[Job]) -> None:
        """What requests waited for has arrived: they are next, in the order in which they came.

        As in vLLM: a request that waits keeps its place in the queue, and all that are ready are seen by one step.
        """
        for job in jobs:
            job.came = self._env.now
            if job.first_scheduled < 0:
                job.exposed_load += self._env.now - job.load_began
            if job.holding.blocks:
                self._loaded_jobs.append(job)
            else:
                self._waiting.insert(self._place(job), job)
        self._blocked = False
        self._poke()

    def _place(self, job: Job) -> int:
        """Return where in the queue a request belongs: behind those that came before it."""
        came = (job.enqueued, job.index)
        later = (place for place, other in enumerate(self._waiting) if (other.enqueued, other.index) > came)
        return next(later, len(self._waiting))

    def _unblock(self) -> None:
        """Something was given back, which the head of the queue may have lacked."""
        if self._blocked:
            self._blocked = False
            self._unblocked = self._env.now

    def stored(self, job: Job) -> None:
        """A store has ended; the blocks of a request that is over can go."""
        job.stores -= 1
        if not job.stores and job.finished >= 0:
            self._release(job)
            if self._waiting or self._loaded_jobs:
                self._unblock()
                self._poke()

    def _poke(self) -> None:
        if self._idle:
            self._left = 0
            self._schedule(self._env.now)
        elif self._macro is not None and not self._blocked:
            self._shorten(self._macro)

    # Scheduling

    def _schedule(self, known: float) -> None:
        """Put the next step together, of what had come by the time `known`, and start it."""
        self._known = known
        # The step before is under way at that time, with the prompts whose tokens it will bring.
        self._others_first = bool(self._prefilling or (self._settings.async_scheduling and self._parts))
        self._idle = self._blocked = False
        self._macro = None
        self._taken = 0
        self._parts = parts = []
        self._loads = []
        lookups = 0
        preempted = False
        if self._decodes.batch and (self._prefilling or self._waiting or self._loaded_jobs):
            preempted = self._room_for_decodes()
        budget = self._settings.max_num_batched_tokens - self._decodes.batch
        for job in tuple(self._prefilling):
            if budget <= 0:
                break
            new = min(job.target - job.computed, budget)
            if job not in self._running or not self._grow(job, job.computed + new):
                preempted = True
                continue
            parts.append((job, new))
            budget -= new
        if (self._waiting or self._loaded_jobs) and not preempted:
            lookups = self._admit(budget)
        if not parts and not self._decodes.batch:
            # An empty step: whoever waits came too late for it, or was kept out of it by a preemption. vLLM goes on to
            # the next one at once, and so does this: nothing else might ever wake it.
            self._known, self._left = self._env.now, 0
            lookups += self._admit(self._settings.max_num_batched_tokens)
        parts[:] = [(job, new) for job, new in parts if job in self._running]
        self._start(lookups)

    def _start(self, lookups: int) -> None:
        batch = self._decodes.batch
        if self._parts:
            sizes = [(new, job.computed) for job, new in self._parts]
            took = self._costs.mixed(sizes, batch, self._decodes.context)
            took = self._heat.took(self._env.now, took, took - self._costs.floor)
            self._run_step(took + lookups * self._settings.lookup_s)
        elif batch:
            self._run_decodes(lookups * self._settings.lookup_s)
        else:
            self._idle = True

    def _admit(self, budget: int) -> int:
        """Admit waiting requests in order; return how many lookups that took."""
        block, cache = self._block, self.cache
        lookups = 0
        while budget > 0 and (waiting := self._admissible()):
            job = waiting[0]
            if len(self._running) + self._left >= self._settings.max_num_seqs:
                self._blocked = len(self._running) >= self._settings.max_num_seqs
                break
            if waiting is self._waiting:
                hit = min(cache.peek(job.path), (job.target - 1) // block)
                if not cache.fits(job.path, -(-job.target // block), hit):
                    self._blocked = True
                    break
                if not job.looked_up:
                    lookups += self._look_up(job, hit)
                    if job.waits:
                        waiting.popleft()
                        job.load_began = self._env.now
                        continue
                end = self._loadable(job, hit)
                beside = end > hit * block and self._asynchronous()
                if not beside and self._too_long(job.target - min(end, job.target - 1), budget):
                    break  # with nothing taken: the hits are looked for again when there is budget
                self._take_hits(job, hit, end, beside)
                if beside:
                    waiting.popleft()
                    continue
            elif self._too_long(job.target - job.computed, budget):
                break
            new = min(job.target - job.computed, budget)
            if not self._grow(job, job.computed + new):
                self._blocked = True
                break
            waiting.popleft()
            self._running[job] = None
            self._prefilling.append(job)
            if job.first_scheduled < 0:
                job.first_scheduled = max(self._known, job.came)
            self._parts.append((job, new))
            budget -= new
        return lookups

    def _admissible(self) -> deque[Job] | None:
        """Return the queue whose head is next, of those that could be there when this step was put together."""
        if self._unblocked <= self._known:
            for waiting in (self._loaded_jobs, self._waiting):
                if waiting and waiting[0].came <= self._known:
                    return waiting
        return None

    def _look_up(self, job: Job, hit: int) -> int:
        job.looked_up = True
        if self._shell is None:
            return 0
        self._shell.look_up(job, hit * self._block)
        return 1

    def _loadable(self, job: Job, hit: int) -> int:
        """Return the tokens up to which a request need not compute: L0's hits and what can be loaded beyond."""
        cached = hit * self._block
        return cached if self._shell is None else max(cached, self._shell.loadable(job, cached))

    def _too_long(self, new: int, budget: int) -> bool:
        """Whether a prompt that may not be split has to wait for a step with more budget."""
        settings = self._settings
        return new > budget and not settings.chunked_prefill and budget < settings.max_num_batched_tokens

    def _take_hits(self, job: Job, hit: int, end: int, beside: bool) -> None:
        """Refer to L0's hits and begin to load what lies beyond, up to token `end`, in the step or beside the batch."""
        cached = hit * self._block
        if not job.preemptions:  # what L0 has now: it may have changed since the lookup, behind a wait for a lower tier
            job.l0_tokens = cached
        self.cache.hit(job.holding, job.path, hit)
        job.computed = min(end, job.target - 1)
        self.pending_tokens -= job.computed
        if end == cached:
            return
        size = self._settings.loaded_bytes(end - cached)
        job.loaded += end - cached
        if not beside:
            self._loads.append((job, size))
            return
        # The whole prompt's blocks, or requests that wait with parts of theirs could keep each other from running.
        self.cache.grow(job.holding, job.path, -(-job.target // self._block), 0)
        job.load_began = self._env.now
        self.link.send(0, size, lambda: self._loaded(job))

    def _asynchronous(self) -> bool:
        """Whether a load goes on beside the batch."""
        return self._settings.load == "async" or (self._settings.load == "auto" and self._others_first)

    def _loaded(self, job: Job) -> None:
        """An asynchronous load has arrived."""
        if self._shell is not None:
            self._shell.loaded(job)
        self.cache.grow(job.holding, job.path, job.holding.blocks, min(job.findable, job.computed // self._block))
        self.ready((job,))

    def _grow(self, job: Job, tokens: int) -> bool:
        """Give a request room for `tokens` tokens, preempting others, then itself; return whether it has it."""
        blocks, findable = -(-tokens // self._block), min(job.findable, tokens // self._block)
        while not self.cache.grow(job.holding, job.path, blocks, findable):
            victim = next(reversed(self._running), None)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is job:
                return False
        return True

    # Preemption

    def _room_for_decodes(self) -> bool:
        """Take the blocks of one step of all decodes; return whether anyone had to be preempted for them."""
        preempted = False
        while self._decodes.blocks(1) > self.cache.free:
            self._preempt(next(reversed(self._running)))
            preempted = True
        self._taken = self._decodes.blocks(1)
        self.cache.take(self._taken)
        return preempted

    def _preempt(self, job: Job) -> None:
        """Give up the blocks of a request and compute it anew later, what it has put out included.

        Stores that still read its blocks are taken to have had them, as vLLM's connectors see to.
        """
        del self._running[job]
        extra, computed = 0, job.computed
        if job in self._prefilling:
            self._prefilling.remove(job)
        else:
            steps = self._decodes.leave(job)
            extra = self._decodes.grown(job.target, steps)
            if self._taken and (job.target + steps) % self._block == 0:
                self._taken -= 1
                extra += 1
            job.produced += steps
            computed = job.target + steps
            job.computed = job.target = job.prompt + job.produced
        self.pending_tokens += job.computed
        self.cache.release(job.holding, job.path, computed // self._block, extra)
        job.computed = job.decoded = 0
        job.preemptions += 1
        if job.ended:
            job.looked_up = False
        self._waiting.appendleft(job)

    # Steps with prompts

    def _run_step(self, compute_s: float) -> None:
        self._began = self._env.now
        self._compute_s = compute_s
        if not self._loads:
            self._wake_at(self._began + compute_s)
            return
        size = sum(load for _, load in self._loads)
        turn = [self._began]
        self.link.send(0, size, lambda: self._step_loaded(size, turn[0]), lambda: turn.__setitem__(0, self._env.now))

    def _step_loaded(self, size: int, turn: float) -> None:
        """The loads of the step that is under way have arrived: say when the step ends.

        Layer by layer, compute follows one layer behind the load and ends one layer after it, whichever is slower.
        """
        now, compute = self._env.now, self._compute_s
        if self._settings.load != "sync":
            first = turn + (now - turn) / self._layers
            end = max(first + compute, now + compute / self._layers)
        else:
            end = now + compute
        for job, _ in self._loads:
            if job.first_token < 0:
                job.exposed_load += end - self._began - compute
                job.step_load += end - self._began - compute
            if self._shell is not None:
                self._shell.loaded(job)
        self._wake_at(end)

    def _wake_at(self, when: float) -> None:
        self._version += 1
        event = self._env.timeout(max(0.0, when - self._env.now), self._version)
        event.callbacks.append(self._wake)

    def _wake(self, event: Any) -> None:
        if event.value != self._version:
            return
        self._left = 0
        if self._macro is None:
            began = self._began
            self._end_step()
        else:
            steps, first, slope = self._macro
            began = self._began + _run_s(steps - 1, first, slope)
            self._end_decodes(steps)
        if not self._settings.async_scheduling:
            began, self._left = self._env.now, 0
        self._schedule(began)

    def _end_step(self) -> None:
        now = self._env.now
        took = now - self._began
        self.busy_s += took
        self.prefill_s += took
        self._heat.ran(self._began, now, self._compute_s - self._costs.floor)
        if self.steps is not None:
            self.steps.append((self._began, now, sum(new for _, new in self._parts), self._decodes.batch, 1))
        self._finish(self._decodes.advance(1))
        for job, new in self._parts:
            job.computed += new
            self.pending_tokens -= new
            if self._shell is not None:
                self._shell.computed(job)
            if job.computed >= job.target:
                self._prompt_done(job, now)

    def _prompt_done(self, job: Job, now: float) -> None:
        self._prefilling.remove(job)
        job.produced += 1
        if job.first_token < 0:
            job.first_token = now
        if job.produced >= job.output:
            self._finish((job,))
        else:
            self._decodes.join(job)

    def _finish(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._unblock()
            self._left += 1
            job.finished = self._env.now
            job.produced = max(job.produced, job.output)
            del self._running[job]
            self.unfinished -= 1
            grown = self._decodes.grown(job.target, job.decoded)
            findable = min(job.whole_findable, (job.target + job.decoded) // self._block)
            self.cache.settle(job.holding, job.whole_path, grown, findable)
            if self._shell is not None and job.output_chain:
                self._shell.put_out(job)
            if not job.stores:
                self._release(job)

    def _release(self, job: Job) -> None:
        self.cache.release(job.holding, job.whole_path, (job.target + job.decoded) // self._block)

    # Steps of decodes alone

    def _run_decodes(self, delay: float) -> None:
        decodes = self._decodes
        while not (steps := decodes.fitting(self.cache.free + self._taken)):
            self._preempt(next(reversed(self._running)))
            if not decodes.batch:  # loads and stores under way hold the rest; their end wakes the engine
                self._idle = True
                return
        if not self._blocked and (self._waiting or self._loaded_jobs):  # what came too late for this step
            steps = 1
        batch, context = decodes.batch, decodes.context
        first = self._costs.decode(batch, context + 1)
        slope = (self._costs.decode(batch, context + steps) - first) / (steps - 1) if steps > 1 else 0.0
        self._began = self._env.now
        self._macro = (steps, first, slope)
        self._wake_at(self._began + delay + _run_s(steps, first, slope))

    def _shorten(self, macro: tuple[int, float, float]) -> None:
        """A request has come that may be admitted: end the run of decodes with the step that is under way."""
        steps, first, slope = macro
        done = _steps_until(self._env.now - self._began, first, slope)
        if done < steps:
            self._macro = (done, first, slope)
            self._wake_at(self._began + _run_s(done, first, slope))

    def _end_decodes(self, steps: int) -> None:
        now = self._env.now
        self.busy_s += now - self._began
        self._heat.ran(self._began, now, 0.0)
        if self.steps is not None:
            self.steps.append((self._began, now, 0, self._decodes.batch, steps))
        self.cache.take(self._decodes.blocks(steps) - self._taken)
        self._finish(self._decodes.advance(steps))


def _run_s(steps: int, first: float, slope: float) -> float:
    """Return the time of `steps` steps, each longer than the one before by `slope`."""
    return steps * (first + slope * (steps - 1) / 2)


def _steps_until(passed: float, first: float, slope: float) -> int:
    """Return the least number of steps, at least one, that take at least `passed` seconds."""
    if first <= 0:
        return 1
    guess = passed / first
    if slope > 1e-18:
        b = first - slope / 2
        guess = (math.sqrt(b * b + 2 * slope * passed) - b) / slope
    steps = max(1, int(guess))
    while _run_s(steps, first, slope) < passed:
        steps += 1
    while steps > 1 and _run_s(steps - 1, first, slope) >= passed:
        steps -= 1
    return steps
