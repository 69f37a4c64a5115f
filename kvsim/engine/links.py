"""Links as shared resources: PCIe, a disk, a network."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from kvsim.profiles import TransferCurve

Direction: TypeAlias = Literal[0, 1]
"""0: towards the engine (a read); 1: away from it (a write)."""


class Copy:
    """One copy, waiting or under way."""

    __slots__ = ("done", "seconds", "size", "started")

    def __init__(self, size: int, seconds: float, done: Callable[[], None], started: Callable[[], None] | None) -> None:
        self.size = size
        self.seconds = seconds
        """What is left of it, at the speed that it has alone."""
        self.done = done
        self.started = started


class Link:
    """Two directions, each serving one copy at a time in the order of asking; both are slower while both are busy.

    Args:
        env: The SimPy environment.
        curves: How fast copies are in each direction, alone.
        duplex: Speed of each direction while both are busy, as a fraction of that alone: 0.5 shares one bandwidth.
        links: Of how many links together each direction's curve is, where a copy takes one of them; else 1.
    """

    def __init__(
        self, env: Any, curves: tuple[TransferCurve, TransferCurve], duplex: float, links: tuple[int, int] = (1, 1)
    ) -> None:
        self._env = env
        self._curves = curves
        self._duplex = duplex
        self._links = links
        self._queues: tuple[deque[Copy], deque[Copy]] = (deque(), deque())
        self._since = 0.0
        self._speed = 1.0
        self._version = 0
        self.queued_bytes = [0, 0]
        self.bytes = [0, 0]
        """Bytes copied so far in each direction."""
        self.busy_s = [0.0, 0.0]

    def send(
        self, direction: Direction, size: int, done: Callable[[], None], started: Callable[[], None] | None = None
    ) -> None:
        """Copy `size` bytes; `started` is called when their turn has come, `done` when they have arrived."""
        seconds = self._curves[direction].at(size * self._links[direction])
        queue = self._queues[direction]
        if not queue and seconds <= 0:  # a copy that takes no time is over before anything else can happen
            self.bytes[direction] += size
            if started is not None:
                started()
            done()
            return
        self._advance()
        queue.append(Copy(size, seconds, done, started))
        self.queued_bytes[direction] += size
        if len(queue) == 1:
            if started is not None:
                started()
            self._plan()

    def _advance(self) -> None:
        now = self._env.now
        passed = now - self._since
        self._since = now
        first, second = self._queues
        if first:
            first[0].seconds -= passed * self._speed
            self.busy_s[0] += passed
        if second:
            second[0].seconds -= passed * self._speed
            self.busy_s[1] += passed

    def _plan(self) -> None:
        """Wake up when the next of the copies under way ends."""
        first, second = self._queues
        self._version += 1
        if first and second:
            self._speed = self._duplex
            left = min(first[0].seconds, second[0].seconds)
        elif first or second:
            self._speed = 1.0
            left = (first or second)[0].seconds
        else:
            return
        event = self._env.timeout(max(0.0, left / self._speed), self._version)
        event.callbacks.append(self._wake)

    def _wake(self, event: Any) -> None:
        if event.value != self._version:
            return
        self._advance()
        first, second = self._queues
        ended = []
        nothing = max(1e-12, 2 * math.ulp(self._env.now))  # what rounding leaves: of the clock, too, hours into a run
        if first and first[0].seconds <= nothing:
            ended.append(self._end(0, first))
        if second and second[0].seconds <= nothing:
            ended.append(self._end(1, second))
        self._plan()
        for copy, following in ended:
            if following is not None and following.started is not None:
                following.started()
            copy.done()

    def _end(self, direction: Direction, queue: deque[Copy]) -> tuple[Copy, Copy | None]:
        """Take the copy that has arrived off its queue; return it and the one whose turn it is now."""
        copy = queue.popleft()
        self.queued_bytes[direction] -= copy.size
        self.bytes[direction] += copy.size
        return copy, queue[0] if queue else None
