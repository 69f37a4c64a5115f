"""Qwen3-8B's cache, an arena for it, and what is checked and timed of a backend between them: for kernels_h100.py."""

import datetime as dt
import importlib.metadata
import json
import mmap
import platform
import shlex
import sys
import time
import traceback
from statistics import median

import numpy as np
import torch
from kernels_h100_beside import touch

from kvkernels import HostArena, describe
from kvkernels.cases import CASE_DTYPES, CASE_FORMS, random_case, random_ids, round_trip_faults
from kvkernels.choose import best_backend
from kvkernels.cuda_batch import BatchTransfer
from kvkernels.cuda_driver import cuda_driver
from kvkernels.cuda_streams import CudaRuntime
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


def versions():
    """What ran, by package."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("torch", "triton", "jax", "jaxlib", "cuda-bindings", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


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
        self.host, self.other = (torch.empty(GIB, dtype=torch.uint8, pin_memory=True) for _ in range(2))
        self.near, self.far = (torch.empty(GIB, dtype=torch.uint8, device=self.device).random_() for _ in range(2))

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
            "batched_driver_call": cuda_driver().batch is not None,
            "seconds": round(time.perf_counter() - started, 1),
            "results": self.results,
            "failures": self.failures,
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(report, indent=2) + "\n")
        return report

    # Baseline

    def pinned_copy(self, repeats=3):
        """Rates of the pinned 1 GiB copy, as they are at this moment."""
        return {
            "store": GIB / seconds_of(lambda: self.host.copy_(self.near, non_blocking=True), repeats=repeats) / 1e9,
            "load": GIB / seconds_of(lambda: self.near.copy_(self.host, non_blocking=True), repeats=repeats) / 1e9,
        }

    def baseline(self):
        """The pinned 1 GiB copy, both directions, and both at once."""
        side = torch.cuda.Stream()

        def both():
            self.near.copy_(self.host, non_blocking=True)
            with torch.cuda.stream(side):
                self.other.copy_(self.far, non_blocking=True)

        self.rates = {**self.pinned_copy(9), "both_total": 2 * GIB / seconds_of(both) / 1e9}
        return {name: round(rate, 2) for name, rate in self.rates.items()}

    def copies(self):
        """Copies of one size out of a pinned GiB, by driver call and number of streams."""
        host, near = self.host, self.near
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
        early = self.bounced(self.batch, self.arena, chunks=6, far_end=True)
        progress = self.arena.wait()
        if progress.error:
            raise RuntimeError(progress.error)
        registered = time.perf_counter()
        self.ids = self.rng.permutation(BLOCKS)[: self.chunks * self.layout.chunk_blocks]
        slot = self.layout.slot_bytes
        self.adjacent = [[(chunk * slot, slot)] for chunk in range(self.chunks)]
        pages = self.rng.permutation(self.nbytes // PAGE).reshape(self.chunks, -1)
        self.scattered = [[(int(page) * PAGE, PAGE) for page in mine] for mine in pages]
        return {
            "bytes": self.nbytes,
            "layout": self.layout.fingerprint(),
            "touch_s": round(touched - began, 2),
            "register_s": round(registered - touched, 2),
            "while_registering": early,
        }

    def batch(self, cache):
        """The backend without kernels."""
        return BatchTransfer(self.layout, cache, self.arena, self.runtime)

    def bounced(self, make, arena, *, chunks, far_end):
        """A store and a load through the bounce buffer, of slots that are not pinned."""
        slot, blocks = self.layout.slot_bytes, self.layout.chunk_blocks
        source, target = (
            BounceTransfer(make(cache).over(arena), arena, self.runtime) for cache in (self.cache, self.empty)
        )
        first = self.nbytes - chunks * slot if far_end else 0
        slots = [[(first + i * slot, slot)] for i in range(chunks)]
        ids = self.rng.permutation(BLOCKS)[: chunks * blocks]
        bounced = not arena.pinned(np.array([first]), np.array([slot]))
        began = time.perf_counter()
        source.store(ids, slots).wait()
        stored = time.perf_counter()
        target.load(slots, ids).wait()
        loaded = time.perf_counter()
        self.compare(ids)
        source.close()
        target.close()
        return {
            "bounced": bounced,
            "store_gbps": round(chunks * slot / (stored - began) / 1e9, 2),
            "load_gbps": round(chunks * slot / (loaded - stored) / 1e9, 2),
        }

    def bounce_rate(self, make):
        """The bounce path over memory that is never registered, with nothing registered beside it."""
        never = HostArena(self.mapping)
        rates = [self.bounced(make, never, chunks=32, far_end=False) for _ in range(3)]
        if not all(one["bounced"] for one in rates):
            raise AssertionError("the arena counts as pinned")
        return {way: round(median(one[way] for one in rates), 2) for way in ("store_gbps", "load_gbps")}

    def compare(self, ids):
        """The blocks loaded into the empty cache equal those of the full one."""
        index = torch.from_numpy(np.asarray(ids)).to(self.device)
        for layer, (full, got) in enumerate(zip(self.cache, self.empty, strict=True)):
            rows = [cache.permute(0, 2, 1, 3)[index].view(torch.int64) for cache in (full, got)]
            if not torch.equal(*rows):
                raise AssertionError(f"layer {layer} differs after store and load")
        for got in self.empty:
            got.zero_()

    def whole(self, make, slots, repeats=5, tokens=TOKENS):
        """Store and load of a prompt: checked once, then timed."""
        chunks = tokens // CHUNK
        slots, ids = slots[:chunks], self.ids[: chunks * self.layout.chunk_blocks]
        nbytes = chunks * self.layout.slot_bytes
        source, target = make(self.cache), make(self.empty)
        for layer in self.empty:
            layer.zero_()
        np.frombuffer(self.mapping, np.uint8)[:: 64 * 1024] = 0xA5
        source.store(ids, slots).wait()
        target.load(slots, ids).wait()
        self.compare(ids)
        before = self.pinned_copy()
        store = seconds_of(lambda: source.store(ids, slots).wait(), repeats=repeats)
        load = seconds_of(lambda: target.load(slots, ids).wait(), repeats=repeats)
        after = self.pinned_copy()
        limit = {way: (before[way] + after[way]) / 2 for way in before}
        result = {
            "store_gbps": round(nbytes / store / 1e9, 2),
            "load_gbps": round(nbytes / load / 1e9, 2),
            "store_ratio": round(nbytes / store / 1e9 / limit["store"], 4),
            "load_ratio": round(nbytes / load / 1e9 / limit["load"], 4),
            "pinned_gbps": {way: round(rate, 2) for way, rate in limit.items()},
            "store_ms": self.store_times(source, slots, ids),
            "load_ms": self.load_times(target, slots, ids),
        }
        source.close()
        target.close()
        return result

    def load_times(self, target, slots, ids):
        """A load's call, when its last copy was handed over (both host time), and when layers may attend.

        What waits for a layer is a kernel, as attention is: an event by itself is told by whichever of the GPU's
        engines the stream used last, and after a copy that is the one which all layers still go through.
        """
        marks = {"layer 0": 0, "layer 1": 1, "layer 18": LAYERS // 2, "layer 35": LAYERS - 1}
        attention = torch.zeros(1, device=self.device)

        def once():
            began, begin = time.perf_counter(), torch.cuda.Event(enable_timing=True)
            begin.record()
            handle = target.load(slots, ids)
            called = time.perf_counter() - began
            events = []
            for layer in marks.values():
                handle.wait_layer(layer)
                attention.add_(1)
                events.append(torch.cuda.Event(enable_timing=True))
                events[-1].record()
            handed = time.perf_counter() - began
            handle.wait()
            torch.cuda.synchronize()
            return [called * 1e3, handed * 1e3, *(begin.elapsed_time(event) for event in events)]

        return self.medians(once, ("call", "handed over", *marks))

    def store_times(self, source, slots, ids):
        """A store's call, when its last copy was handed over, when its blocks were read, and its end."""

        def once():
            began, begin = time.perf_counter(), torch.cuda.Event(enable_timing=True)
            begin.record()
            handle = source.store(ids, slots)
            called = time.perf_counter() - began
            handle.wait_sources()
            handed = time.perf_counter() - began
            read = torch.cuda.Event(enable_timing=True)
            read.record()
            handle.wait()
            ended = time.perf_counter() - began
            torch.cuda.synchronize()
            return [called * 1e3, handed * 1e3, begin.elapsed_time(read), ended * 1e3]

        return self.medians(once, ("call", "handed over", "sources read", "end"))

    @staticmethod
    def medians(once, names):
        rows = []
        for _ in range(5):
            torch.cuda.synchronize()
            rows.append(once())
        columns = zip(*rows[1:], strict=True)
        return dict(zip(names, (round(median(column), 2) for column in columns), strict=True))

    def overwritten(self, make):
        """Blocks are zeroed behind `wait_sources` while the store still runs; without it the stored bytes differ."""
        originals = [layer.clone() for layer in self.cache]
        source, target = make(self.cache), make(self.empty)
        found = {}
        for ordered in (True, False):
            for layer, original in zip(self.cache, originals, strict=True):
                layer.copy_(original)
            torch.cuda.synchronize()
            handle = source.store(self.ids, self.scattered)
            if ordered:
                handle.wait_sources()
            for layer in self.cache:
                layer.zero_()
            torch.cuda.current_stream().synchronize()
            found["done_early" if ordered else "unordered_done_early"] = handle.done()
            handle.wait()
            for layer, original in zip(self.cache, originals, strict=True):
                layer.copy_(original)
            target.load(self.scattered, self.ids).wait()
            try:
                self.compare(self.ids)
                found["equal" if ordered else "unordered_equal"] = True
            except AssertionError:
                found["equal" if ordered else "unordered_equal"] = False
        source.close()
        target.close()
        if not found["equal"] or found["unordered_equal"]:
            raise AssertionError(f"wait_sources: {found}")
        return found

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
        before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        chosen = best_backend(self.layout, self.cache, self.arena, scratch_bytes=256 * MIB)
        took = time.perf_counter() - began
        taken = torch.cuda.memory_allocated() - before
        chosen.transfer.close()
        if taken > 256 * MIB:
            raise AssertionError(f"{taken} bytes of device memory")
        return {"seconds": round(took, 2), "device_mib": round(taken / MIB, 1), **chosen.profile}

    def choice_while_registering(self):
        """The same beside an arena that is still being registered: the figures must not be those of the stall."""
        mapping = mmap.mmap(-1, 4 * GIB)
        touch(np.frombuffer(mapping, np.uint8))
        arena = RegisteredArena(mapping, cuda_driver(), enter_thread=self.runtime.enter_thread)
        began = time.perf_counter()
        chosen = best_backend(self.layout, self.cache, arena, scratch_bytes=256 * MIB)
        took = time.perf_counter() - began
        meanwhile = arena.progress().pinned_bytes
        arena.wait()
        chosen.transfer.close()
        arena.close()
        return {"seconds": round(took, 2), "pinned_bytes_at_the_end": meanwhile, **chosen.profile}
