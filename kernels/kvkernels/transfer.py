"""The one interface between paged KV caches and chunk slots, and what every backend checks first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kvkernels.arena import Arena, Ints
from kvkernels.errors import RequestError
from kvkernels.layouts import PagedLayout
from kvkernels.slots import Slots, SlotTable

__all__ = ["BlockIds", "DoneHandle", "Handle", "Measured", "Request", "Tensors", "Transfer", "check_request", "listed"]

BlockIds = Sequence[int] | Ints
Tensors = Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """A transfer's times on the device, in seconds.

    Attributes:
        seconds: From its first copy, behind what it was ordered after, to its last.
        stalled: How long the streams that were made to wait for its layers stood still for them.
    """

    seconds: float
    stalled: float


class Handle(Protocol):
    """One transfer under way. The blocks and the slots it names belong to it until it is done.

    What it reads may be overwritten earlier than that, by work that `wait_sources` orders behind the reading.
    """

    def done(self) -> bool:
        """Whether every byte has arrived; never blocks. Raises what the transfer raised."""
        ...

    def wait(self) -> None:
        """Block the calling thread until every byte has arrived. Raises what the transfer raised."""
        ...

    def wait_layer(self, layer: int) -> None:
        """Make the device's current stream (on the CPU: the calling thread) wait for one layer of a load.

        The calling thread itself waits only until that layer's copies have been handed to the device.
        """
        ...

    def wait_sources(self) -> None:
        """Make the current stream wait until everything that this transfer reads has been read.

        For a store these are the blocks: work put on the current stream from here on may overwrite them. The calling
        thread itself waits until the last of the reading has been handed to the device.
        """
        ...

    def rejected(self) -> tuple[int, ...]:
        """The chunks of a store, by their place in the request, that could not be packed; to be asked once it is done.

        Their slots hold nothing of use. Only transfers that pack reject any.
        """
        ...

    def measured(self) -> Measured | None:
        """What the device says it took; to be asked once it is done. None where it says nothing."""
        ...


class Transfer(Protocol):
    """Copies between an engine's blocks and an arena's chunk slots.

    Both methods take `len(slots) * layout.chunk_blocks` block ids, chunk after chunk, in any order, and `planes`, the
    contiguous planes of the layout to copy (all by default; `layout.planes_of_layer`). On a GPU both are
    ordered after the work that is already in the current stream, and return when they are written down, before the
    device is told of them (a millisecond or two for 32,000 tokens by Triton's kernels; a store in single rows leaves
    the rest to a thread after one).
    """

    @property
    def name(self) -> str:
        """The backend's name, as in reports."""
        ...

    @property
    def layout(self) -> PagedLayout:
        """What it was built for."""
        ...

    def store(self, block_ids: BlockIds, slots: Slots, *, planes: range | None = None, rest_s: float = 0.0) -> Handle:
        """Copy blocks into slots. Raises RequestError before anything is copied.

        `rest_s` is how many seconds the copies stay behind the work that they come after, so that what follows it at
        once, a step's tokens on their way to the host, need not queue with them. Whoever waits for the sources ends
        the rest; a transfer that is finished in its call, or goes through a bounce, takes none.
        """
        ...

    def load(self, slots: Slots, block_ids: BlockIds, *, planes: range | None = None) -> Handle:
        """Copy slots into blocks, but for those whose id is -1, which a chunk is loaded without.

        Raises RequestError before anything is copied; repeated ids are refused.
        """
        ...

    def close(self) -> None:
        """Wait for what is under way. Call it before letting go of a transfer: staging memory goes with it."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """A checked transfer: block ids `(chunks, chunk_blocks)` int64, the slots' table, the planes to copy.

    Blocks of a load whose id is -1 are left out.
    """

    block_ids: Ints
    table: SlotTable
    planes: range

    @property
    def chunks(self) -> int:
        """Chunks in this request."""
        return len(self.block_ids)


class DoneHandle:
    """The handle of a transfer that was finished before its call returned."""

    def done(self) -> bool:
        """Always."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""

    def wait_layer(self, layer: int) -> None:
        """Nothing to wait for."""

    def wait_sources(self) -> None:
        """Nothing to wait for."""

    def rejected(self) -> tuple[int, ...]:
        """None."""
        return ()

    def measured(self) -> None:
        """Nobody looked at a clock."""


def check_request(
    layout: PagedLayout,
    arena: Arena,
    block_ids: BlockIds,
    slots: Slots,
    planes: range | None,
    *,
    loading: bool,
) -> Request:
    """Refuse what would corrupt a cache or an arena, before anything is copied.

    Raises:
        RequestError: a partial chunk, a block id out of range, a block id twice in a load, slots that are too small,
            outside the arena or (in a store) overlapping, or planes that the layout does not have.
    """
    ids = np.asarray(block_ids, dtype=np.int64)
    if ids.ndim != 1 or len(ids) != len(slots) * layout.chunk_blocks:
        raise RequestError(
            f"{ids.size} block ids for {len(slots)} slots of {layout.chunk_blocks} blocks: only whole chunks are copied"
        )
    if ids.size and (ids.min() < (-1 if loading else 0) or ids.max() >= layout.num_blocks):
        raise RequestError(f"block ids reach from {ids.min()} to {ids.max()} in a cache of {layout.num_blocks} blocks")
    if loading:
        ordered = np.sort(ids[ids >= 0])
        if bool((ordered[1:] == ordered[:-1]).any()):
            raise RequestError("a block id appears twice in one load")
    chosen = range(len(layout.planes)) if planes is None else planes
    if chosen.step != 1 or chosen.start < 0 or chosen.stop > len(layout.planes) or chosen.start > chosen.stop:
        raise RequestError(f"{chosen} are not contiguous planes of the layout's {len(layout.planes)}")
    table = SlotTable(slots, slot_bytes=layout.slot_bytes, arena_bytes=len(arena.array), split_bytes=arena.split_bytes)
    if not loading and table.overlapping():
        raise RequestError("two slot pieces of one store overlap in the arena")
    return Request(ids.reshape(len(slots), layout.chunk_blocks), table, chosen)


def listed(tensors: Tensors) -> list[Any]:
    """The tensors of a cache in layer order, as `describe` takes them."""
    return list(tensors.values()) if isinstance(tensors, Mapping) else list(tensors)
