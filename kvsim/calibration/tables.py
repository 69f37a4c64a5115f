"""Grids composed from the operator tables of NVIDIA's aiconfigurator-core (Apache-2.0).

How the shipped profiles that nobody measured were made: `python -m kvsim.calibration.tables OUT_FOLDER`, where there is
`aiconfigurator-core`. (It makes one of qwen3-8b on an H100 too, which `benchmarks/ship_profile.py` takes.) That package
measured operators (matrix products, attention, all-reduce) of vLLM on each GPU; a step is their sum. Nothing here is
needed to use a profile.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsim.profiles.costs import Grid, PrefillFit, TransferCurve
from kvsim.profiles.load import to_json
from kvsim.profiles.profile import Part, Profile

NEW = (
    *(1, 16, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096),
    *(6144, 8192, 12288, 16384, 24576, 32768),
)
CACHED = (0, 512, 1024, 2048, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152, 65536, 98304, 131072)
BATCH = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
CONTEXT = (16, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 65536, 131072)

MI_B = 2**20
H100_PCIE = {
    "h2d": TransferCurve(
        sizes=(64 * 2**10, MI_B, 4 * MI_B, 36 * MI_B, 2**30),
        bytes_per_s=(5.0e9, 47.4e9, 52.5e9, 54.3e9, 54.9e9),
        latency_s=13e-6,
    ),
    "d2h": TransferCurve(
        sizes=(64 * 2**10, MI_B, 4 * MI_B, 36 * MI_B, 2**30),
        bytes_per_s=(5.0e9, 47.4e9, 52.5e9, 54.3e9, 55.2e9),
        latency_s=13e-6,
    ),
}
LOWER = {
    "disk_read": TransferCurve(sizes=(2**30,), bytes_per_s=(1.5e9,), latency_s=0.0),
    "disk_write": TransferCurve(sizes=(2**30,), bytes_per_s=(1.5e9,), latency_s=0.0),
    "network_read": TransferCurve(sizes=(2**30,), bytes_per_s=(11.0e9,), latency_s=0.0),
    "network_write": TransferCurve(sizes=(2**30,), bytes_per_s=(11.0e9,), latency_s=0.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A profile to be made: the names that the tables and we use, and the model's sizes."""

    model: str
    hub_name: str
    gpu: str
    system: str
    tensor_parallel: int
    layers: int
    kv_bytes_per_token: int
    weight_bytes: int
    gpu_memory_bytes: int
    max_model_len: int
    fit_ms: tuple[float, float, float, float]
    """Floor, base, linear and quadratic term of the prefill fit, in ms."""


H100_BYTES, H200_BYTES = 81_559 * MI_B, 143_771 * MI_B
QWEN3_8B: dict[str, Any] = {
    "model": "qwen3-8b",
    "hub_name": "Qwen/Qwen3-8B",
    "tensor_parallel": 1,
    "layers": 36,
    "kv_bytes_per_token": 147_456,
    "weight_bytes": 16_381_470_720,
    "max_model_len": 40_960,
}
TARGETS = (
    Target(
        **QWEN3_8B, gpu="h100", system="h100_sxm", gpu_memory_bytes=H100_BYTES, fit_ms=(8.5, 4.123, 0.018965, 4.516e-7)
    ),
    Target(
        **QWEN3_8B, gpu="h200", system="h200_sxm", gpu_memory_bytes=H200_BYTES, fit_ms=(6.75, 2.925, 0.01923, 4.594e-7)
    ),
    Target(
        model="qwen3-32b",
        hub_name="Qwen/Qwen3-32B",
        gpu="h100",
        system="h100_sxm",
        tensor_parallel=2,
        layers=64,
        kv_bytes_per_token=262_144,
        weight_bytes=65_524_246_528,
        gpu_memory_bytes=2 * H100_BYTES,
        max_model_len=40_960,
        fit_ms=(17.75, 7.233, 0.04831, 8.123e-7),
    ),
    Target(
        model="llama-3.1-8b",
        hub_name="meta-llama/Meta-Llama-3.1-8B",
        gpu="h100",
        system="h100_sxm",
        tensor_parallel=1,
        layers=32,
        kv_bytes_per_token=131_072,
        weight_bytes=16_060_522_496,
        gpu_memory_bytes=H100_BYTES,
        max_model_len=131_072,
        fit_ms=(7.25, 2.860, 0.01931, 4.014e-7),
    ),
)


def build(target: Target, version: str, engine: Any) -> Profile:
    """Compose the grids of one target from the tables.

    Args:
        target: What to make.
        version: The tables' version, for the provenance.
        engine: aiconfigurator-core's compiled `EngineHandle` of the target.
    """
    prefill = _grid(NEW, CACHED, lambda new, cached: engine.predict_prefill_latency(1, new + cached, cached))
    decode = _grid(BATCH, CONTEXT, lambda batch, context: engine.predict_decode_latency(batch, context, 2))
    floor, base, linear, quadratic = (1e-3 * term for term in target.fit_ms)
    ranks = target.tensor_parallel
    return Profile(
        name=f"{target.gpu}-{target.model}" + (f"-tp{ranks}" if ranks > 1 else ""),
        model=target.model,
        gpu=target.gpu,
        tensor_parallel=ranks,
        layers=target.layers,
        kv_bytes_per_token=target.kv_bytes_per_token,
        weight_bytes=target.weight_bytes,
        gpu_memory_bytes=target.gpu_memory_bytes,
        max_model_len=target.max_model_len,
        prefill=prefill,
        prefill_fit=PrefillFit(floor_s=floor, base_s=base, linear_s=linear, quadratic_s=quadratic),
        decode=decode,
        transfers={**{name: _ranks(curve, ranks) for name, curve in H100_PCIE.items()}, **LOWER},
        duplex=88.7 / (54.9 + 55.2),
        handling_base_s=0.0075,
        handling_token_s=1.1e-6,
        provenance=_provenance(target, version),
    )


def _grid(x: Sequence[int], y: Sequence[int], cost_ms: Any) -> Grid:
    rows = [[float(cost_ms(a, b)) for b in y] for a in x]
    for i, row in enumerate(
        rows
    ):  # the tables' fusions make a step with little cached a hair dearer than one with more
        for j in range(1, len(row)):
            row[j] = max(row[j], row[j - 1])
        if i:
            rows[i] = [max(a, b) for a, b in zip(row, rows[i - 1], strict=True)]
    return Grid(tuple(x), tuple(y), tuple(tuple(round(1e-3 * ms, 8) for ms in row) for row in rows))


def _ranks(curve: TransferCurve, ranks: int) -> TransferCurve:
    """Every rank copies its shard over its own link."""
    return TransferCurve(
        sizes=tuple(ranks * size for size in curve.sizes),
        bytes_per_s=tuple(ranks * rate for rate in curve.bytes_per_s),
        latency_s=curve.latency_s,
    )


def _provenance(target: Target, version: str) -> dict[str, Part]:
    tables = f"aiconfigurator-core {version} (Apache-2.0), {target.hub_name} on {target.system}, tables of vLLM 0.24.0"
    own = (target.model, target.gpu) == ("qwen3-8b", "h100")
    link = "1 GiB to 64 KiB copies, pinned host memory, one H100 80GB, PCIe 5 x16"
    against = "not checked against a live engine"
    if own:
        against = (
            "with handling added, within 2 to 7% of cold TTFTs measured on one H100 (vLLM 0.26.0, eager, one request)"
        )
    return {
        "prefill": Part(
            kind="tables",
            source=tables,
            error=f"interpolation 2% mean, 8% at p95, 15% worst; {against}; "
            "attention behind a cached prefix is derived in the tables, not measured",
        ),
        "prefill_fit": Part(kind="fitted", source=tables, error="5% mean, 28% worst against the tables"),
        "decode": Part(
            kind="tables", source=tables, error="interpolation 2% mean, 9% worst; not checked against a live engine"
        ),
        "pcie": Part(
            kind="measured" if target.gpu == "h100" and target.tensor_parallel == 1 else "assumed",
            source=link + ("; each rank has its own link" if target.tensor_parallel > 1 else ""),
            error="spread not recorded" if target.gpu == "h100" else "another GPU on the same kind of link",
        ),
        "disk": Part(kind="assumed", source="writes to /tmp ran at 1.5 GB/s; reads taken as equal", error="unknown"),
        "network": Part(kind="assumed", source="100 Gbit/s Ethernet at 88%", error="unknown"),
        "handling": Part(
            kind="fitted",
            source="five TTFTs of qwen3-8b on one H100, cold and GPU prefix hits of 2,048 to 32,000 tokens",
            error="11% of those TTFTs at worst",
        ),
    }


def main(folder: str) -> None:
    """Write the shipped profiles to `folder`."""
    package = importlib.import_module("aiconfigurator_core")
    engine = importlib.import_module("aiconfigurator_core.sdk.engine")
    version = importlib.import_module("importlib.metadata").version(package.__name__.replace("_", "-"))
    for target in TARGETS:
        handle = engine.EngineHandle.compile(target.hub_name, target.system, "vllm", tp_size=target.tensor_parallel)
        profile = build(target, version, handle)
        Path(folder, f"{profile.name}.json").write_text(to_json(profile), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
