"""What copies between one cache and one arena: the fastest backend for whole chunks, another for single blocks."""

import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from kvkernels import HostArena, PagedLayout, Transfer
from kvkernels.transfer import Tensors

_LOG = logging.getLogger("kvcore.vllm")
_CPU_SCRATCH_BYTES = 32 << 20


class Transfers(Protocol):
    """The two backends, and what pins the arena for them."""

    whole: Transfer
    single: Transfer

    def close(self) -> None:
        """Wait for what is under way; the arena is not pinned afterwards."""


TransferFactory: TypeAlias = Callable[[PagedLayout, PagedLayout, Tensors, Any], Transfers]
"""Takes the layouts of a chunk and of a block, the cache's tensors, and the arena's bytes."""


class HostTransfers:
    """On the CPU backend everything is in reach; the better of torch's indexing and threads of memmove is taken."""

    def __init__(self, chunk: PagedLayout, block: PagedLayout, tensors: Tensors, data: Any) -> None:
        from kvkernels.choose import best_backend  # noqa: PLC0415 - the backends import torch
        from kvkernels.reference import ReferenceTransfer  # noqa: PLC0415

        arena = HostArena(data)
        choice = best_backend(chunk, tensors, arena, scratch_bytes=_CPU_SCRATCH_BYTES)
        self.whole = choice.transfer
        self.single: Transfer = ReferenceTransfer(block, tensors, arena)
        _report(choice.profile)

    def close(self) -> None:
        """Let go of both."""
        self.whole.close()
        self.single.close()


class CudaTransfers:
    """On a GPU the arena is pinned in the background; what is not pinned yet goes through a pinned buffer."""

    def __init__(self, chunk: PagedLayout, block: PagedLayout, tensors: Tensors, data: Any) -> None:
        from kvkernels.choose import best_backend  # noqa: PLC0415 - the backends import torch, Triton and CUDA
        from kvkernels.cuda_driver import cuda_driver  # noqa: PLC0415
        from kvkernels.cuda_streams import CudaRuntime  # noqa: PLC0415
        from kvkernels.registered import RegisteredArena  # noqa: PLC0415
        from kvkernels.transfer import listed  # noqa: PLC0415

        runtime = CudaRuntime(listed(tensors)[0].device)
        self._arena = RegisteredArena(data, cuda_driver(), enter_thread=runtime.enter_thread)
        choice = best_backend(chunk, tensors, self._arena)
        self.whole = choice.transfer
        # Part of a chunk is few rows of every plane: copies of their own, without a second staging buffer.
        self.single = best_backend(block, tensors, self._arena, only=("cuda_batch",), scratch_bytes=1 << 20).transfer
        _report(choice.profile)

    def close(self) -> None:
        """Let go of both, then unpin."""
        self.whole.close()
        self.single.close()
        self._arena.close()


def _report(profile: dict[str, Any]) -> None:
    rates = profile["curves"][profile["backend"]]
    (size, store), (_, load) = rates["store"][-1], rates["load"][-1]
    _LOG.info(
        "Copies by %s: %.1f GB/s out, %.1f GB/s in (measured on %d MiB)", profile["backend"], store, load, size >> 20
    )
