"""S3-FIFO, chunk by chunk; the policy is stated in kvcore.policy.eviction.s3fifo."""

import numpy as np

from kvsim.sweep.jit import inlined, kernel
from kvsim.sweep.lists import (
    GHOST,
    PINNED,
    Bytes,
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

SMALL = 1
MAIN = 2
FREQUENCY_CAP = 3
PROMOTED_ABOVE = 1


def hits(paths: Paths, capacity: int) -> Ints:
    """Return the hits of every request of `paths` in a cache of `capacity` chunks."""
    found = np.empty(len(paths.tails), np.int32)
    run(paths, capacity, new_lists(paths), np.zeros(paths.unique, np.int8), new_chunks(paths), found)
    return found


@kernel
def run(paths: Paths, capacity: int, lists: Lists, frequency: Bytes, chunks: Chunks, found: Ints) -> None:
    """Write the hits of every request to `found`."""
    tail = paths.shared
    for request in range(len(paths.tails)):
        pinned, missing, leading = look_up(paths, request, tail, lists, chunks)
        tail += paths.tails[request]
        found[request] = leading
        admitted = min(missing, capacity - pinned)
        evict(lists, frequency, capacity, lists.sizes[SMALL] + lists.sizes[MAIN] + admitted - capacity)
        for place in range(admitted - 1, -1, -1):
            chunk = chunks.missing[place]
            if lists.member[chunk] == GHOST:
                move(lists, MAIN, chunk)
            else:
                append(lists, SMALL, chunk)
        for place in range(pinned):
            chunk = chunks.pinned[place]
            lists.member[chunk] -= PINNED
            frequency[chunk] = min(FREQUENCY_CAP, frequency[chunk] + 1)


@inlined
def evict(lists: Lists, frequency: Bytes, capacity: int, over: int) -> None:
    """Evict `over` chunks: from small while it has its share or more, else from main."""
    small = anchor(lists, SMALL)  # the chunk before the next one to look at
    main = anchor(lists, MAIN)
    while over > 0:
        done = False
        if lists.sizes[SMALL] >= capacity // 10:
            done, small = evict_small(lists, frequency, capacity, small)
        if not done:
            done, main = evict_main(lists, frequency, main)
        if not done:
            done, small = evict_small(lists, frequency, capacity, small)
        over -= done


@inlined
def evict_small(lists: Lists, frequency: Bytes, capacity: int, before: int) -> tuple[bool, int]:
    """Evict small's first chunk after `before` that does not go on to main, and send on those that do.

    Returns whether there was one, and what `before` is then.
    """
    while True:
        chunk, before = next_unpinned(lists, before)
        if chunk < 0:
            return False, before
        went_on = frequency[chunk] > PROMOTED_ABOVE
        frequency[chunk] = 0
        if went_on:
            move(lists, MAIN, chunk)
            continue
        move(lists, GHOST, chunk)
        if lists.sizes[GHOST] > capacity - capacity // 10:
            remove(lists, first(lists, GHOST))
        return True, before


@inlined
def evict_main(lists: Lists, frequency: Bytes, before: int) -> tuple[bool, int]:
    """Evict main's first chunk after `before` of frequency 0; those met first go to the end with 1 less.

    Returns whether there was one, and what `before` is then.
    """
    while True:
        chunk, before = next_unpinned(lists, before)
        if chunk < 0:
            return False, before
        if frequency[chunk] == 0:
            remove(lists, chunk)
            return True, before
        frequency[chunk] -= 1
        move(lists, MAIN, chunk)
