"""Hit ratios for every chunk size, capacity and policy."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np

from kvcore.policy.eviction import OFFLINE, POLICIES
from kvsim.sweep.chains import Chains, chains_of_sizes
from kvsim.sweep.paths import Ints, Longs, Paths
from kvtraces import Log

Capacities = Sequence[int | None]
"""Chunks that fit in the cache; None is a cache without bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What one setting gives over a whole log, from an empty cache on."""

    policy: str
    chunk_tokens: int
    capacity_chunks: int | None
    requests: int
    chunk_accesses: int
    hit_chunks: int
    hit_tokens: int
    input_tokens: int
    token_hit_ratio: float


def sweep(
    log: Log,
    *,
    chunk_tokens: Iterable[int],
    capacities: Capacities | Mapping[int, Capacities],
    policies: Iterable[str],
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[Point]:
    """Return the point of every setting: by chunk size, then policy, then capacity, in the order given.

    `capacities` are the same for all chunk sizes, or given by chunk size; a size or policy given twice counts once.
    `progress` is called with the number of settings done and of all settings. Raises ValueError for an unknown policy,
    a negative capacity, and as `chains`.
    """
    wanted = dict.fromkeys(chunk_tokens)
    names = list(policies)
    if isinstance(capacities, Mapping):
        capacities = {size: capacities[size] for size in wanted}
    _check(names, capacities)
    return sweep_chains(
        chains_of_sizes(log, wanted), capacities=capacities, policies=names, threads=threads, progress=progress
    )


def sweep_chains(
    chains: Mapping[int, Chains],
    *,
    capacities: Capacities | Mapping[int, Capacities],
    policies: Iterable[str],
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[Point]:
    """Do as `sweep` with the chains of every chunk size, which `chains_of_sizes` gives."""
    names = list(dict.fromkeys(policies))
    wanted = {size: capacities[size] if isinstance(capacities, Mapping) else capacities for size in chains}
    _check(names, wanted)
    totals = _run(_jobs(chains, wanted, names), threads, progress)
    return [
        _point(chains[size], name, capacity, totals[size, name, capacity])
        for size in chains
        for name in names
        for capacity in wanted[size]
    ]


def hit_chunks(chains: Chains, policy: str, capacity_chunks: int | None) -> Ints:
    """Return [requests] the hits of each request: its leading chunks that are resident when it comes.

    Raises ValueError for an unknown policy and a negative capacity.
    """
    _check([policy], [capacity_chunks])
    from kvsim.sweep import kernels  # noqa: PLC0415 - loads numba

    paths = chains.paths
    found = np.zeros(chains.requests, np.int32)
    found[paths.rows] = kernels.hits_of_requests(paths, policy, _bound(paths, capacity_chunks))
    return found


def lru_curve(chains: Chains) -> Longs:
    """Return [unique + 1] the hits of all requests together under LRU, by the chunks that fit in the cache.

    Raises ValueError where the log is no tree: LRU then has no stack distances that hold for all capacities.
    """
    from kvsim.sweep import kernels  # noqa: PLC0415 - loads numba

    if not chains.paths.is_tree:
        raise ValueError("a block of the log follows different blocks: no single pass gives LRU's hits")
    return kernels.lru_curve(chains.paths)


def point(chains: Chains, policy: str, capacity_chunks: int | None) -> Point:
    """Return the point of one setting. Raises as `hit_chunks`."""
    return _point(chains, policy, capacity_chunks, int(hit_chunks(chains, policy, capacity_chunks).sum()))


def _point(chains: Chains, policy: str, capacity_chunks: int | None, hits: int) -> Point:
    hit_tokens = hits * chains.chunk_tokens
    return Point(
        policy=policy,
        chunk_tokens=chains.chunk_tokens,
        capacity_chunks=capacity_chunks,
        requests=chains.requests,
        chunk_accesses=chains.accesses,
        hit_chunks=hits,
        hit_tokens=hit_tokens,
        input_tokens=chains.input_tokens,
        token_hit_ratio=hit_tokens / chains.input_tokens if chains.input_tokens else 0.0,
    )


_Setting = tuple[int, str, int | None]


@dataclass(frozen=True, slots=True)
class _Job:
    """One policy at one chunk size, at the capacities that one call of a kernel serves."""

    chains: Chains
    policy: str
    capacities: Capacities


def _jobs(chains: Mapping[int, Chains], wanted: Mapping[int, Capacities], policies: Sequence[str]) -> list[_Job]:
    """Return what is to be computed, the longest first so that the threads end together."""
    jobs: list[_Job] = []
    for size, each in chains.items():
        for policy in policies:
            if policy == "lru":
                jobs.append(_Job(each, policy, wanted[size]))
            else:
                jobs += [_Job(each, policy, [capacity]) for capacity in dict.fromkeys(wanted[size])]
    jobs.sort(key=lambda job: -job.chains.accesses)
    return jobs


def _run(jobs: Sequence[_Job], threads: int, progress: Callable[[int, int], None] | None) -> dict[_Setting, int]:
    """Return the hits of every setting of `jobs`."""
    totals: dict[_Setting, int] = {}
    settings = sum(len(set(job.capacities)) for job in jobs)
    with ThreadPoolExecutor(threads, "kvsim-sweep") as pool:
        futures = [pool.submit(_total_hits, job) for job in jobs]
        try:
            for future in as_completed(futures):
                totals |= future.result()
                if progress is not None:
                    progress(len(totals), settings)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return totals


def _total_hits(job: _Job) -> dict[_Setting, int]:
    """Return the hits of all requests together in every setting of `job`."""
    from kvsim.sweep import kernels  # noqa: PLC0415 - loads numba

    size, paths = job.chains.chunk_tokens, job.chains.paths
    bounds = sorted({_bound(paths, capacity) for capacity in job.capacities})
    if job.policy == "lru":
        hits = kernels.lru_hits(paths, np.array(bounds, np.int64)).tolist()
    else:
        hits = [int(kernels.hits_of_requests(paths, job.policy, bound).sum()) for bound in bounds]
    found = dict(zip(bounds, hits, strict=True))
    return {(size, job.policy, capacity): found[_bound(paths, capacity)] for capacity in job.capacities}


def _bound(paths: Paths, capacity: int | None) -> int:
    """Return the capacity that gives the same hits and is no more than what never evicts."""
    return paths.unique if capacity is None else min(capacity, paths.unique)


def _check(policies: Iterable[str], capacities: Capacities | Mapping[int, Capacities]) -> None:
    """Raise ValueError for an unknown policy and a negative capacity."""
    known = (*POLICIES, *OFFLINE)
    for policy in policies:
        if policy not in known:
            raise ValueError(f"unknown policy {policy!r}; known are {', '.join(known)}")
    for each in capacities.values() if isinstance(capacities, Mapping) else [capacities]:
        for capacity in each:
            if capacity is not None and capacity < 0:
                raise ValueError(f"a cache cannot hold {capacity} chunks")
