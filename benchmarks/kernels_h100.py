# ruff: noqa: PLC0415  (Triton and JAX may be absent; each is imported by the section that needs it)
"""Check and time the transfer kernels on one CUDA GPU, with the KV cache of Qwen3-8B in bf16 as vLLM 0.26 lays it out.

    python benchmarks/kernels_h100.py --out benchmarks/results/kernels-h100.json
    python benchmarks/kernels_h100.py --only-packed --out benchmarks/results/kernels-h100-packed.json

Needs torch, and uses Triton, cuda-python and JAX where they are. Every section is checked before it is timed; one that
fails is reported with its traceback and the rest goes on, but the exit code is then 1. Rates are 10^9 bytes a second;
`ratio` is a rate over the pinned 1 GiB copy in the same direction, timed right before and right after.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import torch
from kernels_h100_bench import MIB, Bench, say
from kernels_h100_beside import (
    beside_matmul,
    capture_beside_registration,
    launches_beside_registration,
    launches_beside_transfer,
    small_copies_beside,
)
from kernels_h100_packed import packed_sections

from kvkernels.cuda_batch import BatchTransfer
from kvkernels.cuda_streams import CudaRuntime
from kvkernels.reference import ReferenceTransfer

MINOR = {"layer 1", "layer 18", "end"}  # times that the summary leaves out


def triton_makers(bench):
    """Builders of the Triton backend, for random shapes and for the big cache."""
    from kvkernels.triton_gather import triton_transfer

    def small(layout, tensors, arena):
        row = max(plane.row_bytes for plane in layout.planes)
        staging = 6 * row * int(bench.rng.integers(1, 12))
        return triton_transfer(
            layout, tensors, arena, bench.runtime, staging_bytes=staging, copy_bytes=4 * row, group_bytes=row
        )

    def big(batched=True, **options):
        runtime = CudaRuntime(bench.device, batched=batched)
        return lambda cache: triton_transfer(bench.layout, cache, bench.arena, runtime, **options)

    return small, big


def jax_sections(bench, arguments):
    """JAX's, where it is."""
    from kernels_h100_jax import jax_random_shapes, jax_whole

    bench.section("jax random shapes", lambda: jax_random_shapes(bench, arguments.check_seconds))
    bench.section("jax, 8192 tokens", lambda: jax_whole(bench, 8192))
    return {}


def run(bench, arguments):
    """Every section, the decisive ones first."""

    batch = bench.batch

    def each(layout, tensors, arena):
        return BatchTransfer(layout, tensors, arena, CudaRuntime(bench.device, batched=False))

    section = bench.section
    section("baseline", bench.baseline)
    section("negative control", bench.negative_control)
    section("qwen3-8b", bench.allocate)
    section("bounce, cuda_batch", lambda: bench.bounce_rate(bench.batch))
    makers = []
    section("triton", lambda: makers.extend(triton_makers(bench)) or {})
    if makers:
        triton_sections(bench, arguments, *makers)
    section("cuda_batch, 32000 tokens", lambda: bench.whole(batch, bench.adjacent))
    section("cuda_batch overwritten", lambda: bench.overwritten(batch))
    section("launches while registering", lambda: launches_beside_registration(bench.runtime))
    section("graph capture while registering", lambda: capture_beside_registration(bench.runtime))
    section(
        "cuda_batch random shapes",
        lambda: bench.random_shapes(lambda *given: BatchTransfer(*given, bench.runtime), arguments.check_seconds / 3),
    )
    section("a call a copy, random shapes", lambda: bench.random_shapes(each, arguments.check_seconds / 6))
    section("reference random shapes", lambda: bench.random_shapes(ReferenceTransfer, arguments.check_seconds / 6))
    section("choice at start-up", bench.choice)
    section("choice while registering", bench.choice_while_registering)
    section("jax", lambda: jax_sections(bench, arguments))
    section("cuda_batch beside a matmul", lambda: beside_matmul(bench, batch, rounds=20, products=30))
    section("cuda_batch, small copies beside", lambda: small_copies_beside(bench, batch, bench.scattered))
    if makers:
        triton_variants(bench, makers[1])
        packed_sections(bench, arguments)
    section("copy sizes", bench.copies)


def triton_sections(bench, arguments, small, big):
    """What the targets are about."""
    section = bench.section
    section("bounce, triton", lambda: bench.bounce_rate(big()))
    section("triton staging", lambda: bench.staging(big()))
    section("triton, 32000 tokens", lambda: bench.whole(big(), bench.adjacent))
    section("triton, 32000 tokens, pages of 2 MiB", lambda: bench.whole(big(), bench.scattered))
    section("triton, 8192 tokens, pages of 2 MiB", lambda: bench.whole(big(), bench.scattered, tokens=8192))
    section("triton, 2048 tokens, pages of 2 MiB", lambda: bench.whole(big(), bench.scattered, tokens=2048))
    section("triton, 256 tokens", lambda: bench.whole(big(), bench.scattered, tokens=256))
    section("triton overwritten", lambda: bench.overwritten(big()))
    section("triton random shapes", lambda: bench.random_shapes(small, arguments.check_seconds))
    section("triton beside a matmul", lambda: beside_matmul(bench, big(), rounds=20, products=30))
    section("triton, small copies beside", lambda: small_copies_beside(bench, big(), bench.scattered))
    for ahead in (16, 64, 256):
        section(
            f"triton, launches beside, ahead {ahead}", lambda n=ahead: launches_beside_transfer(bench, big(ahead=n))
        )
    section("triton, both directions", lambda: bench.duplex(big()))


def triton_variants(bench, big):
    """One choice changed at a time."""
    variants = (
        ("copies of 2 MiB", {"copy_bytes": 2 * MIB}),
        ("copies of 8 MiB", {"copy_bytes": 8 * MIB}),
        ("a driver call a copy", {"batched": False}),
        ("32 programs", {"programs": 32}),
        ("132 programs", {"programs": 132}),
        ("2 buffers", {"buffers": 2}),
        ("4 buffers", {"buffers": 4}),
        ("6 buffers", {"buffers": 6}),
    )
    for programs in (4, 32, 132):
        # Few programs take few processors for long, and a product may wait for the last of its tiles.
        name = f"triton variant, {programs} programs, beside a matmul"
        bench.section(name, lambda n=programs: beside_matmul(bench, big(programs=n), rounds=20))
    for name, options in variants:
        make = big(**options)
        bench.section(f"triton variant, {name}", lambda m=make: bench.whole(m, bench.scattered, repeats=3))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--check-seconds", type=float, default=9, help="time for each backend's random shapes")
    parser.add_argument("--only-packed", action="store_true", help="only the sections of triton_pack")
    parser.add_argument("--deadline", type=float, default=240, help="start no section after so many seconds")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    bench = Bench(arguments.deadline, arguments.out)
    if arguments.only_packed:
        bench.section("baseline", bench.baseline)
        bench.section("qwen3-8b", bench.allocate)
        packed_sections(bench, arguments)
    else:
        run(bench, arguments)
    summary(bench.write())
    sys.exit(1 if bench.failures else 0)


def summary(report):
    """The end of the output: what the targets are about."""
    say("written; summary:")
    for name, result in report["results"].items():
        if not isinstance(result, dict):
            continue
        if "load_ms" in result:
            ratios = f"store {result['store_ratio']:.3f} load {result['load_ratio']:.3f}"
            times = [
                f"{way} " + ", ".join(f"{what} {ms}" for what, ms in result[f"{way}_ms"].items() if what not in MINOR)
                for way in ("load", "store")
            ]
            print(f"{name:44s} {ratios};", "; ".join(times), "ms")
        elif "store_slowdown_pct" in result:
            print(f"{name:44s}", {k: v for k, v in result.items() if "pct" in k or "outlasted" in k})
        elif "launch_us" in result:
            for beside, found in result["launch_us"].items():
                print(f"{name}: {beside:10s}", found)
        elif name == "launches while registering":
            for beside, found in result.items():
                print(f"{name}: {beside:18s}", found)
        elif "unpack_gbps" in result or "small_copies" in result:
            print(f"{name:44s}", result)
        elif "faults" in result:
            print(f"{name:44s} {result['caches']} caches, {result['faults']} faults")
        elif name.startswith(("bounce", "graph")) or "unordered_equal" in result:
            print(f"{name:44s}", result)
    print("failures:", {name: text.strip().splitlines()[-1] for name, text in report["failures"].items()} or "none")


if __name__ == "__main__":
    main()
