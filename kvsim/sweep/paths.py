"""What the kernels read: every request as a path in the radix tree of the log."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]


class Paths(NamedTuple):
    """The chains of a log, compressed.

    A node is a run of chunks that the same requests use: each request that uses one of its chunks uses all of them,
    one after the other. A request's chain is a path of nodes that several requests use, then a tail of chunks that no
    other request uses. Only the path can ever hit; the tail takes room.

    Shapes: q requests that have chunks at all, v visits of nodes, n nodes.
    """

    offsets: Longs
    """[q + 1]; request i visits `nodes[offsets[i]:offsets[i + 1]]`, head first."""
    nodes: Ints
    """[v]; nodes are numbered in order of their first visit."""
    tails: Ints
    """[q] chunks in the tail."""
    lengths: Ints
    """[n] chunks in each node, at least 1."""
    bases: Ints
    """[n] chunks in all earlier nodes."""
    rows: Ints
    """[q] the number of the request in the log."""
    longest: int
    """Chunks in the longest chain."""
    shared: int
    """Chunks in all nodes."""
    unique: int
    """Different chunks: those of the nodes and those of the tails."""
    accesses: int
    """Chunks in all chains together."""
    is_tree: bool
    """Whether a chunk always has the same chunk before it. If not, every chunk is a node of its own."""
