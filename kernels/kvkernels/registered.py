"""A shared-memory arena pinned in the background, and transfers that work meanwhile.

Registering a large mapping with CUDA takes seconds. It is done slice by slice on a thread of its own; until a slot's
slices are all pinned, its bytes go through a small pinned bounce buffer, on another thread so that the engine's own
thread never waits for host copies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from kvkernels.arena import Arena, Bytes, HostArena, Ints
from kvkernels.errors import DeviceError
from kvkernels.slots import Slot, SlotTable
from kvkernels.streams import Event, Runtime, move_bytes
from kvkernels.transfer import BlockIds, Handle, Transfer, check_request

__all__ = ["BounceTransfer", "Registered", "RegisteredArena", "Registrar", "StreamTransfer"]


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

    A slice that cannot be registered ends the work there: what lies beyond stays on the bounce path and `progress`
    tells why. Slices are allocations of their own to CUDA, so copies never cross from one to the next.

    Args:
        buffer: the mapping, page-aligned (see `HostArena`).
        registrar: what pins and unpins.
        enter_thread: makes the device usable from a thread.
        slice_bytes: size of a slice, a multiple of the page size.
    """

    def __init__(
        self,
        buffer: Any,
        registrar: Registrar,
        *,
        enter_thread: Callable[[], None] = lambda: None,
        slice_bytes: int = 256 << 20,
    ) -> None:
        self._host = HostArena(buffer)
        self._registrar = registrar
        self._enter_thread = enter_thread
        self._slice_bytes = slice_bytes
        self._pinned_bytes = 0
        self._error: str | None = None
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
        for start in range(0, self._pinned_bytes, self._slice_bytes):
            self._registrar.unregister(self.address + start)
        self._pinned_bytes = 0

    def _register(self) -> None:
        self._enter_thread()
        total = len(self.array)
        for start in range(0, total, self._slice_bytes):
            if self._stop.is_set():
                return
            size = min(self._slice_bytes, total - start)
            try:
                self._registrar.register(self.address + start, size)
            except DeviceError as error:
                self._error = f"slice at {start} of {total} bytes: {error}"
                return
            self._pinned_bytes = start + size


@runtime_checkable
class StreamTransfer(Transfer, Protocol):
    """A backend on streams: it can start after a given event, and serve a second arena with the same staging."""

    def store(
        self, block_ids: BlockIds, slots: Sequence[Slot], *, planes: range | None = None, after: Event | None = None
    ) -> Handle:
        """As `Transfer.store`."""
        ...

    def load(
        self, slots: Sequence[Slot], block_ids: BlockIds, *, planes: range | None = None, after: Event | None = None
    ) -> Handle:
        """As `Transfer.load`."""
        ...

    def over(self, arena: Arena) -> Self:
        """The same backend, streams and staging over another arena."""
        ...


class BounceTransfer:
    """A backend over an arena of which part may not be pinned yet; see `kvkernels.transfer.Transfer`.

    Requests whose slots are all pinned go straight to the backend. Of others, the slots that are not pinned are copied
    through `bounce_slots` pinned slots on a worker thread, in order; a load then has no layer order, and `wait_layer`
    blocks the calling thread until all of it has arrived.

    Args:
        inner: the backend.
        arena: the arena it was built over.
        runtime: the device.
        bounce_slots: pinned slots, at least two; half are filled while the other half is copied.
    """

    def __init__(self, inner: StreamTransfer, arena: Arena, runtime: Runtime, *, bounce_slots: int = 2) -> None:
        self.name = inner.name
        self.layout = inner.layout
        self._inner = inner
        self._arena = arena
        self._runtime = runtime
        self._half = max(1, bounce_slots // 2)
        memory = runtime.pinned(2 * self._half * inner.layout.slot_bytes)
        self._bounce = HostArena(memory, is_pinned=True)
        self._bounced = inner.over(self._bounce)
        self._worker = ThreadPoolExecutor(1, "kv-bounce", runtime.enter_thread)

    def store(self, block_ids: BlockIds, slots: Sequence[Slot], *, planes: range | None = None) -> Handle:
        """Copy blocks into slots."""
        return self._run(block_ids, slots, planes, loading=False)

    def load(self, slots: Sequence[Slot], block_ids: BlockIds, *, planes: range | None = None) -> Handle:
        """Copy slots into blocks."""
        return self._run(block_ids, slots, planes, loading=True)

    def close(self) -> None:
        """Wait for what is under way."""
        self._worker.shutdown()
        self._inner.close()

    def _run(self, block_ids: BlockIds, slots: Sequence[Slot], planes: range | None, *, loading: bool) -> Handle:
        request = check_request(self.layout, self._arena, block_ids, slots, planes, loading=loading)
        after = self._runtime.current().record()
        reachable = [self._arena.pinned(*_columns(slot)) for slot in slots]
        direct = [i for i, pinned in enumerate(reachable) if pinned]
        rest = [i for i, pinned in enumerate(reachable) if not pinned]
        handles: list[Handle] = []
        ids = request.block_ids
        if direct or not slots:
            mine = [slots[i] for i in direct]
            if loading:
                handles.append(self._inner.load(mine, ids[direct].ravel(), planes=planes, after=after))
            else:
                handles.append(self._inner.store(ids[direct].ravel(), mine, planes=planes, after=after))
        if not rest:
            return handles[0]
        job = self._load if loading else self._store
        parts = [(slots[i], ids[i]) for i in rest]
        return _BounceHandle(handles, self._worker.submit(job, parts, request.planes, after))

    def _store(self, parts: list[tuple[Slot, Ints]], planes: range, after: Event) -> list[Handle]:
        """Device to one half of the bounce slots, while the other half is copied on to the arena."""
        pending: tuple[Handle, list[Slot], int] | None = None
        for turn, batch in enumerate(_batches(parts, self._half)):
            half = turn % 2
            ids = np.concatenate([ids for _, ids in batch])
            handle = self._bounced.store(ids, self._bounce_slots(half, len(batch)), planes=planes, after=after)
            self._land(pending, planes)
            pending = (handle, [slot for slot, _ in batch], half)
        self._land(pending, planes)
        return []

    def _land(self, pending: tuple[Handle, list[Slot], int] | None, planes: range) -> None:
        if pending is not None:
            handle, slots, half = pending
            handle.wait()
            bounce, arena, length = self._ranges(slots, half, planes)
            move_bytes(arena, bounce, length)

    def _load(self, parts: list[tuple[Slot, Ints]], planes: range, after: Event) -> list[Handle]:
        """The arena to one half of the bounce slots, while the other half is copied on to the device."""
        handles: list[Handle] = []
        for turn, batch in enumerate(_batches(parts, self._half)):
            half = turn % 2
            if turn > 1:
                handles[turn - 2].wait()
            bounce, arena, length = self._ranges([slot for slot, _ in batch], half, planes)
            move_bytes(bounce, arena, length)
            ids = np.concatenate([ids for _, ids in batch])
            slots = self._bounce_slots(half, len(batch))
            handles.append(self._bounced.load(slots, ids, planes=planes, after=after))
        for handle in handles[-2:]:
            handle.wait()  # the halves are free for the next job when this one ends
        return handles

    def _bounce_slots(self, half: int, count: int) -> list[Slot]:
        size = self.layout.slot_bytes
        return [[((half * self._half + i) * size, size)] for i in range(count)]

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
    """The pinned part's handle, and the worker's job for the rest."""

    def __init__(self, direct: Sequence[Handle], job: Future[list[Handle]]) -> None:
        self._direct = list(direct)
        self._job = job

    def done(self) -> bool:
        return self._job.done() and all(handle.done() for handle in [*self._direct, *self._job.result()])

    def wait(self) -> None:
        for handle in [*self._job.result(), *self._direct]:
            handle.wait()

    def wait_layer(self, layer: int) -> None:
        for handle in [*self._job.result(), *self._direct]:
            handle.wait_layer(layer)


def _columns(slot: Slot) -> tuple[Ints, Ints]:
    pieces = np.array(slot, np.int64).reshape(-1, 2)
    return pieces[:, 0], pieces[:, 1]


def _batches(parts: list[tuple[Slot, Ints]], size: int) -> list[list[tuple[Slot, Ints]]]:
    return [parts[at : at + size] for at in range(0, len(parts), size)]
