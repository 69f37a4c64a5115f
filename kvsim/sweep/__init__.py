"""The exact sweep: hit ratios of a log for every chunk size, capacity and policy, by compiled code.

Requests take no time here, so a figure depends on their order alone. Importing this compiles nothing and loads no
numba; the first sweep does.
"""

from kvsim.sweep.chains import Chains, chains
from kvsim.sweep.points import Point, hit_chunks, lru_curve, point, sweep

__all__ = ["Chains", "Point", "chains", "hit_chunks", "lru_curve", "point", "sweep"]
