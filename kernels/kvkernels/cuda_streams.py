"""CUDA streams and memory of torch's; what is put on the streams goes through the driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from kvkernels.arena import Ints
from kvkernels.cuda_driver import CudaDriver, cuda_driver
from kvkernels.streams import Event, Stream
from kvkernels.submit import Submitter, ThreadSubmitter

__all__ = ["CudaRuntime", "CudaStream"]

_AnswerT = TypeVar("_AnswerT")
_HIGH, _NORMAL = -1, 0
_INLINE_S, _URGENT_S = 0.001, 0.02
"""How long whoever submits a transfer hands it over itself. An urgent one is waited for by the engine's next step: a
thread would hold that up for as long, and lose more in handing the interpreter back and forth."""


class CudaEvent:
    """A point in a stream's work.

    Args:
        stream: CUDA's handle of the stream.
        driver: the driver's calls.
        spare: events of the device, timed or not, that are not in use: one is taken, or made, and given back in the
            end.
        enter_thread: makes the device usable from a thread: any may ask.
        timed: whether it tells when it was reached.
    """

    __slots__ = ("_driver", "_enter_thread", "_spare", "handle")

    def __init__(
        self, stream: int, driver: CudaDriver, spare: list[int], enter_thread: Callable[[], None], *, timed: bool
    ) -> None:
        self._driver = driver
        self._spare = spare
        self._enter_thread = enter_thread
        self.handle = spare.pop() if spare else driver.new_event(timed=timed)
        driver.record(self.handle, stream)

    def __del__(self) -> None:
        """Give it back, reached or not."""
        if hasattr(self, "handle"):
            self._spare.append(self.handle)

    def query(self) -> bool:
        """Whether the point has been reached."""
        return bool(self._ask(self._driver.reached))

    def synchronize(self) -> None:
        """Sleep until it has been."""
        self._ask(self._driver.wait)

    def since(self, earlier: Event) -> float:
        """Seconds from another event to this one; DeviceError where one is not timed, or not reached."""
        begin = cast("CudaEvent", earlier).handle
        return float(self._ask(lambda end: self._driver.elapsed(begin, end)) or 0.0)

    def _ask(self, question: Callable[[int], _AnswerT | None]) -> _AnswerT | None:
        answer = question(self.handle)
        if answer is None:
            self._enter_thread()
            answer = question(self.handle)
        return answer


class CudaStream:
    """A torch stream on which everything is put by driver calls, copies in batches.

    Args:
        stream: the torch stream; not the legacy default stream when copies are put on it.
        driver: the driver's calls.
        batched: one call for all ranges of a copy, or one each.
        spare: events that are not in use: those without timing, and those with.
        enter_thread: see `CudaEvent`.
    """

    def __init__(
        self,
        stream: Any,
        driver: CudaDriver,
        *,
        batched: bool,
        spare: tuple[list[int], list[int]],
        enter_thread: Callable[[], None],
    ) -> None:
        self.torch = stream
        self._handle = int(stream.cuda_stream)
        self._driver = driver
        self._batched = batched
        self._spare = spare
        self._enter_thread = enter_thread

    def wait(self, event: Event) -> None:
        """Order this stream after an event of any stream of the device."""
        self._driver.order(self._handle, cast("CudaEvent", event).handle)

    def record(self, *, timed: bool = False) -> Event:
        """An event of the stream's work so far."""
        return CudaEvent(self._handle, self._driver, self._spare[timed], self._enter_thread, timed=timed)

    def copy(self, target: Ints, source: Ints, length: Ints) -> None:
        """Enqueue copies; host ranges must be pinned and stay so until an event after them."""
        if self._batched and len(length) > 1:
            self._driver.copy_batch(target, source, length, self._handle)
        else:
            self._driver.copy_each(target, source, length, self._handle)

    def launch(self, kernel: Callable[[], None]) -> None:
        """Run with this stream as torch's (and so Triton's) current one."""
        with torch.cuda.stream(self.torch):
            kernel()

    def launch_compiled(self, function: int, programs: int, threads: int, shared: int, arguments: Any) -> None:
        """Launch a kernel by the driver."""
        self._driver.launch(function, programs, threads, shared, self._handle, arguments)


class CudaRuntime:
    """One CUDA device.

    Args:
        device: torch device or its index.
        batched: use cuMemcpyBatchAsync where the driver has it (None), always, or never.
    """

    needs_pinned = True

    def __init__(self, device: torch.device | int | str, *, batched: bool | None = None) -> None:
        self.device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        self._driver = cuda_driver()
        self._batched = self._driver.has_batch if batched is None else batched
        self._spare_events: tuple[list[int], list[int]] = [], []

    def stream(self, *, urgent: bool) -> Stream:
        """A side stream; urgent ones have a higher priority for their kernels."""
        make: Any = torch.cuda.Stream
        return self._wrap(make(self.device, priority=_HIGH if urgent else _NORMAL))

    def current(self) -> Stream:
        """The calling thread's current torch stream."""
        return self._wrap(torch.cuda.current_stream(self.device))

    def staging(self, nbytes: int) -> torch.Tensor:
        """Device bytes from torch's allocator."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def upload(self, values: Ints, stream: Stream) -> Any:
        """Copy through pinned memory, allocated and filled on the given stream.

        Allocated there, its memory can only be given again to later work of that stream; the caller still must keep
        it while other streams read it.
        """
        pinned = torch.from_numpy(np.array(values, np.int64)).pin_memory()
        uploaded: list[torch.Tensor] = []
        stream.launch(lambda: uploaded.append(pinned.to(self.device, non_blocking=True)))
        return uploaded[0]

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Pinned host bytes from torch's allocator."""
        memory: NDArray[np.uint8] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        return memory

    def enter_thread(self) -> None:
        """Make the device's primary context current in this thread, whatever another one captures into a graph.

        An engine may capture CUDA graphs while this thread registers memory or copies; the default mode forbids that.
        """
        torch.cuda.set_device(self.device)
        self._driver.relax_capture()

    def submitter(self, name: str, *, urgent: bool) -> Submitter:
        """Hands urgent transfers over at once as far as they fit the window, of others only the first steps."""
        return ThreadSubmitter(name, self.enter_thread, inline_s=_URGENT_S if urgent else _INLINE_S)

    def _wrap(self, stream: Any) -> CudaStream:
        return CudaStream(
            stream, self._driver, batched=self._batched, spare=self._spare_events, enter_thread=self.enter_thread
        )
