"""The exact sweep: hit ratios of a log for every chunk size, capacity and policy, by compiled code.

Requests take no time here, so a figure depends on their order alone. Importing this compiles nothing and loads no
numba; the first sweep does.
"""

from kvsim.sweep.chains import Chains, chains, chains_of_sizes
from kvsim.sweep.points import Point, hit_chunks, lru_curve, point, sweep, sweep_chains

__all__ = [
    "Chains",
    "Point",
    "chains",
    "chains_of_sizes",
    "hit_chunks",
    "lru_curve",
    "point",
    "sweep",
    "sweep_chains",
]
