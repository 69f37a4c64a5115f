"""Copies between the engine's blocks and a shard of chunks in the arena."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvcore.live.arena import Arena
from kvcore.live.wire import Registered
from kvcore.vllm.transfers import TransferFactory
from kvkernels import Handle, PagedLayout, describe
from kvkernels.packing import packable, packed_layout

Tensors: TypeAlias = Mapping[str, Any]
Packing: TypeAlias = Literal["auto", "lossless", "none"]


class Cache:
    """The engine's KV cache: its tensors by layer, and how a block lies in them and in the arena.

    Args:
        tensors: Each layer's.
        num_blocks: Blocks in each.
        block_tokens: Tokens in a block.
        order: The engine's name for what the tensors' strides do not tell.
        packing: Whether blocks are packed in the arena (`kvkernels.packing`): `lossless`, `none`, or `auto`, which is
            `lossless` where it can be.

    Raises:
        kvkernels.LayoutError: It cannot be copied as whole blocks, or not be packed.
    """

    def __init__(
        self, tensors: Tensors, *, num_blocks: int, block_tokens: int, order: str, packing: Packing = "none"
    ) -> None:
        self.tensors = _distinct(tensors)
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._order = order
        self.packed = packing == "lossless" or (packing == "auto" and packable(self.layout(block_tokens)))
        self.layer_of = _layers(tensors, self.tensors)
        self.block = self.stored(block_tokens)

    def stored(self, chunk_tokens: int) -> PagedLayout:
        """Return the layout with chunks of `chunk_tokens` as they lie in the arena."""
        layout = self.layout(chunk_tokens)
        return packed_layout(layout) if self.packed else layout

    def layout(self, chunk_tokens: int) -> PagedLayout:
        """Return the layout with chunks of `chunk_tokens` as they lie in the engine's blocks."""
        return describe(
            self.tensors,
            num_blocks=self.num_blocks,
            block_tokens=self.block_tokens,
            chunk_tokens=chunk_tokens,
            order=self._order,
        )


class Mover:
    """Copies of one registration: an arena, a chunk size, a shard.

    Args:
        cache: The engine's KV cache.
        registered: What the server said.
        shard: Which shard of every chunk is this worker's.
        factory: Makes what copies.

    Raises:
        kvcore.live.arena.ArenaError: The arena cannot be mapped.
        kvkernels.LayoutError: The chunk size is no multiple of the block.
        ValueError: The server's shard is of another size than this cache's chunk.
    """

    def __init__(self, cache: Cache, registered: Registered, shard: int, factory: TransferFactory) -> None:
        layout = cache.stored(registered.chunk_tokens)
        if layout.slot_bytes != registered.shard_bytes:
            raise ValueError(f"a chunk has {layout.slot_bytes} bytes here and {registered.shard_bytes} at the server")
        self.registered = registered
        self.layout = layout
        self.arena = Arena.attach(Path(registered.arena_path))
        self._start = shard * registered.shard_bytes
        try:
            self._transfers = factory(cache, registered.chunk_tokens, self.arena.data)
        except BaseException:
            self.arena.close()
            raise

    def serves(self, registered: Registered) -> bool:
        """Whether this can go on under another registration: with the same arena, of the same server or the next one.

        A server that takes over what another left goes on with its file, which is mapped and pinned here already.
        """
        if registered is self.registered:
            return True
        if not self.alike(registered) or registered.arena_path != self.registered.arena_path:
            return False
        if registered.epoch != self.registered.epoch and not self.arena.is_current:
            return False
        self.registered = registered
        return True

    def alike(self, registered: Registered) -> bool:
        """Whether chunks lie in that registration's pages as they do in this one's."""
        return all(
            getattr(registered, name) == getattr(self.registered, name)
            for name in ("page_bytes", "chunk_tokens", "shard_bytes")
        )

    def store(self, pages: NDArray[np.uint32], blocks: NDArray[np.int64], *, rest_s: float = 0.0) -> Handle:
        """Copy whole chunks to the arena; pages (chunks, pages a chunk), blocks (chunks, blocks a chunk).

        `rest_s`: see `kvkernels.Transfer`.
        """
        return self._transfers.transfer.store(blocks.ravel(), self._slots(pages), rest_s=rest_s)

    def load(self, pages: NDArray[np.uint32], blocks: NDArray[np.int64]) -> Handle:
        """Copy chunks from the arena; blocks that are -1 are left as they are, since they are others' and live."""
        return self._transfers.transfer.load(self._slots(pages), blocks.ravel())

    def block_bytes(self, blocks: NDArray[np.int64]) -> int:
        """Return the bytes that copying these blocks takes, -1 left out."""
        return int((blocks >= 0).sum()) * self.layout.block_bytes

    def close(self) -> None:
        """End what is under way."""
        self._transfers.close()

    def release(self) -> None:
        """Let go of the arena, which stays; after `close`. That takes seconds where it is large and pinned."""
        try:
            self._transfers.unpin()
        finally:
            self.arena.close()

    def _slots(self, pages: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return this shard's part of every chunk as `kvkernels.Slots`, (chunks, pieces, 2)."""
        size = self.registered.page_bytes
        first, stop = self._start // size, -(-(self._start + self.registered.shard_bytes) // size)
        begin = np.maximum(np.arange(first, stop) * size, self._start)
        end = np.minimum(np.arange(first + 1, stop + 1) * size, self._start + self.registered.shard_bytes)
        slots = np.empty((len(pages), stop - first, 2), np.int64)
        slots[:, :, 0] = pages[:, first:stop].astype(np.int64) * size + begin % size
        slots[:, :, 1] = end - begin
        return slots


def _distinct(tensors: Tensors) -> dict[str, Any]:
    """Leave out layers that share another's cache."""
    found: dict[int, str] = {}
    for name, tensor in tensors.items():
        found.setdefault(int(tensor.data_ptr()), name)
    return {name: tensors[name] for name in found.values()}


def _layers(tensors: Tensors, distinct: Mapping[str, Any]) -> dict[str, int]:
    """Return each layer's index among the distinct ones."""
    index = {int(tensor.data_ptr()): i for i, tensor in enumerate(distinct.values())}
    return {name: index[int(tensor.data_ptr())] for name, tensor in tensors.items()}
