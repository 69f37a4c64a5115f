"""A shared-memory arena pinned in the background, and transfers that work meanwhile.

Registering a large mapping with CUDA takes seconds, and while a range is being registered other threads' CUDA calls
wait. So it is done in small slices on a thread of its own, which rests in between and holds off while transfers are
under way. Until a slot's slices are all pinned, its bytes go through a small pinned bounce buffer, on other threads:
the engine's own waits for host copies only where it asks for what they bring (`BounceTransfer`).
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import numpy as np

from kvkernels.arena import Arena, Bytes, HostArena, Ints
from kvkernels.errors import DeviceError
from kvkernels.slots import Slot, Slots, SlotTable
from kvkernels.streams import Event, HostCopier, Runtime
from kvkernels.transfer import BlockIds, Handle, Request, Transfer, check_request

__all__ = ["BounceTransfer", "Registered", "RegisteredArena", "Registrar", "StreamTransfer", "populate"]

_LONGEST_DEFERRAL_S = 0.1  # an arena of 64 GiB under constant traffic is then pinned in three and a half minutes
_DEFERRAL_S = 0.05
_LOADS, _STORES = (0, 1), (2, 3)
"""The halves of the bounce memory that serve them."""
_MADV_POPULATE_WRITE = 23

_Part = TypeVar("_Part")


class Registrar(Protocol):
    """What pins host memory: `CudaDriver`."""

    def register(self, address: int, nbytes: int) -> None:
        """Pin a range."""
        ...

    def unregister(self, address: int) -> None:
        """Unpin the range that was pinned from this address."""
        ...


@dataclass(frozen=True, slots=True)
class Registered:
    """How far registration has come, and what ended it early, if anything did."""

    pinned_bytes: int
    total_bytes: int
    error: str | None


class RegisteredArena:
    """An `Arena` over a mapping that is registered in slices, from its start, in the background.

    A slice that cannot be registered ends the work there: what lies beyond stays on the bounce path; `ended_early` and
    `progress` tell why. Slices are allocations of their own to CUDA, so copies never cross from one to the next.

    Args:
        buffer: the mapping, page-aligned (see `HostArena`).
        registrar: what pins and unpins.
        enter_thread: makes the device usable from a thread.
        slice_bytes: size of a slice, a multiple of the page size: how long other threads' CUDA calls may have to wait
            (a few milliseconds for 32 MiB).
        rest: the pause after each slice, as a multiple of the time that it took.
        ended_early: told, in another thread, why the rest will not be pinned.
    """

    def __init__(
        self,
        buffer: Any,
        registrar: Registrar,
        *,
        enter_thread: Callable[[], None] = lambda: None,
        slice_bytes: int = 32 << 20,
        rest: float = 1.0,
        ended_early: Callable[[str], None] = lambda why: None,
    ) -> None:
        self._host = HostArena(buffer)
        self._registrar = registrar
        self._enter_thread = enter_thread
        self._slice_bytes = slice_bytes
        self._rest = rest
        self._ended_early = ended_early
        self._pinned_bytes = 0
        self._error: str | None = None
        self._deferred_until = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._register, name="kv-arena-register", daemon=True)
        self._thread.start()

    @property
    def array(self) -> Bytes:
        """The whole arena as one-dimensional bytes."""
        return self._host.array

    @property
    def address(self) -> int:
        """Where its first byte lies in this process."""
        return self._host.address

    @property
    def split_bytes(self) -> int:
        """Size of a registered slice."""
        return self._slice_bytes

    def pinned(self, offsets: Ints, lengths: Ints) -> bool:
        """Whether these ranges lie in slices registered so far."""
        return not len(offsets) or int((offsets + lengths).max()) <= self._pinned_bytes

    def defer(self, seconds: float) -> None:
        """Register no slice for so long, or a tenth of a second, whichever is less: transfers are under way."""
        self._deferred_until = max(self._deferred_until, time.monotonic() + seconds)

    def progress(self) -> Registered:
        """How far it is."""
        return Registered(self._pinned_bytes, len(self.array), self._error)

    def wait(self, timeout_s: float | None = None) -> Registered:
        """Wait for registration to end, at most so long."""
        self._thread.join(timeout_s)
        return self.progress()

    def close(self) -> None:
        """Stop registering and unpin; no transfer may be under way."""
        self._stop.set()
        self._thread.join()
        faults = []
        for start in range(0, self._pinned_bytes, self._slice_bytes):
            try:
                self._registrar.unregister(self.address + start)
            except DeviceError as error:  # the others need not stay pinned for it
                faults.append(error)
        self._pinned_bytes = 0
        if faults:
            raise faults[0]

    def _register(self) -> None:
        try:
            self._enter_thread()
        except (DeviceError, RuntimeError) as error:  # torch's errors are RuntimeErrors
            self._end(f"the device cannot be used: {error}")
            return
        total = len(self.array)
        for start in range(0, total, self._slice_bytes):
            size = min(self._slice_bytes, total - start)
            populate(self.address + start, size)
            self._hold_off()
            if self._stop.is_set():
                return
            began = time.monotonic()
            try:
                self._registrar.register(self.address + start, size)
            except DeviceError as error:
                self._end(f"slice at {start} of {total} bytes: {error}")
                return
            self._pinned_bytes = start + size
            self._stop.wait(self._rest * (time.monotonic() - began))

    def _end(self, why: str) -> None:
        self._error = why
        self._ended_early(why)

    def _hold_off(self) -> None:
        latest = time.monotonic() + _LONGEST_DEFERRAL_S
        while (left := min(self._deferred_until, latest) - time.monotonic()) > 0 and not self._stop.wait(left):
            pass


@runtime_checkable
class StreamTransfer(Transfer, Protocol):
    """A backend on streams: it can start after a given event, and serve a second arena with the same staging."""

    def start(self, request: Request, *, loading: bool, after: Event | None = None, rest_s: float = 0.0) -> Handle:
        """Carry out a checked request, whose slots are pinned, after an event (or the current stream's work so far).

        A rest comes behind it (`kvkernels.transfer.Transfer.store`).
        """
        ...

    def over(self, arena: Arena) -> Self:
        """The same backend, streams and staging over another arena."""
        ...


class BounceTransfer:
    """A backend over an arena of which part may not be pinned yet; see `kvkernels.transfer.Transfer`.

    Requests whose slots are all pinned go straight to the backend. Of others, the slots that are not pinned are copied
    through pinned memory on a worker thread, in order, one for loads and one for stores, so that a hit does not stand
    behind stores; a load then has no layer order, and `wait_layer` and `wait_sources` block the calling thread until
    all of it has arrived.

    Args:
        inner: the backend.
        arena: the arena it was built over.
        runtime: the device.
        bounce_bytes: pinned memory for loads, and as much for stores, at least two slots each; one half is filled while
            the other is copied.
        threads: how many copy between that memory and the arena; half of the processors, at most eight, by default.
    """

    def __init__(
        self,
        inner: StreamTransfer,
        arena: Arena,
        runtime: Runtime,
        *,
        bounce_bytes: int = 96 << 20,
        threads: int | None = None,
    ) -> None:
        self.name = inner.name
        self.layout = inner.layout
        self._inner = inner
        self._arena = arena
        self._runtime = runtime
        self._half = max(1, bounce_bytes // 2 // inner.layout.slot_bytes)
        memory = runtime.pinned((len(_LOADS) + len(_STORES)) * self._half * inner.layout.slot_bytes)
        self._bounce = HostArena(memory, is_pinned=True)
        self._bounced = inner.over(self._bounce)
        self._loader = ThreadPoolExecutor(1, "kv-bounce-load", runtime.enter_thread)
        self._storer = ThreadPoolExecutor(1, "kv-bounce-store", runtime.enter_thread)
        self._copier = HostCopier(threads or min(8, max(1, (os.cpu_count() or 1) // 2)))

    def store(self, block_ids: BlockIds, slots: Slots, *, planes: range | None = None, rest_s: float = 0.0) -> Handle:
        """Copy blocks into slots."""
        return self._run(block_ids, slots, planes, loading=False, rest_s=rest_s)

    def load(self, slots: Slots, block_ids: BlockIds, *, planes: range | None = None) -> Handle:
        """Copy slots into blocks."""
        return self._run(block_ids, slots, planes, loading=True)

    def close(self) -> None:
        """Wait for what is under way."""
        self._loader.shutdown()
        self._storer.shutdown()
        self._copier.close()
        self._inner.close()

    def _run(
        self, block_ids: BlockIds, slots: Slots, planes: range | None, *, loading: bool, rest_s: float = 0.0
    ) -> Handle:
        request = check_request(self.layout, self._arena, block_ids, slots, planes, loading=loading)
        if self._arena.pinned(*request.table.pieces):
            self._arena.defer(_DEFERRAL_S)
            return self._inner.start(request, loading=loading, rest_s=rest_s)
        after = self._runtime.current().record()
        ids = request.block_ids
        slots = slots.tolist() if isinstance(slots, np.ndarray) else slots
        reachable = [self._arena.pinned(*_columns(slot)) for slot in slots]
        direct = [i for i, pinned in enumerate(reachable) if pinned]
        rest = [i for i, pinned in enumerate(reachable) if not pinned]
        started: list[tuple[Handle, list[int]]] = []
        if direct:
            mine = self._part(self._arena, ids[direct], [slots[i] for i in direct], request.planes, loading=loading)
            started.append((self._inner.start(mine, loading=loading, after=after), direct))
        worker, job = (self._loader, self._load) if loading else (self._storer, self._store)
        parts = [(slots[i], ids[i]) for i in rest]
        future = worker.submit(job, parts, request.planes, after)
        return _BounceHandle(started, future, _batches(rest, self._half))

    def _part(self, arena: Arena, ids: Ints, slots: Slots, planes: range, *, loading: bool) -> Request:
        return check_request(self.layout, arena, ids.ravel(), slots, planes, loading=loading)

    def _store(self, parts: list[tuple[Slot, Ints]], planes: range, after: Event) -> list[Handle]:
        """Device to one half of the bounce memory, while the other half is copied on to the arena."""
        handles: list[Handle] = []
        pending: tuple[Handle, list[Slot], int] | None = None
        try:
            for turn, batch in enumerate(_batches(parts, self._half)):
                half = _STORES[turn % 2]
                handles.append(self._start(batch, half, planes, after, loading=False))
                self._land(pending, planes)
                pending = (handles[-1], [slot for slot, _ in batch], half)
            self._land(pending, planes)
        finally:
            _settle(handles)
        return handles

    def _land(self, pending: tuple[Handle, list[Slot], int] | None, planes: range) -> None:
        if pending is not None:
            handle, slots, half = pending
            handle.wait()
            bounce, arena, length = self._ranges(slots, half, planes)
            self._copier.copy(arena, bounce, length)

    def _load(self, parts: list[tuple[Slot, Ints]], planes: range, after: Event) -> list[Handle]:
        """The arena to one half of the bounce memory, while the other half is copied on to the device."""
        handles: list[Handle] = []
        try:
            for turn, batch in enumerate(_batches(parts, self._half)):
                half = _LOADS[turn % 2]
                if turn > 1:
                    handles[turn - 2].wait()
                bounce, arena, length = self._ranges([slot for slot, _ in batch], half, planes)
                self._copier.copy(bounce, arena, length)
                handles.append(self._start(batch, half, planes, after, loading=True))
        finally:
            _settle(handles)  # the halves are free for the next job when this one ends, well or not
        for handle in handles:
            handle.wait()
        return handles

    def _start(
        self, batch: list[tuple[Slot, Ints]], half: int, planes: range, after: Event, *, loading: bool
    ) -> Handle:
        self._arena.defer(_DEFERRAL_S)
        size = self.layout.slot_bytes
        slots: list[Slot] = [[((half * self._half + i) * size, size)] for i in range(len(batch))]
        ids = np.concatenate([ids for _, ids in batch])
        part = self._part(self._bounce, ids, slots, planes, loading=loading)
        return self._bounced.start(part, loading=loading, after=after)

    def _ranges(self, slots: list[Slot], half: int, planes: range) -> tuple[Ints, Ints, Ints]:
        """Bounce addresses, arena addresses and lengths of these planes of these slots."""
        starts, size = self.layout.plane_starts(), self.layout.slot_bytes
        first, length = starts[planes.start], starts[planes.stop] - starts[planes.start]
        table = SlotTable(slots, slot_bytes=size, arena_bytes=len(self._arena.array))
        origin = np.arange(len(slots)) * size + first
        found = table.resolve(origin, np.full(len(slots), length))
        bounce = self._bounce.address + half * self._half * size + origin[found.index] + found.within
        return bounce, self._arena.address + found.offset, found.length


class _BounceHandle:
    """The pinned part's handle, and the worker's job for the rest, which ends with a handle for each batch of it.

    Args:
        direct: the pinned part's handle, if there is one, and its chunks' places in the request.
        job: the worker's job.
        batches: the places of each batch's chunks.
    """

    def __init__(
        self, direct: Sequence[tuple[Handle, list[int]]], job: Future[list[Handle]], batches: list[list[int]]
    ) -> None:
        self._direct = direct
        self._job = job
        self._batches = batches

    def done(self) -> bool:
        if not self._job.done():
            return False
        direct = [_over(handle) for handle, _ in self._direct]
        if not all(direct):
            return False
        return all(handle.done() for handle in self._handles())  # the job ends behind all of its own

    def wait(self) -> None:
        _settle([handle for handle, _ in self._direct])
        for handle in self._handles():
            handle.wait()

    def wait_layer(self, layer: int) -> None:
        for handle in self._handles():
            handle.wait_layer(layer)

    def wait_sources(self) -> None:
        for handle in self._handles():
            handle.wait_sources()

    def rejected(self) -> tuple[int, ...]:
        parts = [*self._direct, *zip(self._job.result(), self._batches, strict=True)]
        return tuple(sorted(places[i] for handle, places in parts for i in handle.rejected()))

    def measured(self) -> None:
        """The rest went through the worker's hands, by no clock of the device."""

    def _handles(self) -> list[Handle]:
        return [*self._job.result(), *(handle for handle, _ in self._direct)]


def _over(handle: Handle) -> bool:
    """Whether it is not under way, failed or not."""
    try:
        return handle.done()
    except Exception:  # raised again where its outcome is asked for
        return True


def _settle(handles: Sequence[Handle]) -> None:
    """Return when none of them is under way, failed or not."""
    for handle in handles:
        with suppress(Exception):  # it is told to whoever asks for the outcome
            handle.wait()


def _columns(slot: Slot) -> tuple[Ints, Ints]:
    pieces = np.array(slot, np.int64).reshape(-1, 2)
    return pieces[:, 0], pieces[:, 1]


def _batches(parts: list[_Part], size: int) -> list[list[_Part]]:
    return [parts[at : at + size] for at in range(0, len(parts), size)]


def populate(address: int, nbytes: int) -> None:
    """Fault pages in for writing ahead of their registration, which would do it while the device's calls wait.

    Nothing happens where the kernel cannot (Linux before 5.14) or the range is no mapping of whole pages.
    """
    _madvise()(address, nbytes, _MADV_POPULATE_WRITE)


@cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int

    def advise(address: int, nbytes: int, advice: int) -> int:
        return int(function(address, nbytes, advice))

    return advise
