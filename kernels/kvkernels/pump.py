"""A thread that puts prepared work on streams without the interpreter, so that the engine's thread is not held up.

A load of 8,192 tokens is some three hundred driver calls, 3 ms of them on an H100's host and more where its processors
are shared. Made by the engine's own thread they delay its step by as much; made by another one in Python, they fight
with it for the interpreter. So a transfer only writes down what is to be called (a row of integers each), and a
compiled loop calls it, in a thread of its own that never holds the interpreter's lock.

Rows are carried out in the order in which they were written, so an event can be waited for, by a later row, as soon as
the row that records it is written. Everybody else must see to it that this row has been carried out: to CUDA an event
that was never recorded is one that was reached.

Source: CUDA driver API reference, for the functions in `cuda_driver.py`; POSIX, `sem_init`, for how the thread sleeps.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from kvkernels.arena import Ints
from kvkernels.cuda_driver import NOT_READY, CudaDriver
from kvkernels.errors import DeviceError

__all__ = ["BATCH", "COPY", "LAUNCH", "NOTHING", "ORDER", "RECORD", "REST", "WAIT", "Program", "Pump"]

_ROWS = 8192
_PARAMETERS = 32
"""The most parameters of a kernel."""
_POSTS = 1024
_FAULTS = 64
_POLL_S, _LONGEST_POLL_S = 20e-6, 1e-3
_REST_US = 200
"""How often a rest looks whether it is over."""
_SEMAPHORE_BYTES = 64  # sem_t is 32 on 64-bit Linux
NOTHING, RECORD, ORDER, WAIT, BATCH, COPY, LAUNCH, REST = range(8)
"""What a row calls."""
_CALLS = (
    "nothing",
    "cuEventRecord",
    "cuStreamWaitEvent",
    "cuEventSynchronize",
    "cuMemcpyBatchAsync",
    "cuMemcpyAsync",
    "cuLaunchKernel",
)
"""By kind, of those that can fail: a rest goes on whatever it is answered."""


class Program:
    """What one transfer has written down so far; where one of its calls fails, its later copies and kernels are left.

    Its events are recorded all the same, so that nobody waits for ever, and what reuses its memory comes behind.
    """

    def __init__(self, pump: Pump, number: int) -> None:
        self.pump = pump
        self.number = number

    def record(self, event: int, stream: int, kept: Any) -> int:
        """Record an event; return the row."""
        return self.pump.write(RECORD, (event, stream), self.number, kept)

    def order(self, stream: int, event: int, kept: Any) -> None:
        """Make a stream wait for an event."""
        self.pump.write(ORDER, (stream, event), self.number, kept)

    def wait(self, event: int, kept: Any) -> None:
        """Go on when an event is reached."""
        self.pump.write(WAIT, (event,), self.number, kept)

    def rest(self, event: int, microseconds: int, kept: Any) -> None:
        """Go on so long after an event is reached, or as soon as somebody cannot go on before what comes behind."""
        self.pump.write(REST, (event, microseconds), self.number, kept)

    def copy_batch(self, ranges: Ints, stream: int) -> None:
        """Copy ranges, (3, count) targets, sources and lengths, by one call."""
        count = ranges.shape[1]
        first = int(ranges.ctypes.data)
        arguments = (first, first + 8 * count, first + 16 * count, count, stream)
        self.pump.write(BATCH, arguments, self.number, ranges)

    def copy_each(self, ranges: Ints, stream: int) -> None:
        """Copy ranges by a call each."""
        for target, source, length in ranges.T.tolist():
            self.pump.write(COPY, (target, source, length, stream), self.number)

    def launch(self, function: int, blocks: int, threads: int, shared: int, stream: int, values: Sequence[int]) -> None:
        """Launch a kernel whose parameters are pointers and integers, 32 at most."""
        self.pump.launch((function, blocks, threads, shared, stream), values, self.number)

    def extend(self, rows: Ints, values: Ints, kept: Any) -> None:
        """Write many rows, whose programs are left open, and so are the addresses of kernels' parameters: `values`."""
        rows[:, 1] = self.number
        self.pump.extend(rows, values, kept)

    def fault(self) -> DeviceError | None:
        """What failed, of what has been carried out."""
        return self.pump.fault_of(self.number)


class Pump:
    """Carries rows out, in order. One thread writes at a time; any may ask what has been carried out.

    Args:
        driver: the driver's calls.
        name: the thread's name.
        enter_thread: called in it before anything else.
    """

    def __init__(self, driver: CudaDriver, name: str, enter_thread: Callable[[], None]) -> None:
        self.name = name
        self._driver = driver
        self._enter_thread = enter_thread
        self._rows = np.zeros((_ROWS, 8), np.int64)
        self._values = np.zeros((_ROWS, _PARAMETERS), np.int64)
        """Where the parameters of a row's kernel lie, one after another in eight bytes each."""
        first = int(self._values.ctypes.data)
        self._addresses = first + 8 * np.arange(_ROWS * _PARAMETERS, dtype=np.int64).reshape(_ROWS, -1)
        self._addresses_at = int(self._addresses.ctypes.data)
        self._posts = np.zeros(_POSTS, np.int64)
        """Rows of every post."""
        self._said = np.zeros(4, np.int64)
        """Rows carried out, faults, and posts; and a row that somebody is held up by, for which there is no rest."""
        self._faults = np.zeros((_FAULTS, 3), np.int64)
        """The last ones: program, kind of row, and the driver's code."""
        self._semaphore = _Semaphore()
        self._turn = 0
        self._pending: list[tuple[int, ...]] = []
        self._kept: deque[tuple[int, Any]] = deque()
        self._written = self._posted = self._programs = 0
        self._thread: threading.Thread | None = None
        self._broken: Exception | None = None

    # Whoever writes

    def program(self) -> Program:
        """Begin another."""
        self._programs += 1
        return Program(self, self._programs)

    @property
    def pending(self) -> int:
        """Rows that are written and not handed over."""
        return len(self._pending)

    @property
    def written(self) -> int:
        """Rows so far."""
        return self._written

    def write(self, kind: int, arguments: tuple[int, ...], program: int, kept: Any = None) -> int:
        """Write a row, hold `kept` until it has been carried out, and return its number."""
        if self._written - self._carried_out() >= _ROWS:
            self.post()
            self.until(self._written - _ROWS // 2)
        self._pending.append((kind, program, *arguments, *_FILL[len(arguments)]))
        self._written += 1
        if kept is not None:
            self._kept.append((self._written, kept))
        return self._written

    def launch(self, what: tuple[int, ...], values: Sequence[int], program: int) -> None:
        """Write a launch; `values` are the kernel's parameters."""
        row = self._written % _ROWS
        self.write(LAUNCH, (*what, self._addresses_at + 8 * _PARAMETERS * row), program)
        self._values[row, : len(values)] = values

    def extend(self, rows: Ints, values: Ints, kept: Any) -> None:
        """Write rows, and the parameters of those that launch, and hand everything over."""
        self.post()
        launches = np.flatnonzero(rows[:, 0] == LAUNCH)
        for start in range(0, len(rows), _ROWS // 2):
            part = rows[start : start + _ROWS // 2]
            mine = slice(*launches.searchsorted((start, start + len(part))))
            self.until(self._written + len(part) - _ROWS)
            places = (self._written - start + launches[mine]) % _ROWS
            self._values[places, : values.shape[1]] = values[mine]
            part[launches[mine] - start, 7] = self._addresses_at + 8 * _PARAMETERS * places
            self._written += len(part)
            self._kept.append((self._written, kept))
            self._hand_over(part)

    def post(self) -> None:
        """Hand what is written over."""
        if self._pending:
            rows = np.array(self._pending, np.int64)
            self._pending.clear()
            self._hand_over(rows)

    def _hand_over(self, rows: Ints) -> None:
        if self._thread is None and self._broken is None:
            self._start()
        at = self._posted % _ROWS
        split = min(len(rows), _ROWS - at)
        self._rows[at : at + split] = rows[:split]
        self._rows[: len(rows) - split] = rows[split:]
        self._posted += len(rows)
        self._wake(len(rows))
        done = self._carried_out()
        while self._kept and self._kept[0][0] <= done:
            self._kept.popleft()

    def catch_up(self) -> None:
        """Return when everything that is written has been carried out."""
        self.post()
        self.until(self._written)

    def close(self) -> None:
        """Return when everything has been carried out and the thread has ended; another starts with the next row."""
        self.post()
        thread, self._thread = self._thread, None
        if thread is not None:
            self._wake(0)
            thread.join()
            self._kept.clear()

    # Anybody

    def carried_out(self, row: int) -> bool:
        """Whether a row has been."""
        return self._carried_out() >= row

    def until(self, row: int) -> None:
        """Return when it has been; the thread takes microseconds a row, and does not rest meanwhile."""
        while self._carried_out() < row:
            self._said[3] = max(self._said[3], row)  # at every turn: two threads may overwrite each other's
            time.sleep(_POLL_S)

    def wait_for(self, row: int) -> None:
        """The same for those whom nothing waits for: they let it rest."""
        poll_s = _POLL_S
        while self._carried_out() < row:
            time.sleep(poll_s)
            poll_s = min(1.5 * poll_s, _LONGEST_POLL_S)

    def fault_of(self, program: int) -> DeviceError | None:
        """What failed first of a program; it may have, too, where it is older than all faults that are still known."""
        if self._broken is not None:
            return DeviceError(f"the thread that enqueues cannot use the device: {self._broken}")
        if not self._said[1]:
            return None
        faults = self._faults.tolist()
        for number, kind, code in faults:
            if number == program:
                return self._driver.error(_CALLS[kind], code)
        # Full is enough: the next fault is written over the oldest before it is counted.
        if self._said[1] >= len(faults) and program < min(number for number, _, _ in faults):
            return DeviceError("what failed of this transfer, if anything did, is no longer known: too much did since")
        return None

    # The thread

    def _carried_out(self) -> int:
        return self._written if self._broken is not None else int(self._said[0])

    def _wake(self, rows: int) -> None:
        """Say that so many more rows are there; none: that the thread is to end."""
        while self._turn - int(self._said[2]) >= _POSTS and self._broken is None:
            time.sleep(_POLL_S)
        self._posts[self._turn % _POSTS] = rows
        self._turn += 1
        self._semaphore.post()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the process may have no more threads
            self._broken = error
        else:
            self._thread = thread

    def _run(self) -> None:
        try:
            self._enter_thread()
            carry_out = _compiled(self._driver)
        except Exception as error:
            self._broken = error
            return
        carry_out(self._semaphore.address, self._posts, self._rows, self._said, self._faults)


class _Semaphore:
    """POSIX's, which a thread sleeps on without the interpreter."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(_SEMAPHORE_BYTES)
        self.address = ctypes.addressof(self._memory)
        library = ctypes.CDLL(None)
        self._post = library.sem_post
        self._post.argtypes = [ctypes.c_void_p]
        if library.sem_init(ctypes.c_void_p(self.address), 0, 0):
            raise OSError("sem_init failed")

    def post(self) -> None:
        """Wake who sleeps."""
        self._post(self.address)


_FILL = [(0,) * (6 - length) for length in range(7)]


@cache
def _compiled(driver: CudaDriver) -> Callable[..., None]:
    """The loop, for this process's addresses of the driver's functions: compiled in half a second."""
    import numba  # noqa: PLC0415 - takes a while, and only who has a device needs it

    call = numba.njit(nogil=True)(_call(driver))
    rest = numba.njit(nogil=True)(_rest(driver))
    sleep = _function(ctypes.cast(ctypes.CDLL(None).sem_wait, ctypes.c_void_p).value or 0, _WORD)

    def carry_out(semaphore, posts, rows, said, faults):  # type: ignore[no-untyped-def]
        bad = -1
        while True:
            while sleep(semaphore) != 0:  # a signal came
                pass
            count = posts[said[2] % posts.size]
            said[2] += 1
            if count == 0:
                return
            for _ in range(count):
                row = rows[said[0] % rows.shape[0]]
                kind, program = row[0], row[1]
                if kind == REST:
                    rest(row[2], row[3], said)
                elif program != bad or kind < BATCH:
                    code = call(kind, row[2], row[3], row[4], row[5], row[6], row[7])
                    if code != 0 and program != bad:
                        bad = program
                        fault = faults[said[1] % faults.shape[0]]
                        fault[0], fault[1], fault[2] = program, kind, code
                        said[1] += 1
                said[0] += 1

    return numba.njit(nogil=True)(carry_out)  # type: ignore[no-any-return]


def _call(driver: CudaDriver) -> Callable[..., int]:
    """What a row stands for, to be compiled."""
    record = _function(driver.address("cuEventRecord"), _WORD, _WORD)
    order = _function(driver.address("cuStreamWaitEvent"), _WORD, _WORD, _NUMBER)
    wait = _function(driver.address("cuEventSynchronize"), _WORD)
    copy = _function(driver.address("cuMemcpyAsync"), _WORD, _WORD, _WORD, _WORD)
    launch = _function(driver.address("cuLaunchKernel"), _WORD, *[_NUMBER] * 7, _WORD, _WORD, _WORD)
    at, constants = (driver.batch.address, driver.batch.constants) if driver.batch else (0, (0, 0, 1))
    batch = _function(at or driver.address("cuMemcpyAsync"), *[_WORD] * 9)
    attributes, starts, one, *failed = constants
    # One signature for both: without an index of failures the stream comes a place earlier, and a zero behind it.
    has_index, index = bool(failed), sum(failed)

    def call(kind, a, b, c, d, e, f):  # type: ignore[no-untyped-def]
        if kind == RECORD:
            return record(a, b)
        if kind == ORDER:
            return order(a, b, 0)
        if kind == WAIT:
            return wait(a)
        if kind == BATCH:
            return batch(a, b, c, d, attributes, starts, one, index if has_index else e, e if has_index else 0)
        if kind == COPY:
            return copy(a, b, c, d)
        return launch(a, b, 1, 1, c, 1, 1, d, e, f, 0) if kind == LAUNCH else 0

    return call


def _rest(driver: CudaDriver) -> Callable[..., None]:
    """What a rest is, to be compiled."""
    query = _function(driver.address("cuEventQuery"), _WORD)
    sleep = _function(ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p).value or 0, _NUMBER)

    def rest(event, microseconds, said):  # type: ignore[no-untyped-def]
        while microseconds > 0 and said[3] <= said[0]:
            if query(event) != NOT_READY:
                microseconds -= _REST_US
            sleep(_REST_US)

    return rest


def _function(address: int, *kinds: Any) -> Any:
    return ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(address)


_WORD, _NUMBER = ctypes.c_size_t, ctypes.c_uint
