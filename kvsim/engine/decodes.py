"""The decoding part of a batch, advanced many steps at a time."""

import heapq
from collections.abc import Iterator

from kvsim.engine.job import Job


class Decodes:
    """Requests that get one token a step, without a loop over them a step.

    All share one step counter: a request knows the counter's value at which it ends, and the blocks that n steps need
    follow from how many requests stand at each offset within their block.
    """

    def __init__(self, block_tokens: int) -> None:
        self.step = 0
        self.batch = 0
        self._block = block_tokens
        self._tokens = 0
        self._phases = [0] * block_tokens
        """Requests by (tokens - step) modulo the block at their joining."""
        self._ends: list[tuple[int, int, int, Job]] = []

    @property
    def context(self) -> float:
        """Tokens of a request on average."""
        return self._tokens / self.batch if self.batch else 0.0

    def join(self, job: Job) -> None:
        """A request whose prompt is computed begins to decode: `target` tokens are in its blocks."""
        job.joined_step = self.step
        job.finish_step = self.step + job.output - job.produced
        heapq.heappush(self._ends, (job.finish_step, job.index, job.life, job))
        self._phases[(job.target - self.step) % self._block] += 1
        self._tokens += job.target
        self.batch += 1

    def leave(self, job: Job) -> int:
        """A request stops decoding; return the steps that it has made."""
        steps = self.step - job.joined_step
        job.life += 1
        job.decoded = steps
        self._phases[(job.target - job.joined_step) % self._block] -= 1
        self._tokens -= job.target + steps
        self.batch -= 1
        return steps

    def blocks(self, steps: int) -> int:
        """Return the new blocks that all requests together need for the next `steps` steps."""
        phases, block = self._phases, self._block
        first = -self.step % block  # who stands there needs a block in the first step; then those before them, in turn
        if steps == 1:
            return phases[first]
        cycles, rest = divmod(steps, block)
        needed = cycles * self.batch
        if rest:
            wrapped = rest - first - 1
            needed += sum(phases[max(0, -wrapped) : first + 1])
            if wrapped > 0:
                needed += sum(phases[-wrapped:])
        return needed

    def grown(self, tokens: int, steps: int) -> int:
        """Return the new blocks that a request of `tokens` tokens took for `steps` steps."""
        return -(-(tokens + steps) // self._block) + -tokens // self._block

    def fitting(self, free: int) -> int:
        """Return the steps to the first request's end, or fewer where `free` blocks do not last so long."""
        ends = self._ends
        while ends[0][2] != ends[0][3].life:
            heapq.heappop(ends)
        steps = ends[0][0] - self.step
        if self.blocks(steps) <= free:
            return steps
        steps = min(steps, free // self.batch * self._block)
        while self.blocks(steps + 1) <= free:
            steps += 1
        return steps

    def advance(self, steps: int) -> Iterator[Job]:
        """Give every request `steps` tokens; return those that have ended, no longer among the others."""
        self.step += steps
        self._tokens += steps * self.batch
        ended = []
        ends = self._ends
        while ends and ends[0][0] <= self.step:
            _, _, life, job = heapq.heappop(ends)
            if life == job.life:
                self.leave(job)
                ended.append(job)
        return iter(ended)
