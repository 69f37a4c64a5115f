"""The kernel of every policy. Importing this imports numba."""

from collections.abc import Callable
from typing import Final

import numpy as np

from kvsim.sweep import arc, belady, fifo, gdsf, lfu, lru, lru_any, s3fifo, sieve, wtinylfu
from kvsim.sweep.paths import Ints, Longs, Paths

_HITS: Final[dict[str, Callable[[Paths, int], Ints]]] = {
    "lru": lru_any.hits,
    "fifo": fifo.hits,
    "lfu": lfu.hits,
    "sieve": sieve.hits,
    "s3fifo": s3fifo.hits,
    "arc": arc.hits,
    "gdsf": gdsf.hits,
    "w-tinylfu": wtinylfu.hits,
    "belady": belady.hits,
}


def hits_of_requests(paths: Paths, policy: str, capacity: int) -> Ints:
    """Return the hits of every request of `paths` in a cache of `capacity` chunks, no more than there are."""
    if capacity == paths.unique:
        policy = "belady"  # what never evicts hits alike under all policies, and this is the fastest
    if policy == "lru" and paths.is_tree:
        return lru.hits_of_requests(lru.runs(paths), len(paths.rows), capacity)
    return _HITS[policy](paths, capacity)


def lru_hits(paths: Paths, capacities: Longs) -> Longs:
    """Return the hits of all requests together under LRU in a cache of each of `capacities`, which ascend."""
    if paths.is_tree:
        return lru.hits_of_capacities(lru.runs(paths), capacities)
    return np.array([lru_any.hits(paths, capacity).sum() for capacity in capacities.tolist()], np.int64)


def lru_curve(paths: Paths) -> Longs:
    """Return [unique + 1] the hits of all requests together under LRU in a cache of every capacity from 0 up."""
    return lru.hits_of_all_capacities(lru.runs(paths), paths.unique)
