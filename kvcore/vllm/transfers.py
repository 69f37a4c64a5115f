"""What copies between one cache and one arena: the fastest backend for whole chunks, another for single blocks."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from kvkernels import HostArena, PagedLayout, Transfer

_LOG = logging.getLogger("kvcore.vllm")
_CPU_SCRATCH_BYTES = 32 << 20
_FEW_BYTES = 1 << 20
_PACKED_STAGING_BYTES = 216 << 20
_SINGLE_STAGING_BYTES = 24 << 20
"""With it staging stays at 240 MiB, as without packing."""


class Transfers(Protocol):
    """The two backends, and what pins the arena for them."""

    whole: Transfer
    single: Transfer

    def close(self) -> None:
        """Wait for what is under way; the arena is not pinned afterwards."""


class Paged(Protocol):
    """What is copied: the engine's KV cache (`kvcore.vllm.mover.Cache`)."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """By layer."""
        ...

    @property
    def block_tokens(self) -> int:
        """Tokens in a block."""
        ...

    @property
    def packed(self) -> bool:
        """Whether blocks are packed in the arena."""
        ...

    def layout(self, chunk_tokens: int) -> PagedLayout:
        """Return the layout with chunks of `chunk_tokens`."""
        ...


TransferFactory: TypeAlias = Callable[[Paged, int, Any], Transfers]
"""Takes the cache, the tokens of a chunk, and the arena's bytes."""


class HostTransfers:
    """On the CPU backend everything is in reach; the better of torch's indexing and threads of memmove is taken."""

    def __init__(self, cache: Paged, chunk_tokens: int, data: Any) -> None:
        from kvkernels.choose import best_backend  # noqa: PLC0415 - the backends import torch
        from kvkernels.reference import ReferenceTransfer  # noqa: PLC0415

        arena = HostArena(data)
        chunk, block = cache.layout(chunk_tokens), cache.layout(cache.block_tokens)
        choice = best_backend(chunk, cache.tensors, arena, scratch_bytes=_CPU_SCRATCH_BYTES, packed=cache.packed)
        self.whole = choice.transfer
        self.single: Transfer = (
            best_backend(block, cache.tensors, arena, scratch_bytes=_CPU_SCRATCH_BYTES, packed=True).transfer
            if cache.packed
            else ReferenceTransfer(block, cache.tensors, arena)
        )
        _report(choice.profile)

    def close(self) -> None:
        """Let go of both."""
        self.whole.close()
        self.single.close()


class CudaTransfers:
    """On a GPU the arena is pinned in the background; what is not pinned yet goes through a pinned buffer."""

    def __init__(self, cache: Paged, chunk_tokens: int, data: Any) -> None:
        from kvkernels.choose import best_backend  # noqa: PLC0415 - the backends import torch, Triton and CUDA
        from kvkernels.cuda_driver import cuda_driver  # noqa: PLC0415
        from kvkernels.cuda_streams import CudaRuntime  # noqa: PLC0415
        from kvkernels.registered import RegisteredArena  # noqa: PLC0415
        from kvkernels.transfer import listed  # noqa: PLC0415

        runtime = CudaRuntime(listed(cache.tensors)[0].device)
        self._arena = RegisteredArena(data, cuda_driver(), enter_thread=runtime.enter_thread)
        chunk, block, tensors = cache.layout(chunk_tokens), cache.layout(cache.block_tokens), cache.tensors
        if cache.packed:
            size, few = _PACKED_STAGING_BYTES, _SINGLE_STAGING_BYTES
            choice = best_backend(chunk, tensors, self._arena, packed=True, staging_bytes=size)
            single = best_backend(block, tensors, self._arena, scratch_bytes=_FEW_BYTES, packed=True, staging_bytes=few)
        else:
            choice = best_backend(chunk, tensors, self._arena)
            # Part of a chunk is few rows of every plane: copies of their own, without a second staging buffer.
            single = best_backend(block, tensors, self._arena, only=("cuda_batch",), scratch_bytes=_FEW_BYTES)
        self.whole, self.single = choice.transfer, single.transfer
        _report(choice.profile)

    def close(self) -> None:
        """Let go of both, then unpin."""
        self.whole.close()
        self.single.close()
        self._arena.close()


def _report(profile: dict[str, Any]) -> None:
    rates = profile["curves"][profile["backend"]]
    if "error" in rates:
        _LOG.warning("Copies by %s, not measured: %s", profile["backend"], rates["error"])
        return
    (size, store), (_, load) = rates["store"][-1], rates["load"][-1]
    _LOG.info(
        "Copies by %s: %.1f GB/s out, %.1f GB/s in (measured on %d MiB)", profile["backend"], store, load, size >> 20
    )
