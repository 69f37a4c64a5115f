"""From the blocks of a log to the paths of its requests, for chunks of several sizes."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvsim.sweep import tree
from kvsim.sweep.jit import drop_stale_code
from kvsim.sweep.paths import Ints, Longs, Paths
from kvtraces import Log


def paths_of_strides(log: Log, strides: Sequence[int]) -> dict[int, Paths]:
    """Return the paths for chunks of each of `strides` blocks.

    The nodes are found once, for the largest chunks of which all are multiples. Raises ValueError where a request
    names a chunk twice.
    """
    if not strides:
        return {}
    drop_stale_code(Path(__file__).parent)
    finest = math.gcd(*strides)
    starts, ids, unique = _number(log, finest)
    uses, is_tree = tree.count_uses(starts, finest, ids, unique)
    if not is_tree:
        return {stride: _single_chunks(log, stride) for stride in strides}
    nodes = tree.find_nodes(starts, finest, ids, uses)
    chains = (np.diff(starts) // finest).astype(np.int32)
    return {stride: tree.coarsen(nodes, chains, stride // finest) for stride in strides}


def _single_chunks(log: Log, stride: int) -> Paths:
    """Return the paths of a log that is no tree: every chunk is a node."""
    starts, ids, unique = _number(log, stride)
    repeat = tree.first_repeat(starts, stride, ids, unique)
    if repeat >= 0:
        raise ValueError(f"request {repeat} names a block twice; a block's name stands for all that is before it too")
    lengths = np.diff(starts) // stride
    rows = np.flatnonzero(lengths).astype(np.int32)
    return Paths(
        offsets=np.concatenate(([0], np.cumsum(lengths[rows]))).astype(np.int64),
        nodes=ids,
        tails=np.zeros(len(rows), np.int32),
        lengths=np.ones(unique, np.int32),
        bases=np.arange(unique, dtype=np.int32),
        rows=rows,
        longest=int(lengths.max(initial=0)),
        shared=unique,
        unique=unique,
        accesses=len(ids),
        is_tree=False,
    )


def _number(log: Log, stride: int) -> tuple[Longs, Ints, int]:
    """Return the log's starts, and the numbers of its chunks in order of first appearance with how many there are."""
    starts = np.ascontiguousarray(log.starts, np.int64)
    blocks = np.ascontiguousarray(log.blocks, np.int64)
    low = int(blocks.min(initial=0))
    span = int(blocks.max(initial=0)) - low + 1
    if span <= max(4 * len(blocks), 1 << 16):
        return starts, *tree.ids_by_table(starts, blocks, stride, low, span)
    return starts, *tree.ids_by_hash(starts, blocks, stride)
