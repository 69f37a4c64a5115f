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
        """Wait for what is under way; the backend is gone then."""

    def unpin(self) -> None:
        """Let go of the arena; after `close`. That of a large one takes seconds, in any thread."""


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


class Backends:
    """Makes transfers, by the backend that was the fastest when one was first asked for.

    The first one for a size of chunks measures, for which the engine must be idle or its thread be the caller's. Later
    ones, over the arena of a server that has come back, are made at once, and beside a step under way.

    Args:
        kind: What makes them, by a backend's name or, without one, by measuring.
    """

    def __init__(self, kind: Callable[[Paged, int, Any, str | None], Transfers]) -> None:
        self._kind = kind
        self._names: dict[int, str] = {}

    def __call__(self, cache: Paged, chunk_tokens: int, data: Any) -> Transfers:
        """Make one over the bytes of an arena."""
        made = self._kind(cache, chunk_tokens, data, self._names.get(chunk_tokens))
        self._names[chunk_tokens] = made.transfer.name
        return made


class _Backend:
    """A backend over an arena, chosen by its name or by measuring.

    Args:
        cache: What is copied.
        chunk_tokens: Tokens of a chunk.
        arena: What the backend copies from and to.
        name: The backend's; None measures all.
        options: Of the measurement.
    """

    def __init__(self, cache: Paged, chunk_tokens: int, arena: Any, name: str | None, **options: Any) -> None:
        from kvkernels.choose import backend_of, best_backend  # noqa: PLC0415 - the backends import torch

        layout = cache.layout(chunk_tokens)
        if name is not None:
            self.transfer = backend_of(name, layout, cache.tensors, arena, packed=cache.packed)
            return
        choice = best_backend(layout, cache.tensors, arena, packed=cache.packed, **options)
        self.transfer = choice.transfer
        _report(choice.profile)

    def close(self) -> None:
        """Wait for what is under way, and free the backend's memory: the next one needs as much."""
        self.transfer.close()
        del self.transfer

    def unpin(self) -> None:
        """Nothing is pinned."""


class HostTransfers(_Backend):
    """On the CPU backend everything is in reach; the better of torch's indexing and threads of memmove is taken."""

    def __init__(self, cache: Paged, chunk_tokens: int, data: Any, name: str | None = None) -> None:
        super().__init__(cache, chunk_tokens, HostArena(data), name, scratch_bytes=_CPU_SCRATCH_BYTES)


class CudaTransfers(_Backend):
    """On a GPU the arena is pinned in the background; what is not pinned yet goes through a pinned buffer.

    It is made, closed and unpinned by any thread, whatever the engine captures meanwhile.
    """

    def __init__(self, cache: Paged, chunk_tokens: int, data: Any, name: str | None = None) -> None:
        from kvkernels.cuda_driver import cuda_driver  # noqa: PLC0415 - these import torch, Triton and CUDA
        from kvkernels.cuda_streams import CudaRuntime  # noqa: PLC0415
        from kvkernels.registered import RegisteredArena  # noqa: PLC0415
        from kvkernels.transfer import listed  # noqa: PLC0415

        self._runtime = CudaRuntime(listed(cache.tensors)[0].device)
        enter = self._runtime.enter_thread
        self._arena = RegisteredArena(data, cuda_driver(), enter_thread=enter, ended_early=warn_unpinned)
        try:
            with self._runtime.entered():
                super().__init__(cache, chunk_tokens, self._arena, name)
        except BaseException:
            self.unpin()
            raise

    def close(self) -> None:
        """Wait for what is under way, and free the backend's memory."""
        with self._runtime.entered():
            super().close()

    def unpin(self) -> None:
        """Stop pinning, and unpin."""
        with self._runtime.entered():
            self._arena.close()


def warn_unpinned(why: str) -> None:
    """Say once what would otherwise be seen in slow transfers alone, for as long as the engine lives."""
    _LOG.warning("The rest of the arena is not pinned, and copied more slowly, through a buffer: %s", why)


def _report(profile: dict[str, Any]) -> None:
    rates = profile["curves"][profile["backend"]]
    if "error" in rates:
        _LOG.warning("Copies by %s, not measured: %s", profile["backend"], rates["error"])
        return
    (size, store), (_, load) = rates["store"][-1], rates["load"][-1]
    _LOG.info(
        "Copies by %s: %.1f GB/s out, %.1f GB/s in (measured on %d MiB)", profile["backend"], store, load, size >> 20
    )
