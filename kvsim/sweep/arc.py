"""ARC, chunk by chunk; the policy is stated in kvcore.policy.eviction.arc."""

import numpy as np

from kvsim.sweep.jit import inlined, kernel
from kvsim.sweep.lists import (
    GHOST,
    Chunks,
    Lists,
    anchor,
    append,
    first,
    look_up,
    move,
    new_chunks,
    new_lists,
    next_unpinned,
    remove,
)
from kvsim.sweep.paths import Ints, Paths

T1 = 1
T2 = 2
B1 = GHOST
B2 = GHOST + 1


def hits(paths: Paths, capacity: int) -> Ints:
    """Return the hits of every request of `paths` in a cache of `capacity` chunks."""
    found = np.empty(len(paths.tails), np.int32)
    run(paths, capacity, new_lists(paths), new_chunks(paths), found)
    return found


@kernel
def run(paths: Paths, capacity: int, lists: Lists, chunks: Chunks, found: Ints) -> None:
    """Write the hits of every request to `found`."""
    tail = paths.shared
    target = 0  # of T1
    for request in range(len(paths.tails)):
        pinned, missing, leading = look_up(paths, request, tail, lists, chunks)
        tail += paths.tails[request]
        found[request] = leading
        admitted = min(missing, capacity - pinned)
        evict(lists, target, lists.sizes[T1] + lists.sizes[T2] + admitted - capacity)
        for place in range(admitted - 1, -1, -1):
            target = insert(lists, target, capacity, chunks.missing[place])
        for place in range(pinned - 1, -1, -1):
            remove(lists, chunks.pinned[place])
            append(lists, T2, chunks.pinned[place])


@inlined
def evict(lists: Lists, target: int, over: int) -> None:
    """Evict `over` chunks: from T1 while it is longer than its target, else from T2."""
    before_t1 = anchor(lists, T1)
    before_t2 = anchor(lists, T2)
    while over > 0:
        chunk = -1
        if lists.sizes[T1] <= target:
            chunk, before_t2 = next_unpinned(lists, before_t2)
        if chunk < 0:
            chunk, before_t1 = next_unpinned(lists, before_t1)
        if chunk < 0:
            chunk, before_t2 = next_unpinned(lists, before_t2)
        move(lists, B1 if lists.member[chunk] == T1 else B2, chunk)
        over -= 1


@inlined
def insert(lists: Lists, target: int, capacity: int, chunk: int) -> int:
    """Take in `chunk`, trim the ghosts, and return the new target of T1."""
    sizes = lists.sizes
    which = lists.member[chunk]
    if which == B1:
        target = min(capacity, target + max(1, sizes[B2] // sizes[B1]))
        move(lists, T2, chunk)
    elif which == B2:
        target = max(0, target - max(1, sizes[B1] // sizes[B2]))
        move(lists, T2, chunk)
    else:
        append(lists, T1, chunk)
    while sizes[B1] > 0 and sizes[T1] + sizes[B1] > capacity:
        remove(lists, first(lists, B1))
    while sizes[B2] > 0 and sizes[T1] + sizes[T2] + sizes[B1] + sizes[B2] > 2 * capacity:
        remove(lists, first(lists, B2))
    return target
