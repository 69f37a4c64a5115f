# ruff: noqa: PLC0415  (Triton and JAX may be absent; each is imported by the section that needs it)
"""Check and time the transfer kernels on one CUDA GPU, with the KV cache of Qwen3-8B in bf16 as vLLM 0.26 lays it out.

    python benchmarks/kernels_h100.py --out benchmarks/results/kernels-h100.json

Needs torch, and uses Triton, cuda-python and JAX where they are. Every section is checked before it is timed; one that
fails is reported with its traceback and the rest goes on, but the exit code is then 1. Rates are 10^9 bytes a second;
`ratio` is a rate over the pinned 1 GiB copy of the same run in the same direction.
"""

import argparse
import datetime as dt
import importlib.metadata
import json
import mmap
import os
import platform
import shlex
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import numpy as np
import torch

from kvkernels import HostArena, describe
from kvkernels.cases import CASE_DTYPES, CASE_FORMS, random_case, random_ids, random_slots, round_trip_faults
from kvkernels.choose import best_backend
from kvkernels.cuda_batch import BatchTransfer
from kvkernels.cuda_driver import cuda_driver
from kvkernels.cuda_streams import CudaRuntime
from kvkernels.reference import ReferenceTransfer
from kvkernels.registered import BounceTransfer, RegisteredArena

MIB, GIB = 1 << 20, 1 << 30
LAYERS, HEADS, HEAD_DIM, BLOCK, CHUNK = 36, 8, 128, 16, 256
TOKENS = 32_000
BLOCKS = 2_048
PAGE = 2 * MIB
SEED = 20

started = time.perf_counter()


def say(*words):
    print(f"[{time.perf_counter() - started:6.1f} s]", *words, flush=True)


def seconds_of(work, *, repeats=5, warmup=1):
    """Median wall time of work that ends synchronised."""
    times = []
    for turn in range(warmup + repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if turn >= warmup:
            times.append(time.perf_counter() - began)
    return median(times)


class Bench:
    """One cache, one arena, and the results so far."""

    def __init__(self, deadline_s, out):
        self.deadline_s = deadline_s
        self.out = out
        self.results = {}
        self.failures = {}
        self.rng = np.random.default_rng(SEED)
        self.device = torch.device("cuda", 0)
        self.runtime = CudaRuntime(self.device)

    def section(self, name, work):
        if time.perf_counter() - started > self.deadline_s:
            self.failures[name] = "not run: out of time"
            say(name, "NOT RUN: out of time")
            return
        say(name)
        try:
            self.results[name] = work()
            say(" ", json.dumps(self.results[name])[:1500])
        except Exception:  # reported in full, and in the exit code
            self.failures[name] = traceback.format_exc()
            say(name, "FAILED\n", self.failures[name])
        self.write()

    def write(self):
        """The report so far: a run that is cut off keeps its figures."""
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(0),
            "versions": versions(),
            "batched_driver_call": cuda_driver().has_batch,
            "seconds": round(time.perf_counter() - started, 1),
            "results": self.results,
            "failures": self.failures,
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(report, indent=2) + "\n")
        return report

    # Baseline

    def baseline(self):
        """The pinned 1 GiB copy, both directions, and both at once."""
        host, other = (torch.empty(GIB, dtype=torch.uint8, pin_memory=True) for _ in range(2))
        near, far = (torch.empty(GIB, dtype=torch.uint8, device=self.device).random_() for _ in range(2))
        side = torch.cuda.Stream()

        def both():
            near.copy_(host, non_blocking=True)
            with torch.cuda.stream(side):
                other.copy_(far, non_blocking=True)

        rates = {
            "store": GIB / seconds_of(lambda: host.copy_(near, non_blocking=True), repeats=9) / 1e9,
            "load": GIB / seconds_of(lambda: near.copy_(host, non_blocking=True), repeats=9) / 1e9,
            "both_total": 2 * GIB / seconds_of(both) / 1e9,
        }
        self.rates = rates
        return {name: round(rate, 2) for name, rate in rates.items()}

    def copies(self):
        """Copies of one size out of a pinned GiB, by driver call and number of streams."""
        host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
        near = torch.empty(GIB, dtype=torch.uint8, device=self.device)
        found = {}
        for size in (64 * 1024, 256 * 1024, MIB, 2 * MIB, 4 * MIB, 36 * MIB):
            offsets = self.rng.permutation(GIB // size) * size
            lengths = np.full(len(offsets), size)
            for batched in (True, False):
                for lanes in (1, 2):
                    runtime = CudaRuntime(self.device, batched=batched)
                    streams = [runtime.stream(urgent=False) for _ in range(lanes)]
                    for direction in ("store", "load"):
                        ends = (host.data_ptr() + offsets, near.data_ptr() + offsets)
                        target, source = ends if direction == "store" else ends[::-1]

                        def work(streams=streams, target=target, source=source, lengths=lengths):
                            for number, stream in enumerate(streams):
                                mine = slice(number, None, len(streams))
                                stream.copy(target[mine], source[mine], lengths[mine])

                        rate = len(offsets) * size / seconds_of(work, repeats=3) / 1e9
                        key = f"{size // 1024} KiB, {'batch' if batched else 'each'}, {lanes} stream, {direction}"
                        found[key] = round(rate, 1)
        return found

    # Correctness on random shapes

    def random_shapes(self, make, budget_s, forms=CASE_FORMS):
        """Random caches of every form against the oracle, for so long."""
        began = time.perf_counter()
        checked, faults = 0, []
        while time.perf_counter() - began < budget_s or checked < len(forms):
            form = forms[checked % len(forms)]
            dtype = CASE_DTYPES[(checked + checked // len(forms)) % len(CASE_DTYPES)]
            case = random_case(self.rng, form=form, dtype=dtype, device="cuda")
            found = round_trip_faults(case, make, self.rng, allocate=self.runtime.pinned)
            faults += [f"{form} {dtype}: {fault}" for fault in found]
            checked += 1
            if time.perf_counter() - began > 3 * budget_s:
                break
        if faults:
            raise AssertionError(f"{len(faults)} faults in {checked} caches: {faults[:5]}")
        return {"caches": checked, "faults": 0, "seconds": round(time.perf_counter() - began, 1)}

    def negative_control(self):
        """A wrong block id must be seen by the comparison."""
        case = random_case(self.rng, form="joined", device="cuda")
        layout = case.layout
        arena = HostArena(self.runtime.pinned(layout.slot_bytes), is_pinned=True)
        ids = random_ids(self.rng, layout, 1)
        wrong = ids.copy()
        wrong[-1] = np.setdiff1d(np.arange(layout.num_blocks), ids)[0]
        BatchTransfer(layout, case.tensors, arena, self.runtime).store(wrong, [[(0, layout.slot_bytes)]]).wait()
        if np.array_equal(arena.array, case.slot(ids)):
            raise AssertionError("a wrong block id went unseen")
        return {"differs": True}

    # Qwen3-8B

    def allocate(self):
        """The cache, an empty one to load into, and an arena that is registered in the background."""
        shape = (BLOCKS, BLOCK, HEADS, 2 * HEAD_DIM)

        def fresh(layer):
            raw = torch.empty(*shape, dtype=torch.bfloat16, device=self.device)
            raw.view(torch.int64).random_() if layer is not None else raw.zero_()
            return raw.permute(0, 2, 1, 3)

        self.cache = [fresh(layer) for layer in range(LAYERS)]
        self.layout = describe(
            self.cache, num_blocks=BLOCKS, block_tokens=BLOCK, chunk_tokens=CHUNK, block_dim=0, order="NHD"
        )
        self.empty = [fresh(None) for _ in range(LAYERS)]
        self.chunks = TOKENS // CHUNK
        self.nbytes = self.chunks * self.layout.slot_bytes
        self.mapping = mmap.mmap(-1, self.nbytes)
        began = time.perf_counter()
        touch(np.frombuffer(self.mapping, np.uint8))
        touched = time.perf_counter()
        self.arena = RegisteredArena(self.mapping, cuda_driver(), enter_thread=self.runtime.enter_thread)
        early = self.before_registration()
        progress = self.arena.wait()
        if progress.error:
            raise RuntimeError(progress.error)
        self.ids = self.rng.permutation(BLOCKS)[: self.chunks * self.layout.chunk_blocks]
        slot = self.layout.slot_bytes
        self.adjacent = [[(chunk * slot, slot)] for chunk in range(self.chunks)]
        pages = self.rng.permutation(self.nbytes // PAGE).reshape(self.chunks, -1)
        self.scattered = [[(int(page) * PAGE, PAGE) for page in mine] for mine in pages]
        return {
            "bytes": self.nbytes,
            "layout": self.layout.fingerprint(),
            "touch_s": round(touched - began, 2),
            "register_s": round(time.perf_counter() - touched, 2),
            **early,
        }

    def before_registration(self):
        """A store and a load through the bounce buffer, at the arena's far end, while slices are being registered."""
        slot, blocks = self.layout.slot_bytes, self.layout.chunk_blocks
        inner = BatchTransfer(self.layout, self.cache, self.arena, self.runtime)
        bounce = BounceTransfer(inner, self.arena, self.runtime)
        slots = [[(self.nbytes - (i + 1) * slot, slot)] for i in range(3)]
        ids = self.rng.permutation(BLOCKS)[: 3 * blocks]
        bounced = not self.arena.pinned(np.array([self.nbytes - slot]), np.array([slot]))
        began = time.perf_counter()
        bounce.store(ids, slots).wait()
        stored = time.perf_counter()
        target = BounceTransfer(
            BatchTransfer(self.layout, self.empty, self.arena, self.runtime), self.arena, self.runtime
        )
        target.load(slots, ids).wait()
        loaded = time.perf_counter()
        self.compare(ids)
        bounce.close()
        target.close()
        return {
            "bounced": bounced,
            "bounce_store_gbps": round(3 * slot / (stored - began) / 1e9, 2),
            "bounce_load_gbps": round(3 * slot / (loaded - stored) / 1e9, 2),
        }

    def compare(self, ids):
        """The blocks loaded into the empty cache equal those of the full one."""
        index = torch.from_numpy(np.asarray(ids)).to(self.device)
        for layer, (full, got) in enumerate(zip(self.cache, self.empty, strict=True)):
            rows = [cache.permute(0, 2, 1, 3)[index].view(torch.int64) for cache in (full, got)]
            if not torch.equal(*rows):
                raise AssertionError(f"layer {layer} differs after store and load")
        for got in self.empty:
            got.zero_()

    def whole(self, make, slots, repeats=5):
        """Store and load of 32,000 tokens: checked once, then timed."""
        source, target = make(self.cache), make(self.empty)
        for layer in self.empty:
            layer.zero_()
        np.frombuffer(self.mapping, np.uint8)[:: 64 * 1024] = 0xA5
        source.store(self.ids, slots).wait()
        target.load(slots, self.ids).wait()
        self.compare(self.ids)
        store = seconds_of(lambda: source.store(self.ids, slots).wait(), repeats=repeats)
        load = seconds_of(lambda: target.load(slots, self.ids).wait(), repeats=repeats)
        layers = self.layer_times(target, slots, self.chunks)
        result = {
            "store_gbps": round(self.nbytes / store / 1e9, 2),
            "load_gbps": round(self.nbytes / load / 1e9, 2),
            "store_ratio": round(self.nbytes / store / 1e9 / self.rates["store"], 4),
            "load_ratio": round(self.nbytes / load / 1e9 / self.rates["load"], 4),
            **layers,
        }
        source.close()
        target.close()
        return result

    def layer_times(self, target, slots, chunks):
        """Host time of a load's call, and when layers may attend, from that call on."""
        marks = (0, 1, LAYERS // 2, LAYERS - 1)
        ids = self.ids[: chunks * self.layout.chunk_blocks]
        calls, rows = [], []
        for _ in range(3):
            torch.cuda.synchronize()
            begin = torch.cuda.Event(enable_timing=True)
            begin.record()
            called = time.perf_counter()
            handle = target.load(slots[:chunks], ids)
            calls.append(time.perf_counter() - called)
            events = []
            for layer in marks:
                handle.wait_layer(layer)
                events.append(torch.cuda.Event(enable_timing=True))
                events[-1].record()
            handle.wait()
            torch.cuda.synchronize()
            rows.append([begin.elapsed_time(event) for event in events])
        times = [round(median(column), 2) for column in zip(*rows, strict=True)]
        return {"call_ms": round(median(calls) * 1e3, 2), "layer_ms": dict(zip(map(str, marks), times, strict=True))}

    def duplex(self, make):
        """A store and a load at once."""
        source, target = make(self.cache), make(self.empty)
        half = self.chunks // 2
        blocks = half * self.layout.chunk_blocks

        def work():
            handles = [
                source.store(self.ids[:blocks], self.adjacent[:half]),
                target.load(self.adjacent[half : 2 * half], self.ids[blocks : 2 * blocks]),
            ]
            for handle in handles:
                handle.wait()

        rate = 2 * half * self.layout.slot_bytes / seconds_of(work, repeats=3) / 1e9
        source.close()
        target.close()
        return {"total_gbps": round(rate, 2), "ratio": round(rate / self.rates["both_total"], 4)}

    def beside_matmul(self, make, count=30):
        """How much a loop of 8192^3 bf16 products is slowed by a transfer in either direction."""
        a, b = (torch.randn(8192, 8192, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        source, target = make(self.cache), make(self.empty)
        transfers = {
            "alone": lambda: None,
            "store": lambda: source.store(self.ids, self.adjacent),
            "load": lambda: target.load(self.adjacent, self.ids),
        }
        times = {name: [] for name in transfers}
        covered = dict.fromkeys(transfers, True)
        for turn in range(7):
            for name, transfer in transfers.items():
                torch.cuda.synchronize()
                handle = transfer()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(count):
                    torch.mm(a, b, out=out)
                end.record()
                end.synchronize()
                if handle is not None:
                    covered[name] &= not handle.done()  # the transfer must outlast the products it is timed beside
                    handle.wait()
                if turn > 1:
                    times[name].append(begin.elapsed_time(end) / count)
        source.close()
        target.close()
        alone = median(times["alone"])
        return {
            "alone_ms": round(alone, 4),
            "alone_spread_pct": round(100 * (max(times["alone"]) / min(times["alone"]) - 1), 2),
            **{f"{d}_slowdown_pct": round(100 * (median(times[d]) / alone - 1), 2) for d in ("store", "load")},
            "transfer_outlasted_products": covered["store"] and covered["load"],
        }

    def staging(self, make):
        """Device memory that building the backend takes."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        transfer = make(self.cache)
        taken = torch.cuda.memory_allocated() - before
        transfer.close()
        if taken > 256 * MIB:
            raise AssertionError(f"{taken} bytes of staging")
        return {"bytes": taken, "mib": round(taken / MIB, 1)}

    def choice(self):
        """What a server would do at start-up."""
        began = time.perf_counter()
        chosen = best_backend(self.layout, self.cache, self.arena, scratch_bytes=256 * MIB)
        took = time.perf_counter() - began
        chosen.transfer.close()
        return {"seconds": round(took, 2), **chosen.profile}


def touch(memory):
    """Fault every page in, with several threads."""
    parts = np.array_split(memory, 16)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda part: part.fill(1), parts))


def jax_random_shapes(bench, budget_s):
    """JAX on the GPU against the reference on the CPU, over the same random bytes."""
    import jax.numpy as jnp
    import ml_dtypes

    from kvkernels.jax_pallas import JaxTransfer

    forms = ("joined", "planes_nhd", "stacked", "mla", "cross_layer", "layers_outermost")
    began = time.perf_counter()
    checked = 0
    while checked < len(forms) or time.perf_counter() - began < budget_s:
        case = random_case(bench.rng, form=forms[checked % len(forms)], dtype=CASE_DTYPES[checked % len(CASE_DTYPES)])
        layout = case.layout
        name = layout.dtype
        dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
        arrays = [jnp.asarray(m.view(torch.uint8).numpy().view(dtype).reshape(m.shape)) for m in case.memory]
        chunks = layout.num_blocks // layout.chunk_blocks
        ids = random_ids(bench.rng, layout, chunks)
        slots, nbytes = random_slots(bench.rng, layout, chunks)
        wanted, got = HostArena(np.zeros(nbytes, np.uint8)), HostArena(np.zeros(nbytes, np.uint8))
        ReferenceTransfer(layout, case.tensors, wanted).store(ids, slots).wait()
        JaxTransfer(layout, arrays, got).store(ids, slots).wait()
        if not np.array_equal(wanted.array, got.array):
            raise AssertionError(f"JAX store differs from the reference: {layout.fingerprint()}")
        empty = case.emptied()
        ReferenceTransfer(layout, empty.tensors, wanted).load(slots, ids).wait()
        loaded = JaxTransfer(layout, [jnp.zeros_like(array) for array in arrays], got)
        loaded.load(slots, ids).wait()
        for mine, theirs in zip(loaded.arrays, empty.memory, strict=True):
            if np.asarray(mine).tobytes() != theirs.view(torch.uint8).numpy().tobytes():
                raise AssertionError(f"JAX load differs from the reference: {layout.fingerprint()}")
        checked += 1
        if time.perf_counter() - began > 3 * budget_s:
            break
    return {"caches": checked, "faults": 0, "seconds": round(time.perf_counter() - began, 1)}


def jax_whole(bench, tokens):
    """Store and load of Qwen3-8B's cache held by JAX."""
    import jax
    import jax.numpy as jnp

    from kvkernels.jax_pallas import JaxTransfer

    keys = jax.random.split(jax.random.key(SEED), LAYERS)
    shape = (BLOCKS, BLOCK, HEADS, 2 * HEAD_DIM)
    arrays = [jax.random.bits(key, shape, np.uint16).view(jnp.bfloat16) for key in keys]
    layout = describe(arrays, num_blocks=BLOCKS, block_tokens=BLOCK, chunk_tokens=CHUNK, block_dim=0, order="NHD")
    chunks = tokens // CHUNK
    ids, slots = bench.ids[: chunks * layout.chunk_blocks], bench.adjacent[:chunks]
    nbytes = chunks * layout.slot_bytes
    transfer = JaxTransfer(layout, arrays, bench.arena)
    store = seconds_of(lambda: transfer.store(ids, slots).wait(), repeats=2)
    load = seconds_of(lambda: transfer.load(slots, ids).wait(), repeats=2)
    return {
        "tokens": chunks * CHUNK,
        "store_gbps": round(nbytes / store / 1e9, 2),
        "load_gbps": round(nbytes / load / 1e9, 2),
        "store_ratio": round(nbytes / store / 1e9 / bench.rates["store"], 4),
        "load_ratio": round(nbytes / load / 1e9 / bench.rates["load"], 4),
    }


def triton_makers(bench):
    """Builders of the Triton backend, for random shapes and for the big cache."""
    from kvkernels.triton_gather import triton_transfer

    def small(layout, tensors, arena):
        row = max(plane.row_bytes for plane in layout.planes)
        staging = 6 * row * int(bench.rng.integers(1, 12))
        return triton_transfer(layout, tensors, arena, bench.runtime, staging_bytes=staging, copy_bytes=4 * row)

    def big(batched=True, **options):
        runtime = CudaRuntime(bench.device, batched=batched)
        return lambda cache: triton_transfer(bench.layout, cache, bench.arena, runtime, **options)

    return small, big


def versions():
    """What ran, by package."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("torch", "triton", "jax", "jaxlib", "cuda-bindings", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def run(bench, arguments):
    """Every section, the decisive ones first."""

    def batch(cache):
        return BatchTransfer(bench.layout, cache, bench.arena, bench.runtime)

    def each(layout, tensors, arena):
        return BatchTransfer(layout, tensors, arena, CudaRuntime(bench.device, batched=False))

    section = bench.section
    section("baseline", bench.baseline)
    section("negative control", bench.negative_control)
    section("qwen3-8b", bench.allocate)
    section("cuda_batch, 32000 tokens", lambda: bench.whole(batch, bench.adjacent))
    makers = []
    section("triton", lambda: makers.extend(triton_makers(bench)) or {})
    if makers:
        small, big = makers
        section("triton staging", lambda: bench.staging(big()))
        section("triton, 32000 tokens", lambda: bench.whole(big(), bench.adjacent))
        section("triton, 32000 tokens, pages of 2 MiB", lambda: bench.whole(big(), bench.scattered))
        section("triton random shapes", lambda: bench.random_shapes(small, arguments.check_seconds))
        section("triton beside a matmul", lambda: bench.beside_matmul(big()))
        section("triton, both directions", lambda: bench.duplex(big()))
        variants = (
            ("1 lane", {"lanes": 1}),
            ("copies of 1 MiB", {"copy_bytes": MIB}),
            ("copies of 8 MiB", {"copy_bytes": 8 * MIB}),
            ("a driver call a copy", {"batched": False}),
            ("a driver call a copy, 1 lane", {"batched": False, "lanes": 1}),
            ("4 programs", {"programs": 4}),
            ("16 programs", {"programs": 16}),
            ("2 buffers", {"buffers": 2}),
        )
        for name, options in variants:
            section(f"triton variant, {name}", lambda o=options: bench.whole(big(**o), bench.adjacent, repeats=3))
        section("triton variant, 4 programs, beside a matmul", lambda: bench.beside_matmul(big(programs=4)))
    section("cuda_batch beside a matmul", lambda: bench.beside_matmul(batch))
    section(
        "cuda_batch random shapes",
        lambda: bench.random_shapes(lambda *given: BatchTransfer(*given, bench.runtime), arguments.check_seconds / 3),
    )
    section("a call a copy, random shapes", lambda: bench.random_shapes(each, arguments.check_seconds / 6))
    section("reference random shapes", lambda: bench.random_shapes(ReferenceTransfer, arguments.check_seconds / 6))
    section("choice at start-up", bench.choice)
    section("jax random shapes", lambda: jax_random_shapes(bench, arguments.check_seconds))
    section("jax, 8192 tokens", lambda: jax_whole(bench, 8192))
    section("copy sizes", bench.copies)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--check-seconds", type=float, default=12, help="time for each backend's random shapes")
    parser.add_argument("--deadline", type=float, default=165, help="start no section after so many seconds")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    bench = Bench(arguments.deadline, arguments.out)
    run(bench, arguments)
    summary(bench.write())
    sys.exit(1 if bench.failures else 0)


def summary(report):
    """The end of the output: what the targets are about."""
    say("written; summary:")
    for name, result in report["results"].items():
        if isinstance(result, dict) and "store_ratio" in result:
            print(
                f"{name:50s} store {result['store_ratio']:.3f} load {result['load_ratio']:.3f}", result.get("layer_ms")
            )
        elif isinstance(result, dict) and "store_slowdown_pct" in result:
            print(f"{name:50s}", {k: v for k, v in result.items() if k != "alone_ms"})
        elif isinstance(result, dict) and "faults" in result:
            print(f"{name:50s} {result['caches']} caches, {result['faults']} faults")
    print("failures:", {name: text.strip().splitlines()[-1] for name, text in report["failures"].items()} or "none")


if __name__ == "__main__":
    main()
