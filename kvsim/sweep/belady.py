"""Belady's bound, over nodes.

The next uses of a node's chunks follow one another in the stream, so the cache drops a node's last chunks first and
holds a node's first chunks or none: one number a node. The nodes are ordered by their next visit, whose place in the
stream of visits is the node's key.
"""

import numpy as np
from numpy.typing import NDArray

from kvsim.sweep.jit import inlined, kernel
from kvsim.sweep.paths import Ints, Longs, Paths

Words = NDArray[np.uint64]


def hits(paths: Paths, capacity: int) -> Ints:
    """Return the hits of every request of `paths` in a cache of `capacity` chunks that knows the future."""
    found = np.empty(len(paths.tails), np.int32)
    following = np.empty(len(paths.nodes), np.int32)
    write_next_visits(paths, np.full(len(paths.lengths), len(paths.nodes), np.int32), following)
    run(paths, capacity, following, np.zeros(len(paths.lengths), np.int32), *new_keys(len(paths.nodes)), found)
    return found


def new_keys(span: int) -> tuple[Words, Longs]:
    """Return an empty set of the numbers below `span`: its words, and where each of its levels begins among them.

    Bit i of level 0 says that i is in the set; bit i of each further level that word i of the level before is not 0.
    """
    words = [max(1, -(-span // 64))]
    while words[-1] > 1:
        words.append(-(-words[-1] // 64))
    return np.zeros(sum(words), np.uint64), np.cumsum([0, *words[:-1]])


@kernel
def write_next_visits(paths: Paths, later: Ints, following: Ints) -> None:
    """Write the next visit of each visit's node to `following`.

    Where there is none that is the number of visits, which `later`, by node, must hold at first.
    """
    for visit in range(len(paths.nodes) - 1, -1, -1):
        node = paths.nodes[visit]
        following[visit] = later[node]
        later[node] = visit


@kernel
def run(paths: Paths, capacity: int, following: Ints, kept: Ints, keys: Words, levels: Longs, found: Ints) -> None:
    """Write the hits of every request to `found`; `kept` are the chunks held of each node."""
    resident = 0
    for request in range(len(paths.tails)):
        leading = 0
        whole = True
        for visit in range(paths.offsets[request], paths.offsets[request + 1]):
            node = paths.nodes[visit]
            if whole:
                leading += kept[node]
                whole = kept[node] == paths.lengths[node]
            if kept[node] > 0:
                drop_key(keys, levels, visit)
                resident -= kept[node]
                kept[node] = 0
            if following[visit] < len(paths.nodes):
                add_key(keys, levels, following[visit])
                kept[node] = paths.lengths[node]
                resident += kept[node]
        found[request] = leading
        while resident > capacity:
            last = last_key(keys, levels)
            node = paths.nodes[last]
            dropped = min(kept[node], resident - capacity)
            kept[node] -= dropped
            resident -= dropped
            if kept[node] == 0:
                drop_key(keys, levels, last)


@inlined
def add_key(keys: Words, levels: Longs, number: int) -> None:
    """Add `number` to the set."""
    for start in levels:
        keys[start + (number >> 6)] |= np.uint64(1) << np.uint64(number & 63)
        number >>= 6


@inlined
def drop_key(keys: Words, levels: Longs, number: int) -> None:
    """Take `number` out of the set."""
    for start in levels:
        word = start + (number >> 6)
        keys[word] &= ~(np.uint64(1) << np.uint64(number & 63))
        if keys[word] != 0:
            break
        number >>= 6


@inlined
def last_key(keys: Words, levels: Longs) -> int:
    """Return the greatest number of the set, which must not be empty."""
    number = 0
    for level in range(len(levels) - 1, -1, -1):
        word = keys[levels[level] + number]
        bit = 0
        for step in (32, 16, 8, 4, 2, 1):
            if word >> np.uint64(bit + step) != 0:
                bit += step
        number = number * 64 + bit
    return number
