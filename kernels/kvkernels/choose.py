"""Pick a backend by measuring it on the engine's own cache, before the engine serves."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter_ns
from typing import Any

import numpy as np

from kvkernels.arena import Arena, HostArena
from kvkernels.errors import DeviceError, LayoutError
from kvkernels.layouts import PagedLayout
from kvkernels.packing import packed_layout
from kvkernels.registered import BounceTransfer, StreamTransfer
from kvkernels.slots import Slot
from kvkernels.streams import HostRuntime, Runtime
from kvkernels.transfer import Tensors, Transfer, listed

__all__ = ["Choice", "UnpackableError", "backend_of", "best_backend", "measure"]

_SCRATCH_BYTES = 256 << 20
_SEED = 5
_HOST_THREADS = 4
_QUIET_S = 0.1
_LARGE_ROW_BYTES = 256 << 10
"""Rows from here on are copied well one by one."""
_MARGIN = 1.1
"""How much faster than the preferred backend another must be: two measurements of one differ by nearly as much."""

Make = Callable[[Arena], Transfer]


class UnpackableError(RuntimeError):
    """What the cache holds at this moment cannot be packed, so nothing was measured."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen backend over the arena that was asked for, and every backend's curve.

    `profile` is plain JSON: `backend`, `layout` (the fingerprint), `slot_bytes`, and `curves`: for each backend either
    `store` and `load` as lists of `[bytes, GB/s]` (GB is 10^9), or `error`. All bytes are those of slots: packed ones
    where the transfer packs.
    """

    transfer: Transfer
    profile: dict[str, Any]


def best_backend(
    layout: PagedLayout,
    tensors: Tensors,
    arena: Arena,
    *,
    scratch_bytes: int = _SCRATCH_BYTES,
    packed: bool = False,
) -> Choice:
    """Measure every backend for this cache's device and return the fastest (see `preferred`), built over `arena`.

    It stores random blocks to scratch memory of its own and loads the same bytes back to where they came from, so the
    cache and the arena keep their contents; the engine must be idle. Under a second on a GPU, the first compilation
    apart.

    Args:
        layout: what `describe` returned for these tensors.
        tensors: the engine's KV cache (torch; JAX engines use `JaxTransfer`, which owns its arrays).
        arena: the arena to serve, not touched here. Over a `RegisteredArena` the transfer bounces what is not pinned.
        scratch_bytes: the most host memory (pinned on a GPU) to measure with; one chunk at least.
        packed: keep slots packed (see `packing`): by `triton_pack` on a GPU, by `reference_pack` on the CPU. The
            transfer's layout is then `packed_layout(layout)`. Where the cache holds what cannot be packed, nothing is
            loaded back, and the backend serves unmeasured, its curve an `error`.

    Raises:
        LayoutError: no backend can serve this layout on this device, or it is not packable.
    """
    runtime, makers = (_packing_candidates if packed else _candidates)(layout, tensors)
    layout = packed_layout(layout) if packed else layout
    counts = _chunk_counts(layout, scratch_bytes)
    scratch = HostArena(runtime.pinned(counts[-1] * layout.slot_bytes), is_pinned=True)
    curves: dict[str, Any] = {}
    built: dict[str, Transfer] = {}
    unmeasured: list[str] = []
    for name, make in makers.items():
        try:
            built[name] = make(scratch)
            curves[name] = measure(built[name], counts, quiet=arena)
            built[name].close()
        except (LayoutError, DeviceError) as error:
            curves[name] = {"error": str(error)}
        except UnpackableError as error:
            curves[name] = {"error": str(error)}
            unmeasured.append(name)
    rated = {name: _largest_seconds(curve) for name, curve in curves.items() if "error" not in curve}
    if not rated and not unmeasured:
        raise LayoutError(f"no backend serves {layout.fingerprint()} on {layout.device}: {curves}")
    best = preferred(layout, rated) if rated else unmeasured[0]
    profile = {
        "backend": best,
        "layout": layout.fingerprint(),
        "slot_bytes": layout.slot_bytes,
        "curves": curves,
    }
    measured = built[best]
    # One that has staging serves with what it was measured with: another of it would double that memory.
    transfer = measured.over(arena) if isinstance(measured, StreamTransfer) else makers[best](arena)
    return Choice(_serving(transfer, arena, runtime), profile)


def backend_of(name: str, layout: PagedLayout, tensors: Tensors, arena: Arena, *, packed: bool = False) -> Transfer:
    """Build the backend that `best_backend` chose before over another arena: nothing is measured, engines may run.

    Args:
        name: the profile's `backend`.
        layout: as there.
        tensors: as there.
        arena: as there.
        packed: as there.

    Raises:
        LayoutError: the backend cannot serve this layout on this device.
    """
    runtime, makers = (_packing_candidates if packed else _candidates)(layout, tensors)
    if name not in makers:
        raise LayoutError(f"no backend {name!r} on device {layout.device}: there are {', '.join(makers)}")
    return _serving(makers[name](arena), arena, runtime)


def preferred(layout: PagedLayout, rated: Mapping[str, float]) -> str:
    """Return the backend with the fewest seconds, or one that is about as fast and disturbs the engine less.

    On a GPU many small rows, each a copy, cost the engine's process more host time than is seen while it is idle, and
    large ones need no kernel that would take processors from the model's.
    """
    best = min(rated, key=lambda name: rated[name])
    wanted = "cuda_batch" if min(plane.row_bytes for plane in layout.planes) >= _LARGE_ROW_BYTES else "triton"
    return wanted if rated.get(wanted, float("inf")) <= _MARGIN * rated[best] else best


def measure(
    transfer: Transfer, chunk_counts: Sequence[int], *, repeats: int = 5, quiet: Arena | None = None
) -> dict[str, list[list[float]]]:
    """Time stores of random blocks, and loads of the same bytes back to them, at each number of chunks.

    `transfer`'s arena must be scratch memory of at least the largest count of slots, from its start, all of it within
    the device's reach. An arena that is still being pinned (`quiet`) is asked to hold off meanwhile.

    Returns:
        `store` and `load`, each a list of `[bytes, GB/s]`; medians after one warm-up.

    Raises:
        UnpackableError: a store rejected chunks; they were not loaded back.
    """
    layout = transfer.layout
    order = np.random.default_rng(_SEED).permutation(layout.num_blocks)
    curve: dict[str, list[list[float]]] = {"store": [], "load": []}
    for count in chunk_counts:
        slots: list[Slot] = [[(i * layout.slot_bytes, layout.slot_bytes)] for i in range(count)]
        ids = order[: count * layout.chunk_blocks]
        nbytes = count * layout.slot_bytes
        seconds: dict[str, list[float]] = {"store": [], "load": []}
        for _ in range(repeats + 1):
            if quiet is not None:
                quiet.defer(_QUIET_S)
            began = perf_counter_ns()
            handle = transfer.store(ids, slots)
            handle.wait()
            stored = perf_counter_ns()
            if handle.rejected():
                raise UnpackableError(f"{len(handle.rejected())} of {count} chunks of the cache cannot be packed")
            transfer.load(slots, ids).wait()
            seconds["store"].append((stored - began) / 1e9)
            seconds["load"].append((perf_counter_ns() - stored) / 1e9)
        for direction, points in curve.items():
            points.append([nbytes, round(nbytes / median(seconds[direction][1:]) / 1e9, 3)])
    return curve


def _serving(transfer: Transfer, arena: Arena, runtime: Runtime) -> Transfer:
    """The backend, with a bounce for slots that are not pinned yet where the arena is registered in slices."""
    if runtime.needs_pinned and arena.split_bytes and isinstance(transfer, StreamTransfer):
        return BounceTransfer(transfer, arena, runtime)
    return transfer


def _largest_seconds(curve: dict[str, list[list[float]]]) -> float:
    """Seconds a byte there and back at the largest size."""
    return 1 / curve["store"][-1][1] + 1 / curve["load"][-1][1]


def _chunk_counts(layout: PagedLayout, scratch_bytes: int) -> list[int]:
    """1, 4, 16, ... chunks, as many as scratch memory and the cache hold, and that most itself."""
    most = min(max(1, scratch_bytes // layout.slot_bytes), layout.num_blocks // layout.chunk_blocks)
    if most < 1:
        raise LayoutError(f"a cache of {layout.num_blocks} blocks is smaller than a chunk of {layout.chunk_blocks}")
    powers = [4**i for i in range(16) if 4**i < most]
    return [*powers, most]


def _candidates(layout: PagedLayout, tensors: Tensors) -> tuple[Runtime, dict[str, Make]]:
    # The backends import torch, Triton and CUDA; only the ones that this device can use are touched.
    from kvkernels.cuda_batch import BatchTransfer  # noqa: PLC0415
    from kvkernels.reference import ReferenceTransfer  # noqa: PLC0415

    makers: dict[str, Make] = {"reference": lambda arena: ReferenceTransfer(layout, tensors, arena)}
    if layout.device == "cpu":
        host = _host_runtime()
        makers["memmove"] = lambda arena: BatchTransfer(
            layout, tensors, arena, host, batch_rows=1024, call_copies=1 << 20, name="memmove"
        )
        return host, makers
    if layout.device != "cuda":
        raise LayoutError(f"no backend for device {layout.device}")
    from kvkernels.cuda_streams import CudaRuntime  # noqa: PLC0415

    cuda = CudaRuntime(listed(tensors)[0].device)
    makers["cuda_batch"] = lambda arena: BatchTransfer(layout, tensors, arena, cuda)
    if importlib.util.find_spec("triton") is not None:
        from kvkernels.triton_gather import triton_transfer  # noqa: PLC0415

        makers["triton"] = lambda arena: triton_transfer(layout, tensors, arena, cuda)
    return cuda, makers


def _packing_candidates(layout: PagedLayout, tensors: Tensors) -> tuple[Runtime, dict[str, Make]]:
    if layout.device == "cpu":
        from kvkernels.reference_pack import reference_pack_transfer  # noqa: PLC0415

        host = _host_runtime()
        return host, {"reference_pack": lambda arena: reference_pack_transfer(layout, tensors, arena, host)}
    if layout.device != "cuda" or importlib.util.find_spec("triton") is None:
        raise LayoutError(f"no backend packs on device {layout.device}: it takes CUDA and Triton, or the CPU")
    from kvkernels.cuda_streams import CudaRuntime  # noqa: PLC0415
    from kvkernels.triton_pack import triton_pack_transfer  # noqa: PLC0415

    cuda = CudaRuntime(listed(tensors)[0].device)
    return cuda, {"triton_pack": lambda arena: triton_pack_transfer(layout, tensors, arena, cuda)}


def _host_runtime() -> HostRuntime:
    return HostRuntime(threads=min(_HOST_THREADS, os.cpu_count() or 1))
