"""What runs beside transfers and registration in an engine: products, launches, graph capture. For kernels_h100.py."""

import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import mean, median, stdev

import numpy as np
import torch

from kvkernels.cuda_driver import cuda_driver
from kvkernels.registered import RegisteredArena

MIB, GIB = 1 << 20, 1 << 30
_REST_S = 0.05
_LEAD = 8
"""Products before the timed ones: while they run, the host launches what is timed."""


def touch(memory):
    """Fault every page in, with several threads."""
    parts = np.array_split(memory, 16)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda part: part.fill(1), parts))


def beside_matmul(bench, make, *, slots=None, rounds=40, products=40, transfers=1):
    """How much 8192^3 bf16 products are slowed by transfers in either direction.

    The products of a round are enqueued right after `transfers` transfers and must end before the last of these
    (`transfer_outlasted_products`), so every product runs beside one. A round is two lone runs, a store and a load, in
    any order; each is compared with the mean of its own round's lone runs, since clocks drift. They drift by 4% within
    seconds, so there are many short rounds, and the standard error of their mean says what they can tell. Before every
    run the GPU rests for as long: one that comes right after another begins at the clocks to which that one's power
    had brought it down. The products are one graph, behind a few that are not timed, or what is timed would be how
    their launches share the host with the thread that hands a store over.
    """
    a, b = (torch.randn(8192, 8192, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    source, target = make(bench.cache), make(bench.empty)
    slots = bench.adjacent if slots is None else slots
    begin_transfer = {
        "alone": lambda: None,
        "store": lambda: source.store(bench.ids, slots),
        "load": lambda: target.load(slots, bench.ids),
        "alone again": lambda: None,
    }
    outlasted = []
    torch.mm(a, b, out=out)

    def graph_of(count):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                torch.mm(a, b, out=out)
        return graph

    lead, timed_graph = graph_of(_LEAD), graph_of(products)

    def timed(name):
        torch.cuda.synchronize()
        time.sleep(_REST_S)
        handles = [begin_transfer[name]() for _ in range(transfers)]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        lead.replay()
        begin.record()
        timed_graph.replay()
        end.record()
        end.synchronize()
        if handles[0] is not None:
            outlasted.append(not handles[-1].done())
            for handle in handles:
                handle.wait()
        return begin.elapsed_time(end) / products

    warm = time.perf_counter()
    while time.perf_counter() - warm < 1.5:  # until clocks and power have settled
        timed("alone")
    for name in begin_transfer:
        timed(name)
    outlasted.clear()
    rows = [{name: timed(name) for name in bench.rng.permutation(list(begin_transfer))} for _ in range(rounds)]
    source.close()
    target.close()
    alone = [(row["alone"] + row["alone again"]) / 2 for row in rows]
    slowdown = {
        way: [100 * (row[way] / base - 1) for row, base in zip(rows, alone, strict=True)] for way in ("store", "load")
    }
    noise = [100 * abs(row["alone"] / row["alone again"] - 1) for row in rows]
    return {
        "alone_ms": round(median(alone), 4),
        "alone_noise_pct": round(median(noise), 2),
        "store_slowdown_pct": round(median(slowdown["store"]), 2),
        "load_slowdown_pct": round(median(slowdown["load"]), 2),
        "standard_error_pct": {way: round(stdev(all_) / len(all_) ** 0.5, 2) for way, all_ in slowdown.items()},
        "slowdown_mean_pct": {way: round(mean(all_), 2) for way, all_ in slowdown.items()},
        "slowdown_range_pct": {way: [round(min(all_), 2), round(max(all_), 2)] for way, all_ in slowdown.items()},
        "transfer_outlasted_products": all(outlasted),
        "rounds": rounds,
        "products": products,
    }


class Launches:
    """Small kernels one after another, as an eager decoder launches them, and how long the host needs for each."""

    def __init__(self, device):
        self._value = torch.zeros(1024, device=device)

    def run(self, going):
        """Microseconds of every launch while `going()`; the stream is drained now and then, as by an engine's step."""
        times = []
        while going():
            for _ in range(100):
                began = time.perf_counter_ns()
                self._value.add_(1)
                times.append((time.perf_counter_ns() - began) / 1e3)
            torch.cuda.current_stream().synchronize()
        return times

    def for_seconds(self, seconds):
        """As `run`, for so long."""
        until = time.perf_counter() + seconds
        return self.run(lambda: time.perf_counter() < until)


def spread(times):
    """Median, 99th and 99.9th percentile and the worst, in microseconds, and how much of the time stalls took."""
    ordered = np.sort(times)
    stalled = float(ordered[ordered > 200].sum() / ordered.sum())
    at = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
    found = {name: round(float(ordered[int(share * (len(ordered) - 1))]), 1) for name, share in at.items()}
    return {**found, "max": round(float(ordered[-1]), 1), "count": len(ordered), "share_over_200us": round(stalled, 3)}


def launches_beside_transfer(bench, make):
    """Launches of the engine's thread while a load, or a store, of 32,000 tokens is handed over and runs."""
    launches = Launches(bench.device)
    source, target = make(bench.cache), make(bench.empty)
    ways = {
        "load": lambda: target.load(bench.scattered, bench.ids),
        "store": lambda: source.store(bench.ids, bench.scattered),
    }
    found = {"alone": spread(launches.for_seconds(0.4))}
    for way, begin in ways.items():
        times, seconds = [], []
        begin().wait()
        for _ in range(4):
            torch.cuda.synchronize()
            began = time.perf_counter()
            handle = begin()
            times += launches.run(lambda handle=handle: not handle.done())
            seconds.append(time.perf_counter() - began)
            handle.wait()
        found[way] = {**spread(times), "transfer_ms": round(median(seconds) * 1e3, 1)}
    source.close()
    target.close()
    return {"launch_us": found}


def small_copies_beside(bench, make, slots, *, copies=10):
    """An engine's own small copies, each with a kernel behind it, alone and while 32,000 tokens are copied likewise.

    A step's input goes to the GPU by such copies and its tokens come back by one: behind a whole load or store, a step
    would begin or end that much later.

    Returns:
        Milliseconds until the last of them is over, by direction; and of the transfers, which go on behind them.
    """
    source, target = make(bench.cache), make(bench.empty)
    host, device = (
        torch.zeros(4096, dtype=torch.int32).pin_memory(),
        torch.zeros(4096, dtype=torch.int32, device="cuda"),
    )
    ways = {
        "store": (lambda: source.store(bench.ids, slots), host, device),
        "load": (lambda: target.load(slots, bench.ids), device, host),
    }

    def once(way, beside):
        begin, to, origin = ways[way]
        torch.cuda.synchronize()
        handle = begin() if beside else None
        began = time.perf_counter()
        for _ in range(copies):
            to.copy_(origin, non_blocking=True)
            device.add_(0)
        torch.cuda.current_stream().synchronize()
        copied = time.perf_counter() - began
        if handle is not None:
            handle.wait()
        return copied * 1e3, (time.perf_counter() - began) * 1e3

    found = {}
    for way in ways:
        alone = median(once(way, beside=False)[0] for _ in range(8))
        copied, ended = zip(*(once(way, beside=True) for _ in range(8)), strict=True)
        found[way] = {
            "alone_ms": round(alone, 2),
            "beside_ms": round(median(copied), 2),
            "longest_ms": round(max(copied), 2),
            "transfer_ms": round(median(ended), 1),
        }
    source.close()
    target.close()
    return {"small_copies": found}


def launches_beside_registration(runtime, nbytes=2 * GIB):
    """Launches while memory is registered, by slice size and rest; pages are touched first, as the server does."""
    launches = Launches(runtime.device)
    mapping = mmap.mmap(-1, nbytes)
    touch(np.frombuffer(mapping, np.uint8))
    found = {"alone": spread(launches.for_seconds(0.3))}
    for slice_mib, rest in ((256, 0.0), (64, 0.0), (64, 1.0), (32, 1.0), (16, 1.0), (16, 3.0), (4, 1.0)):
        began = time.perf_counter()
        arena = RegisteredArena(
            mapping, cuda_driver(), enter_thread=runtime.enter_thread, slice_bytes=slice_mib * MIB, rest=rest
        )
        times = launches.run(lambda arena=arena, began=began: pending(arena) and time.perf_counter() - began < 3)
        took = time.perf_counter() - began
        progress = arena.wait()
        if progress.error:
            raise RuntimeError(progress.error)
        arena.close()
        found[f"{slice_mib} MiB, rest {rest:g}"] = {**spread(times), "register_s": round(took, 2)}
    return found


def pending(arena):
    """Whether registration goes on."""
    progress = arena.progress()
    return progress.pinned_bytes < progress.total_bytes and progress.error is None


def capture_beside_registration(runtime):
    """A graph is captured in the default mode, and replayed, while another thread registers memory."""
    mapping = mmap.mmap(-1, 512 * MIB)
    touch(np.frombuffer(mapping, np.uint8))
    value = torch.zeros(1, device=runtime.device)
    value += 1
    value.zero_()
    arena = RegisteredArena(mapping, cuda_driver(), enter_thread=runtime.enter_thread, slice_bytes=2 * MIB, rest=10)
    graph = torch.cuda.CUDAGraph()
    steps, most = 0, 100_000
    with torch.cuda.graph(graph):
        before = arena.progress().pinned_bytes
        while steps < 3000 or (arena.progress().pinned_bytes == before and steps < most):
            value += 1
            steps += 1
        after = arena.progress().pinned_bytes
    graph.replay()
    torch.cuda.synchronize()
    progress = arena.wait()
    arena.close()
    if progress.error or value.item() != steps:
        raise AssertionError(f"captured beside registration: {value.item()}, {progress.error}")
    if after == before:
        raise AssertionError("nothing was registered during the capture, so nothing was shown")
    return {"registered_during_capture_mib": (after - before) // MIB}
