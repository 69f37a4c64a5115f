"""CUDA streams and memory of torch's; what is put on the streams goes through the driver.

At once, in the calling thread, or, while a transfer is handed over, by a pump: then it is written down.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from kvkernels.arena import Ints
from kvkernels.cuda_driver import CudaDriver, cuda_driver
from kvkernels.errors import DeviceError
from kvkernels.pump import Program, Pump
from kvkernels.streams import Event, Stream
from kvkernels.submit import Submitter, ThreadSubmitter, Work

__all__ = ["CudaEvent", "CudaRuntime", "CudaStream", "HeldEvents"]

_AnswerT = TypeVar("_AnswerT")
_SpareT = TypeVar("_SpareT")
_HIGH, _NORMAL = -1, 0
_INLINE_S, _URGENT_S = 0.001, 0.02
"""How long whoever submits a transfer writes it down itself. An urgent one is waited for by the engine's next step: a
thread would hold that up for as long, and lose more in handing the interpreter back and forth."""
_POST_ROWS = 48
"""Rows that are handed over at a time: some pieces of a transfer."""
_LEAST_UPLOAD = 1024
"""Values."""


def _taken(spare: list[_SpareT], make: Callable[[], _SpareT]) -> _SpareT:
    """One that is not in use, or a new one; several threads take from a list, so that looking first is of no use."""
    try:
        return spare.pop()
    except IndexError:
        return make()


class _Writing(threading.local):
    """What the calling thread writes down at the moment."""

    program: Program | None = None


class CudaEvent:
    """A point in a stream's work.

    Args:
        stream: CUDA's handle of the stream.
        driver: the driver's calls.
        spare: events of the device, timed or not, that are not in use: one is taken, or made, and given back in the
            end.
        enter_thread: makes the device usable from a thread: any may ask.
        timed: whether it tells when it was reached.
        program: what it is written into; none: it is recorded at once.
        row: the row that will record it, where that is known.
    """

    __slots__ = ("_driver", "_enter_thread", "_program", "_row", "_spare", "handle")

    def __init__(
        self,
        stream: int,
        driver: CudaDriver,
        spare: list[int],
        enter_thread: Callable[[], None],
        *,
        timed: bool,
        program: Program | None = None,
        row: int = 0,
    ) -> None:
        self._driver = driver
        self._spare = spare
        self._enter_thread = enter_thread
        self._program = program
        self._row = row
        self.handle = _taken(spare, partial(driver.new_event, timed=timed))
        if program is None:
            driver.record(self.handle, stream)
        elif not row:
            self._row = program.record(self.handle, stream, self)

    def __del__(self) -> None:
        """Give it back, reached or not."""
        if hasattr(self, "handle"):
            self._spare.append(self.handle)

    def query(self) -> bool:
        """Whether the point has been reached."""
        if self._program is not None and not self._program.pump.carried_out(self._row):
            return False  # to the driver an event that is not recorded yet is one that was reached
        return bool(self._ask(self._driver.reached))

    def synchronize(self) -> None:
        """Sleep until it has been."""
        if self._program is not None:
            self._program.pump.wait_for(self._row)
        self._ask(self._driver.wait)

    def fault(self) -> DeviceError | None:
        """What kept some of the work before it from being enqueued."""
        return None if self._program is None else self._program.fault()

    def be_recorded(self, by: Pump | None = None) -> None:
        """Return when it is recorded, or will be before what this pump is given next."""
        if self._program is not None and self._program.pump is not by:
            self._program.pump.until(self._row)

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


class HeldEvents:
    """Events without timing that nobody asks: their handles alone, given back in the end."""

    __slots__ = ("_spare", "handles")

    def __init__(self, count: int, driver: CudaDriver, spare: list[int]) -> None:
        self._spare = spare
        self.handles: list[int] = []
        for _ in range(count):
            self.handles.append(_taken(spare, driver.new_event))

    def __del__(self) -> None:
        """Give them back."""
        self._spare.extend(self.handles)


class CudaStream:
    """A torch stream on which everything is put by driver calls, copies in batches.

    Args:
        stream: the torch stream; not the legacy default stream when copies are put on it.
        driver: the driver's calls.
        batched: one call for all ranges of a copy, or one each.
        spare: events that are not in use: those without timing, and those with.
        enter_thread: see `CudaEvent`.
        writing: what the calling thread writes down, instead of calling the driver.
    """

    def __init__(
        self,
        stream: Any,
        driver: CudaDriver,
        *,
        batched: bool,
        spare: tuple[list[int], list[int]],
        enter_thread: Callable[[], None],
        writing: _Writing,
    ) -> None:
        self.torch = stream
        self.handle = int(stream.cuda_stream)
        """CUDA's."""
        self._writing = writing
        self._driver = driver
        self._batched = batched
        self._spare = spare
        self._enter_thread = enter_thread

    def wait(self, event: Event) -> None:
        """Order this stream after an event of any stream of the device."""
        point, program = cast("CudaEvent", event), self._writing.program
        if program is None:
            point.be_recorded()
            self._driver.order(self.handle, point.handle)
        else:
            point.be_recorded(by=program.pump)
            program.order(self.handle, point.handle, point)

    def record(self, *, timed: bool = False) -> Event:
        """An event of the stream's work so far."""
        spare, program = self._spare[timed], self._writing.program
        return CudaEvent(self.handle, self._driver, spare, self._enter_thread, timed=timed, program=program)

    def synchronize(self) -> None:
        """Block until all that is on the stream is done."""
        self._driver.finish(self.handle)

    def copy(self, target: Ints, source: Ints, length: Ints) -> None:
        """Enqueue copies; host ranges must be pinned and stay so until an event after them."""
        columns = np.array((target, source, length), np.int64)
        caller = self._writing.program or self._driver
        if self._batched and len(length) > 1:
            caller.copy_batch(columns, self.handle)
        else:
            caller.copy_each(columns, self.handle)

    def launch(self, kernel: Callable[[], None]) -> None:
        """Run with this stream as torch's (and so Triton's) current one."""
        if (program := self._writing.program) is not None:
            program.pump.catch_up()
        with torch.cuda.stream(self.torch):
            kernel()

    def launch_compiled(self, function: int, programs: int, threads: int, shared: int, values: Sequence[int]) -> None:
        """Launch a kernel by the driver; `values` are its parameters, pointers and integers."""
        caller = self._writing.program or self._driver
        caller.launch(function, programs, threads, shared, self.handle, values)


class _Upload:
    """Pinned memory and the device's, for so many values.

    Args:
        capacity: how many.
        stream: which uses it first. What torch gives out may be freed memory that work queued on the same stream has
            yet to write: on the engine's, that is its step.
    """

    def __init__(self, capacity: int, stream: CudaStream) -> None:
        self._pinned = torch.empty(capacity, dtype=torch.int64, pin_memory=True)
        self.host: Ints = self._pinned.numpy()
        self.source = int(self._pinned.data_ptr())
        with torch.cuda.stream(stream.torch):
            self.device = torch.empty(capacity, dtype=torch.int64, device=stream.torch.device)
        self.target = int(self.device.data_ptr())


class _Lent:
    """Memory that is given back when nobody keeps this."""

    def __init__(self, pair: _Upload, spare: list[_Upload]) -> None:
        self._pair = pair
        self._spare = spare

    def __del__(self) -> None:
        self._spare.append(self._pair)


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
        self._batched = self._driver.batch is not None if batched is None else batched
        self._spare_events: tuple[list[int], list[int]] = [], []
        self._spare_uploads: dict[int, list[_Upload]] = {}
        """By the values that they hold."""
        self._writing = _Writing()
        self._index = torch.cuda.current_device() if self.device.index is None else self.device.index
        self._engines: dict[int, CudaStream] = {}
        """Streams of the callers', by CUDA's handle."""

    def stream(self, *, urgent: bool) -> Stream:
        """A side stream; urgent ones have a higher priority for their kernels."""
        make: Any = torch.cuda.Stream
        return self._wrap(make(self.device, priority=_HIGH if urgent else _NORMAL))

    def current(self) -> Stream:
        """The calling thread's current torch stream."""
        # As Triton asks for it: torch.cuda.current_stream makes an object, and takes as long as all that is done here.
        handle = torch._C._cuda_getCurrentRawStream(self._index)
        known = self._engines.get(handle)
        if known is None:
            known = self._engines[handle] = self._wrap(torch.cuda.current_stream(self.device))
        return known

    def writing(self) -> Program | None:
        """What the calling thread writes down at the moment, where copies can be made in batches."""
        return self._writing.program if self._batched else None

    def written(self, program: Program, row: int, *, timed: bool) -> CudaEvent:
        """An event that a row of the program will record."""
        spare = self._spare_events[timed]
        return CudaEvent(0, self._driver, spare, self.enter_thread, timed=timed, program=program, row=row)

    def held(self, count: int) -> HeldEvents:
        """Events that rows of a program will record, and only rows wait for."""
        return HeldEvents(count, self._driver, self._spare_events[False])

    def staging(self, nbytes: int) -> torch.Tensor:
        """Device bytes from torch's allocator, which nothing that is queued will write."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        torch.cuda.current_stream(self.device).synchronize()  # who freed it may still use it on this stream
        return memory

    def upload(self, values: Ints, stream: Stream) -> Any:
        """Copy through pinned memory by the stream; the caller must keep the tensor while the device reads it.

        Both memories are used again then: torch's own way takes a quarter of a millisecond of the engine's thread.
        """
        count = len(values)
        capacity = max(_LEAST_UPLOAD, 1 << (count - 1).bit_length())
        spare = self._spare_uploads.setdefault(capacity, [])
        pair = _taken(spare, partial(_Upload, capacity, cast("CudaStream", stream)))
        pair.host[:count] = values
        if count:
            stream.copy(*(np.array([value], np.int64) for value in (pair.target, pair.source, 8 * count)))
        uploaded: Any = pair.device[:count]
        uploaded.lent = _Lent(pair, spare)  # it goes when the tensor does
        return uploaded

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

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The same for a while, in a thread that may be the engine's."""
        with torch.cuda.device(self.device), self._driver.capture_relaxed():
            yield

    def submitter(self, name: str, *, urgent: bool) -> Submitter:
        """Writes urgent transfers down at once, of others only the first steps; a pump calls the driver."""
        pump = Pump(self._driver, name, self.enter_thread)
        return PumpSubmitter(pump, self._writing, self.enter_thread, inline_s=_URGENT_S if urgent else _INLINE_S)

    def _wrap(self, stream: Any) -> CudaStream:
        return CudaStream(
            stream,
            self._driver,
            batched=self._batched,
            spare=self._spare_events,
            enter_thread=self.enter_thread,
            writing=self._writing,
        )


class PumpSubmitter(ThreadSubmitter):
    """Has steps written down rather than done, and waits for nothing itself: the pump does.

    Args:
        pump: carries out what is written.
        writing: tells the streams what to write into.
        enter_thread: called in the thread that has the rest of a long work written.
        inline_s: as there.
    """

    def __init__(self, pump: Pump, writing: _Writing, enter_thread: Callable[[], None], *, inline_s: float) -> None:
        super().__init__(pump.name, enter_thread, inline_s=inline_s)
        self._pump = pump
        self._writing = writing

    def catch_up(self) -> None:
        """Return when the pump has carried out what is written."""
        self._pump.catch_up()

    def close(self) -> None:
        """Return when everything has been handed to the device."""
        super().close()
        self._pump.close()

    def _begun(self, work: Work) -> Program:
        program = work.notes = self._pump.program()
        if work.rest is not None:
            event, seconds = cast("CudaEvent", work.rest[0]), work.rest[1]
            event.be_recorded(by=self._pump)
            program.rest(event.handle, round(1e6 * seconds), event)
        return program

    def _fail(self, work: Work, error: Exception) -> None:
        """Behind what is written of it, and that is handed over: or the next transfer would do so, behind its end."""
        self._writing.program = work.notes or self._pump.program()
        try:
            work.fail(error)
        finally:
            self._writing.program = None
        self._pump.post()

    def _step(self, work: Work) -> tuple[bool, Event | None]:
        program: Program = work.notes or self._begun(work)
        self._writing.program = program
        try:
            more, before = work.step()
        except BaseException:  # what ends the process: the work has failed, and its end is handed over
            self._pump.post()
            raise
        finally:
            self._writing.program = None
        if before is not None:
            program.wait(cast("CudaEvent", before).handle, before)
        if not more or self._pump.pending >= _POST_ROWS:
            self._pump.post()
        return more, None
