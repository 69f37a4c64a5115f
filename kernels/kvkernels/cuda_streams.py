"""CUDA streams and memory through torch, copies through the driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvkernels.arena import Ints
from kvkernels.cuda_driver import CudaDriver, cuda_driver
from kvkernels.streams import Event, Stream
from kvkernels.submit import Submitter, ThreadSubmitter

__all__ = ["CudaRuntime", "CudaStream"]

_HIGH, _NORMAL = -1, 0


class CudaStream:
    """A torch stream whose copies are batched driver calls.

    Args:
        stream: the torch stream; not the legacy default stream when copies are put on it.
        driver: the driver's calls.
        batched: one call for all ranges of a copy, or one each.
    """

    def __init__(self, stream: Any, driver: CudaDriver, *, batched: bool) -> None:
        self.torch = stream
        self._driver = driver
        self._batched = batched

    def wait(self, event: Event) -> None:
        """Order this stream after an event of any stream of the device."""
        self.torch.wait_event(event)

    def record(self) -> Event:
        """A CUDA event without timing."""
        event: Event = self.torch.record_event()
        return event

    def copy(self, target: Ints, source: Ints, length: Ints) -> None:
        """Enqueue copies; host ranges must be pinned and stay so until an event after them."""
        if self._batched and len(length) > 1:
            self._driver.copy_batch(target, source, length, self.torch.cuda_stream)
        else:
            self._driver.copy_each(target, source, length, self.torch.cuda_stream)

    def launch(self, kernel: Callable[[], None]) -> None:
        """Run with this stream as torch's (and so Triton's) current one."""
        with torch.cuda.stream(self.torch):
            kernel()


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

    def submitter(self, name: str) -> Submitter:
        """A thread of its own for all but the first steps."""
        return ThreadSubmitter(name, self.enter_thread)

    def _wrap(self, stream: Any) -> CudaStream:
        return CudaStream(stream, self._driver, batched=self._batched)
