"""How fast the engine's processor is at the moment: a shared host's halves and doubles within tenths of a second."""

import os
import time
from collections.abc import Sequence

LOOK = "kvcore_look"
SETTLE, LEAVE = "kvcore_settle", "kvcore_leave"
_ADDITIONS = 100_000
_BRIEF = 20_000


class Look:
    """What vLLM adds to its workers (`worker_extension_cls`); an engine on one GPU runs them in its own thread."""

    def kvcore_look(self) -> float:
        """Return the seconds of a fixed loop: a millisecond or two."""
        return _loop_s(_ADDITIONS)

    def kvcore_settle(self) -> list[int]:
        """Keep the engine's thread to the fastest of its processors; returns them all, fastest first."""
        self._kvcore_processors = sorted(os.sched_getaffinity(0))
        return settle(self._kvcore_processors)

    def kvcore_leave(self) -> None:
        """Let the engine's thread go where it could before it settled."""
        os.sched_setaffinity(0, self._kvcore_processors)


def settle(processors: Sequence[int]) -> list[int]:
    """Keep the calling thread to the processor that is the fastest of these at the moment; returns all, fastest first.

    Threads that it starts from then on stay there too: let it go again before long. Takes a millisecond a processor.
    """
    seconds: dict[int, float] = {}
    for processor in processors:
        os.sched_setaffinity(0, {processor})
        seconds[processor] = min(_loop_s(_BRIEF) for _ in range(2))
    order = sorted(processors, key=seconds.__getitem__)
    os.sched_setaffinity(0, order[:1])
    return order


def _loop_s(additions: int) -> float:
    began = time.perf_counter()
    sum(range(additions))
    return time.perf_counter() - began
