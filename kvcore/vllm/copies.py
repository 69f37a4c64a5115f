"""A copy under way in a worker, and what becomes of it."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvcore.vllm.jobs import Copy, StepReport
from kvcore.vllm.mover import Mover
from kvkernels import DeviceError, DoneHandle, Handle, Measured

_LOG = logging.getLogger("kvcore.vllm")


@dataclass(slots=True, eq=False)
class Running:
    """A copy under way."""

    copy: Copy
    handle: Handle
    mover: Mover
    started: float
    valid: NDArray[np.bool_]
    """Chunks whose pages were of the right generation before the copy, and are copied; fewer once some have failed."""
    report: StepReport = field(default_factory=StepReport)
    """Of the step that loads it (synchronous loads only)."""
    step: int = 0
    """Which step that is."""
    failures_seen: int = 0
    """How many failed loads of this rank were known to who planned it (stores only)."""
    ordered: int = 0
    """Layers, from the first, that attention was made to wait for."""
    over: bool = False
    copied: NDArray[np.intp] = field(init=False)
    """The chunks that were handed to the mover, which counts them from 0."""
    bad_blocks: set[int] = field(default_factory=set)
    """Blocks that were to be loaded and were not, known when it is over."""

    def __post_init__(self) -> None:
        """Remember what is copied, of which some may turn out not to be valid."""
        self.copied = np.flatnonzero(self.valid)


class LateBlocks(Set[int]):
    """Block ids that are known when loads have ended: whoever looks waits for that. Pickled it is a plain set."""

    def __init__(self, known: Callable[[], set[int]]) -> None:
        self._known = known

    def __contains__(self, block: object) -> bool:
        """Whether it was not loaded."""
        return block in self._known()

    def __iter__(self) -> Iterator[int]:
        """Go through them."""
        return iter(self._known())

    def __bool__(self) -> bool:
        """True: whoever only wants to know whether there is something to tell need not wait for it."""
        return True

    def __len__(self) -> int:
        """How many there are."""
        return len(self._known())

    @classmethod
    def _from_iterable(cls, blocks: Iterable[Any]) -> set[Any]:
        """What operators make of it and another set."""
        return set(blocks)

    def __reduce__(self) -> tuple[Any, ...]:
        """Become a plain set."""
        return set, (list(self._known()),)


def is_over(one: Running) -> bool:
    """Whether a load has ended; one that the device refused has, and nothing of it is valid."""
    try:
        return one.handle.done()
    except Exception as error:
        refused(one, error)
        return True


def wait_for(one: Running) -> None:
    """Block until a load has ended, as `is_over`."""
    try:
        one.handle.wait()
    except Exception as error:
        refused(one, error)


def refused(one: Running, error: Exception) -> None:
    """Take nothing of a load for valid, and say why, once."""
    if one.valid.any():
        _LOG.error("Request %s: nothing is loaded: %s", one.copy.request, error)
    one.valid[:] = False


class InThread:
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
        """Nothing: the arena's pages are not written while their generation holds."""

    def rejected(self) -> tuple[int, ...]:
        """None: it is a load."""
        return ()

    def measured(self) -> Measured | None:
        """What it measured."""
        return self._future.result().measured()


def begun(copy: Callable[..., Handle], *given: Any, **named: Any) -> Handle:
    """Begin a copy; one that the device refuses at once fails like one that it refuses later, and not the engine."""
    try:
        return copy(*given, **named)
    except DeviceError as error:
        return _Refused(error)


class _Refused(DoneHandle):
    """A copy that could not be begun."""

    def __init__(self, error: DeviceError) -> None:
        self._error = error

    def done(self) -> bool:
        """Raises why."""
        raise self._error

    def wait(self) -> None:
        """Raises why."""
        raise self._error


class Behind(DoneHandle):
    """No copy, but over when these loads are."""

    def __init__(self, loads: Sequence[Handle]) -> None:
        self._loads = loads

    def wait(self) -> None:
        """Block until they have ended; raises what one of them raised."""
        for load in self._loads:
            load.wait()


NOTHING: Final = DoneHandle()
"""The handle of no copy at all."""
