"""What copies between one cache and one arena: the fastest backend, over memory that it can reach."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from kvkernels import HostArena, PagedLayout, Transfer

_LOG = logging.getLogger("kvcore.vllm")
_CPU_SCRATCH_BYTES = 32 << 20


class Transfers(Protocol):
    """The backend, and what pins the arena for it."""

    transfer: Transfer

    def close(self) -> None:
        """Wait for what is under way; the arena is not pinned afterwards."""


class Paged(Protocol):
    """What is copied: the engine's KV cache (`kvcore.vllm.mover.Cache`)."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """By layer."""
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

        layout, arena = cache.layout(chunk_tokens), HostArena(data)
        choice = best_backend(layout, cache.tensors, arena, scratch_bytes=_CPU_SCRATCH_BYTES, packed=cache.packed)
        self.transfer = choice.transfer
        _report(choice.profile)

    def close(self) -> None:
        """Let go of it."""
        self.transfer.close()


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
        choice = best_backend(cache.layout(chunk_tokens), cache.tensors, self._arena, packed=cache.packed)
        self.transfer = choice.transfer
        _report(choice.profile)

    def close(self) -> None:
        """Let go of it, then unpin."""
        self.transfer.close()
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
