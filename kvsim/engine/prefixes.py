"""Prompts as runs of blocks: a path-compressed tree of the log's prefixes, made once.

The engine's cache would otherwise be looked through block by block. A node is a longest run of blocks that occur
together in every prompt that has the first of them, and that no prompt ends inside.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtraces import Log

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Prefixes:
    """The prompts' nodes.

    Attributes:
        paths: For each request, the numbers of its prompt's nodes, head first.
        outputs: For each request, the nodes that follow once its output is appended; empty where that is not recorded.
        lengths: For each node, its length in the log's blocks.
    """

    paths: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]
    lengths: list[int]


def prefixes(log: Log) -> Prefixes:
    """Return the prompts of a log as paths of nodes; one of lengths alone has empty paths."""
    starts, middles, blocks = _chains(log)
    if log.block_tokens is None or not len(blocks):
        return Prefixes([()] * len(log), [()] * len(log), [])
    begins, ends = starts[:-1], starts[1:]
    _, ids = np.unique(blocks, return_inverse=True)
    before = np.concatenate(([-1], ids[:-1]))
    before[begins[begins < ends]] = -1
    count = int(ids.max()) + 1
    parent = np.empty(count, dtype=np.int64)
    parent[ids[::-1]] = before[::-1]
    last = np.concatenate((ids[middles[begins < middles] - 1], ids[ends[begins < ends] - 1]))
    firsts = np.flatnonzero(_opening(ids, before, parent, last)[ids])
    lengths = np.diff(np.concatenate((firsts, [len(blocks)])))
    _, where, nodes = np.unique(ids[firsts], return_index=True, return_inverse=True)
    path = nodes.tolist()
    cuts, turns = np.searchsorted(firsts, starts).tolist(), np.searchsorted(firsts, middles).tolist()
    return Prefixes(
        [tuple(path[a:b]) for a, b in zip(cuts[:-1], turns, strict=True)],
        [tuple(path[a:b]) for a, b in zip(turns, cuts[1:], strict=True)],
        lengths[where].tolist(),
    )


def _chains(log: Log) -> tuple[IntArray, IntArray, IntArray]:
    """Return each request's blocks, prompt and output: where they start, where the output's start, and their names."""
    if log.output_starts is None or log.output_blocks is None:
        return log.starts, log.starts[1:], log.blocks
    prompts, outputs = np.diff(log.starts), np.diff(log.output_starts)
    starts = np.concatenate(([0], np.cumsum(prompts + outputs)))
    middles = starts[:-1] + prompts
    names = np.empty(starts[-1], dtype=np.int64)
    names[np.arange(len(log.blocks)) + np.repeat(starts[:-1] - log.starts[:-1], prompts)] = log.blocks
    names[np.arange(len(log.output_blocks)) + np.repeat(middles - log.output_starts[:-1], outputs)] = log.output_blocks
    return starts, middles, names


def _opening(
    ids: IntArray,
    before: IntArray,
    parent: IntArray,
    last: IntArray,
) -> NDArray[np.bool_]:
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
