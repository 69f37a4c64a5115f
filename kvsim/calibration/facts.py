"""What a calibration cannot ask an endpoint: the model's sizes, the GPU's memory and its link."""

import math
import time
from pathlib import Path

import numpy as np

from kvsim import models
from kvsim.calibration.measure import Facts
from kvsim.calibration.tables import LOWER
from kvsim.errors import UsageError
from kvsim.models.table import canonical
from kvsim.profiles import Part, TransferCurve, available

GIB = 2**30
ARRIVES = 0.85
"""What of a link's nominal rate arrives: 54.9 of 64 GB/s on an H100."""
SIZES = (64 * 2**10, 2**20, 4 * 2**20, 36 * 2**20, 2**28)
"""Copies measured where the GPU is this machine's memory."""


def gather(  # noqa: PLR0913 - each is a thing that can be known
    model: str,
    gpu: str,
    *,
    max_model_len: int,
    tensor_parallel: int = 1,
    kv_dtype: str = "auto",
    weight_gb: float | None = None,
    gpu_memory_gb: float | None = None,
    link_gb_per_s: float | None = None,
    name: str | None = None,
) -> Facts:
    """Return the facts of an engine, from the tables, the model's folder and what is given.

    Args:
        model: Its name, or the path of its folder or config.json.
        gpu: Its name; `cpu` for an engine whose KV is in this machine's memory, whose copies are then measured.
        max_model_len: Longest prompt and output.
        tensor_parallel: GPUs of the engine.
        kv_dtype: Of its KV cache.
        weight_gb: Weights in GiB over all ranks; None: as shipped profiles or the model's folder say.
        gpu_memory_gb: Device memory in GiB of one GPU; None: as the table says.
        link_gb_per_s: Rate of one GPU's link in 1e9 bytes a second; None: as a shipped profile or the table says.
        name: Of the profile; None: GPU and model.

    Raises:
        UsageError: Something is neither known nor given; the message names the flag.
    """
    shape = models.model(model)
    short = canonical(shape.name) or Path(shape.name).name
    kind = "cpu" if gpu.lower() == "cpu" else _gpu_name(gpu, gpu_memory_gb, link_gb_per_s)
    memory = _given("--gpu-memory-gb", gpu_memory_gb, GIB)
    weights = _given("--weight-gb", weight_gb, GIB)
    if memory is None:
        if kind == "cpu":
            raise UsageError("--gpu cpu needs --gpu-memory-gb: the engine's memory for weights and KV together")
        memory = int(models.gpu(gpu).memory_gib * GIB)
    if weights is None:
        weights = _weights(model, short, tensor_parallel)
    curves, where = _link(kind, gpu, _given("--link-gb-s", link_gb_per_s, 1e9), tensor_parallel)
    return Facts(
        name=name or f"{kind}-{short}" + (f"-tp{tensor_parallel}" if tensor_parallel > 1 else ""),
        model=short,
        gpu=kind,
        layers=shape.layers,
        kv_bytes_per_token=shape.bytes_per_token(tensor_parallel=tensor_parallel, kv_dtype=kv_dtype),
        weight_bytes=weights,
        gpu_memory_bytes=memory * tensor_parallel,
        max_model_len=max_model_len,
        transfers={**curves, **LOWER},
        transfers_from=where,
        tensor_parallel=tensor_parallel,
        kv_copies=tensor_parallel if shape.latent else 1,
    )


def _gpu_name(gpu: str, memory_gb: float | None, link_gb_per_s: float | None) -> str:
    """Return the table's name of a GPU; another name stands where everything about it is given."""
    try:
        return models.gpu(gpu).name
    except UsageError as error:
        if memory_gb is None or link_gb_per_s is None:
            raise UsageError(f"{error}; another needs --gpu-memory-gb and --link-gb-s") from None
        return gpu.lower()


def _given(flag: str, value: float | None, unit: float) -> int | None:
    if value is not None and not 0 < value < math.inf:
        raise UsageError(f"{flag} {value:g}: above zero, and finite")
    return None if value is None else int(value * unit)


def _weights(model: str, short: str, tensor_parallel: int) -> int:
    """Return the bytes of a model's weights: of the files in its folder, or as a shipped profile has them."""
    folder = Path(model).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    files = list(folder.glob("*.safetensors")) if (folder / "config.json").is_file() else []
    if files:
        return sum(file.stat().st_size for file in files)
    for profile in available():
        if profile.model == short:
            return profile.weight_bytes
    raise UsageError(f"--weight-gb is needed: what the weights of {short} take, over {tensor_parallel} GPUs")


def _link(kind: str, gpu: str, rate: int | None, ranks: int) -> tuple[dict[str, TransferCurve], Part]:
    """Return the curves of both directions, all ranks together, and where they come from."""
    if rate is not None:
        curve = TransferCurve(sizes=(ranks * GIB,), bytes_per_s=(float(ranks * rate),))
        return {"h2d": curve, "d2h": curve}, Part(kind="assumed", source="given: --link-gb-s", error="unknown")
    if kind == "cpu":
        curve = memory_curve()
        source = "copies of 64 KiB to 256 MiB within this machine's memory, numpy, one thread"
        return {"h2d": curve, "d2h": curve}, Part(kind="measured", source=source, error="best of three each")
    for profile in available():
        if (profile.gpu, profile.tensor_parallel) == (kind, ranks):
            curves = {direction: profile.transfers[direction] for direction in ("h2d", "d2h")}
            return curves, Part(kind="assumed", source=f"those of profile {profile.name}", error="another machine's")
    nominal = ARRIVES * models.gpu(gpu).host_bytes_per_s
    curve = TransferCurve(sizes=(ranks * GIB,), bytes_per_s=(ranks * nominal,))
    source = f"{100 * ARRIVES:g}% of the link's nominal rate"
    return {"h2d": curve, "d2h": curve}, Part(kind="assumed", source=source, error="unknown")


def memory_curve() -> TransferCurve:
    """Measure copies within memory: the best of three of each size, in two seconds at most."""
    source, target = np.ones(SIZES[-1], np.uint8), np.zeros(SIZES[-1], np.uint8)
    times: list[float] = []
    for size in SIZES:
        best = min(_copy_s(source[:size], target[:size]) for _ in range(3))
        times.append(max(best, times[-1] if times else 0.0))
    return TransferCurve(sizes=SIZES, bytes_per_s=tuple(size / took for size, took in zip(SIZES, times, strict=True)))


def _copy_s(
    source: "np.ndarray[tuple[int], np.dtype[np.uint8]]", target: "np.ndarray[tuple[int], np.dtype[np.uint8]]"
) -> float:
    started = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - started
