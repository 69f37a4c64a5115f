"""Least recently used for one capacity, where a chunk does not always have the same chunk before it."""

import numpy as np

from kvsim.sweep.jit import kernel
from kvsim.sweep.lists import Chunks, Lists, anchor, append, look_up, new_chunks, new_lists, next_unpinned, remove
from kvsim.sweep.paths import Ints, Paths

ALL = 1


def hits(paths: Paths, capacity: int) -> Ints:
    """Return the hits of every request of `paths` in a cache of `capacity` chunks."""
    found = np.empty(len(paths.tails), np.int32)
    run(paths, capacity, new_lists(paths), new_chunks(paths), found)
    return found


@kernel
def run(paths: Paths, capacity: int, lists: Lists, chunks: Chunks, found: Ints) -> None:
    """Write the hits of every request to `found`."""
    tail = paths.shared
    for request in range(len(paths.tails)):
        pinned, missing, leading = look_up(paths, request, tail, lists, chunks)
        tail += paths.tails[request]
        found[request] = leading
        admitted = min(missing, capacity - pinned)
        before = anchor(lists, ALL)
        while lists.sizes[ALL] + admitted > capacity:
            chunk, before = next_unpinned(lists, before)
            remove(lists, chunk)
        for place in range(admitted - 1, -1, -1):
            append(lists, ALL, chunks.missing[place])
        for place in range(pinned - 1, -1, -1):
            remove(lists, chunks.pinned[place])
            append(lists, ALL, chunks.pinned[place])
