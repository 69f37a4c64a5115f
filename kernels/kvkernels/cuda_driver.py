"""The CUDA driver calls that transfers are made of, with arguments as prepared arrays.

cuda-python's own binding of `cuMemcpyBatchAsync` takes Python lists, and building them costs more than the copies (40
of 43 ms for 32 KiB pieces on an H100). So cuda-python only looks the function up; it is then called through ctypes
with the addresses of NumPy arrays.

Calls that only enqueue keep the interpreter's lock. A thread that gives it up at every one of a thousand short calls,
as torch's streams and events do, makes the engine's thread fight for it at each of its own: launching a step of
Qwen3-8B beside a load took 128 ms instead of 32.

Source: CUDA driver API reference, "Memory Management": cuMemcpyBatchAsync (12.8; without failIdx since 13.0),
cuMemcpyAsync, cuMemHostRegister, cuGetProcAddress; "Stream Management": cuStreamWaitEvent,
cuThreadExchangeStreamCaptureMode; "Event Management"; "Execution Control": cuLaunchKernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from kvkernels.arena import Ints
from kvkernels.errors import DeviceError

__all__ = ["BatchCall", "CudaDriver", "cuda_driver"]

NOT_READY = 600  # CUDA_ERROR_NOT_READY
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: none is current in the calling thread
_SLEEPING = 1  # CU_EVENT_BLOCKING_SYNC: whoever waits leaves its core
_UNTIMED = 2  # CU_EVENT_DISABLE_TIMING
_REGISTER_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: pinned for every context of the process
_CAPTURE_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_ACCESS_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
_OVERLAP_WITH_COMPUTE = 1  # CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE
_WITHOUT_FAIL_INDEX, _WITH_FAIL_INDEX = 13000, 12080  # CUDA versions whose signatures differ


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("src_access_order", ctypes.c_int),
        ("src_location", _Location),
        ("dst_location", _Location),
        ("flags", ctypes.c_uint),
    )


@dataclass(frozen=True, slots=True)
class BatchCall:
    """This driver's cuMemcpyBatchAsync.

    Attributes:
        address: where it begins.
        constants: what it takes between the number of ranges and the stream.
    """

    address: int
    constants: tuple[int, ...]


class CudaDriver:
    """Copies, events and registrations through libcuda; the calling thread must have a current context.

    Args:
        library: the driver's.

    Raises:
        DeviceError: libcuda cannot be loaded, or a call fails.
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            self._lib = ctypes.CDLL(library)
            held = ctypes.PyDLL(library)
        except OSError as error:
            raise DeviceError(f"{library}: {error}") from error
        self._create_event = held.cuEventCreate
        self._create_event.argtypes = [ctypes.c_void_p, ctypes.c_uint]
        self._record_event, self._query_event = held.cuEventRecord, held.cuEventQuery
        self._record_event.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._query_event.argtypes = [ctypes.c_void_p]
        self._stream_wait = held.cuStreamWaitEvent
        self._stream_wait.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
        self._wait_event = self._lib.cuEventSynchronize
        self._wait_event.argtypes = [ctypes.c_void_p]
        self._finish = self._lib.cuStreamSynchronize
        self._finish.argtypes = [ctypes.c_void_p]
        self._elapsed = held.cuEventElapsedTime
        self._elapsed.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self._launch = held.cuLaunchKernel
        sizes = [ctypes.c_uint] * 7  # grid and block in three dimensions, shared memory
        self._launch.argtypes = [ctypes.c_void_p, *sizes, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self._copy = held.cuMemcpyAsync
        self._copy.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
        self._register = self._lib.cuMemHostRegister_v2
        self._register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
        self._unregister = self._lib.cuMemHostUnregister
        self._unregister.argtypes = [ctypes.c_void_p]
        self._exchange_capture_mode = self._lib.cuThreadExchangeStreamCaptureMode
        self._attributes = _Attributes(src_access_order=_ACCESS_IN_STREAM_ORDER, flags=_OVERLAP_WITH_COMPUTE)
        self._attribute_starts = (ctypes.c_size_t * 1)(0)
        self._failed = ctypes.c_size_t()
        self.batch = self._find_batch()
        """None where the driver has none (before CUDA 12.8)."""
        self._batch = self._batched()

    def copy_batch(self, ranges: Ints, stream: int) -> None:
        """Copy ranges, (3, count) targets, sources and lengths, by one call; not on the legacy null stream."""
        if self._batch is None:
            raise DeviceError("cuMemcpyBatchAsync: this driver has none (it came with CUDA 12.8)")
        if count := ranges.shape[1]:
            first = int(ranges.ctypes.data)  # of one array: NumPy is slow to tell an address
            code = self._batch(first, first + 8 * count, first + 16 * count, count, stream)
            self._check("cuMemcpyBatchAsync", code)

    def copy_each(self, ranges: Ints, stream: int) -> None:
        """Copy range after range, one driver call each."""
        for to, origin, size in ranges.T.tolist():
            code = self._copy(to, origin, size, stream)
            if code:
                self._check("cuMemcpyAsync", code)

    def record(self, event: int, stream: int) -> None:
        """Put an event behind everything that is on a stream; what was ordered behind it before stays so."""
        self._check("cuEventRecord", self._record_event(event, stream))

    def new_event(self, *, timed: bool = False) -> int:
        """Create an event of the calling thread's context."""
        event = ctypes.c_void_p()
        flags = _SLEEPING if timed else _SLEEPING | _UNTIMED
        self._check("cuEventCreate", self._create_event(ctypes.byref(event), flags))
        return int(event.value or 0)

    def order(self, stream: int, event: int) -> None:
        """Make what is put on a stream from now on wait for an event."""
        self._check("cuStreamWaitEvent", self._stream_wait(stream, event, 0))

    def reached(self, event: int) -> bool | None:
        """Whether an event was reached; None where the calling thread has no context."""
        return self._answer("cuEventQuery", self._query_event(event))

    def wait(self, event: int) -> bool | None:
        """Block the calling thread, and no other, until an event is reached; None where it has no context."""
        return self._answer("cuEventSynchronize", self._wait_event(event))

    def finish(self, stream: int) -> None:
        """Block the calling thread, and no other, until all that is on a stream is done."""
        self._check("cuStreamSynchronize", self._finish(stream))

    def elapsed(self, begin: int, end: int) -> float | None:
        """Seconds between two timed events that were reached; None where the calling thread has no context."""
        milliseconds = ctypes.c_float()
        code = self._elapsed(ctypes.byref(milliseconds), begin, end)
        if code == _INVALID_CONTEXT:
            return None
        self._check("cuEventElapsedTime", code)
        return 1e-3 * milliseconds.value

    def launch(self, function: int, blocks: int, threads: int, shared: int, stream: int, values: Sequence[int]) -> None:
        """Launch a CUfunction in one dimension; `values` are its parameters, pointers and integers of 32 bits."""
        words = (ctypes.c_int64 * len(values))(*values)
        first = ctypes.addressof(words)
        addresses = (ctypes.c_void_p * len(values))(*range(first, first + 8 * len(values), 8))
        code = self._launch(function, blocks, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(addresses), None)
        self._check("cuLaunchKernel", code)

    def _answer(self, call: str, code: int) -> bool | None:
        if code == _INVALID_CONTEXT:
            return None
        if code != NOT_READY:
            self._check(call, code)
        return code != NOT_READY

    def register(self, address: int, nbytes: int) -> None:
        """Pin host memory for every context of this process."""
        self._check("cuMemHostRegister", self._register(address, nbytes, _REGISTER_PORTABLE))

    def unregister(self, address: int) -> None:
        """Undo `register` of the range that began at this address."""
        self._check("cuMemHostUnregister", self._unregister(address))

    def relax_capture(self) -> None:
        """Allow this thread every call, for good, while another thread captures a graph of streams that are not ours.

        While an engine captures in the default (global) mode, other threads are refused calls such as
        cuMemHostRegister and cuEventQuery, and the capture is spoilt.
        """
        self._swap_capture_mode(ctypes.c_int(_CAPTURE_RELAXED))

    @contextmanager
    def capture_relaxed(self) -> Iterator[None]:
        """The same for a while, in a thread that may be the engine's."""
        mode = ctypes.c_int(_CAPTURE_RELAXED)
        self._swap_capture_mode(mode)
        try:
            yield
        finally:
            self._swap_capture_mode(mode)

    def _swap_capture_mode(self, mode: ctypes.c_int) -> None:
        """Set the calling thread's mode to this one's value; what it was is left there."""
        self._check("cuThreadExchangeStreamCaptureMode", self._exchange_capture_mode(ctypes.byref(mode)))

    def address(self, call: str) -> int:
        """Where a function of libcuda begins."""
        return int(ctypes.cast(getattr(self._lib, call), ctypes.c_void_p).value or 0)

    def error(self, call: str, code: int) -> DeviceError:
        """What a call's code says."""
        name = ctypes.c_char_p()
        self._lib.cuGetErrorName(ctypes.c_int(code), ctypes.byref(name))
        return DeviceError(f"{call}: {(name.value or b'unknown error').decode()} ({code})")

    def _check(self, call: str, code: int) -> None:
        if code:
            raise self.error(call, code)

    def _batched(self) -> Callable[[int, int, int, int, int], int] | None:
        if self.batch is None:
            return None
        constants, more = self.batch.constants, len(self.batch.constants) - 3
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        kinds = (pointer, pointer, pointer, size, pointer, pointer, size, *[pointer] * more, pointer)
        call = ctypes.PYFUNCTYPE(ctypes.c_int, *kinds)(self.batch.address)
        return lambda to, origin, sizes, count, stream: call(to, origin, sizes, count, *constants, stream)

    def _find_batch(self) -> BatchCall | None:
        constants = (ctypes.addressof(self._attributes), ctypes.addressof(self._attribute_starts), 1)
        if address := self._address("cuMemcpyBatchAsync", _WITHOUT_FAIL_INDEX):
            return BatchCall(address, constants)
        if address := self._address("cuMemcpyBatchAsync", _WITH_FAIL_INDEX):
            return BatchCall(address, (*constants, ctypes.addressof(self._failed)))
        return None

    def _address(self, symbol: str, version: int) -> int:
        """The driver's function for one CUDA version, 0 where it has none."""
        try:
            from cuda.bindings import driver  # noqa: PLC0415  (optional, and only on a CUDA machine)

            code, address, _ = driver.cuGetProcAddress(symbol.encode(), version, 0)
        except (ImportError, RuntimeError):  # absent, or a release that does not fit this driver
            return self._address_from_driver(symbol, version)
        return 0 if int(code) else int(address or 0)

    def _address_from_driver(self, symbol: str, version: int) -> int:
        address = ctypes.c_void_p()
        status = ctypes.c_int()
        code = self._lib.cuGetProcAddress_v2(
            ctypes.c_char_p(symbol.encode()),
            ctypes.byref(address),
            ctypes.c_int(version),
            ctypes.c_uint64(0),
            ctypes.byref(status),
        )
        return 0 if code else int(address.value or 0)


@cache
def cuda_driver() -> CudaDriver:
    """The process's driver binding, loaded on first use."""
    return CudaDriver()
