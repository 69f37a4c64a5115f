"""Prompts as runs of blocks: a path-compressed tree of the log's prefixes, made once.

The engine's cache would otherwise be looked through block by block. A node is a longest run of blocks that occur
together in every prompt that has the first of them, and that no prompt ends inside.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kvtraces import Log


@dataclass(frozen=True, slots=True, eq=False)
class Prefixes:
    """The prompts' nodes.

    Attributes:
        paths: For each request, its nodes' numbers, head first.
        lengths: For each node, its length in the log's blocks.
    """

    paths: list[tuple[int, ...]]
    lengths: list[int]


def prefixes(log: Log) -> Prefixes:
    """Return the prompts of a log as paths of nodes; one of lengths alone has empty paths."""
    total = len(log.blocks)
    if log.block_tokens is None or not total:
        return Prefixes([()] * len(log), [])
    begins, ends = log.starts[:-1], log.starts[1:]
    filled = begins < ends
    _, ids = np.unique(log.blocks, return_inverse=True)
    before = np.concatenate(([-1], ids[:-1]))
    before[begins[filled]] = -1
    count = int(ids.max()) + 1
    parent = np.empty(count, dtype=np.int64)
    parent[ids[::-1]] = before[::-1]
    opens = _opening(ids, before, parent, ids[ends[filled] - 1])
    firsts = np.flatnonzero(opens[ids])
    lengths = np.diff(np.concatenate((firsts, [total])))
    _, where, nodes = np.unique(ids[firsts], return_index=True, return_inverse=True)
    cuts = np.searchsorted(firsts, log.starts).tolist()
    path = nodes.tolist()
    return Prefixes([tuple(path[a:b]) for a, b in pairwise(cuts)], lengths[where].tolist())


def _opening(
    ids: np.ndarray[tuple[int], np.dtype[np.int64]],
    before: np.ndarray[tuple[int], np.dtype[np.int64]],
    parent: np.ndarray[tuple[int], np.dtype[np.int64]],
    last: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which blocks begin a node: those behind a fork, behind a prompt's end, or at a prompt's head.

    A block that follows different blocks in different prompts (names that are no chain) begins one too.
    """
    strays = before != parent[ids]
    children = np.bincount(parent[parent >= 0], minlength=len(parent))
    forks = children > 1
    forks[before[strays & (before >= 0)]] = True
    forks[last] = True
    opens = (parent < 0) | forks[parent]
    opens[ids[strays]] = True
    return np.asarray(opens)
