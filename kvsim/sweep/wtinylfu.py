"""W-TinyLFU, chunk by chunk; the policy is stated in kvcore.policy.eviction.wtinylfu."""

from typing import NamedTuple

import numpy as np

from kvsim.sweep.jit import inlined, kernel
from kvsim.sweep.lists import (
    PINNED,
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
from kvsim.sweep.paths import Ints, Longs, Paths

WINDOW = 1
PROBATION = 2
PROTECTED = 3
COUNT_CAP = 15
SAMPLE_FACTOR = 10
SAMPLED = 0
EPOCH = 1


class Counts(NamedTuple):
    """The uses of each chunk, to 15, halved once an epoch."""

    uses: Ints
    """[chunks, 2] the count when it was written last, and the epoch of that."""
    integers: Longs
    """The uses counted in this epoch, and the epoch."""


def hits(paths: Paths, capacity: int) -> Ints:
    """Return the hits of every request of `paths` in a cache of `capacity` chunks."""
    found = np.empty(len(paths.tails), np.int32)
    counts = Counts(np.zeros((paths.unique, 2), np.int32), np.zeros(2, np.int64))
    run(paths, capacity, new_lists(paths), counts, new_chunks(paths), found)
    return found


@kernel
def run(paths: Paths, capacity: int, lists: Lists, counts: Counts, chunks: Chunks, found: Ints) -> None:
    """Write the hits of every request to `found`."""
    sizes = lists.sizes
    window_share = capacity // 100
    protected_share = (capacity - window_share) * 4 // 5
    tail = paths.shared
    room_made = False
    for request in range(len(paths.tails)):
        pinned, missing, leading = look_up(paths, request, tail, lists, chunks)
        tail += paths.tails[request]
        found[request] = leading
        admitted = min(missing, capacity - pinned)
        over = sizes[WINDOW] + sizes[PROBATION] + sizes[PROTECTED] + admitted - capacity
        if over > 0:
            evict(lists, counts, window_share, over)
            room_made = True
        if room_made and admitted > 0:
            while sizes[WINDOW] > window_share:
                move(lists, PROBATION, first(lists, WINDOW))
            room_made = False
        for place in range(admitted - 1, -1, -1):
            append(lists, WINDOW, chunks.missing[place])
            count(counts, capacity, chunks.missing[place])
        for place in range(pinned - 1, -1, -1):
            touch(lists, protected_share, chunks.pinned[place])
            count(counts, capacity, chunks.pinned[place])


@inlined
def evict(lists: Lists, counts: Counts, window_share: int, over: int) -> None:
    """Evict `over` chunks: the losers of contests while the window is over its share, then main's victims."""
    before_window = anchor(lists, WINDOW)
    before_probation = anchor(lists, PROBATION)
    before_protected = anchor(lists, PROTECTED)
    while over > 0:
        rival, before_probation = next_unpinned(lists, before_probation)
        if rival < 0:
            rival, before_protected = next_unpinned(lists, before_protected)
        loser = rival
        if rival < 0 or lists.sizes[WINDOW] > window_share:
            candidate, before_window = next_unpinned(lists, before_window)
            if candidate >= 0:
                if rival < 0 or read(counts, candidate) <= read(counts, rival):
                    loser = candidate
                else:
                    move(lists, PROBATION, candidate)
        remove(lists, loser)
        over -= 1


@inlined
def touch(lists: Lists, protected_share: int, chunk: int) -> None:
    """Unpin `chunk`, and move it to the end of the window if it is there, else of what is protected."""
    which = lists.member[chunk] - PINNED
    remove(lists, chunk)
    append(lists, WINDOW if which == WINDOW else PROTECTED, chunk)
    while which == PROBATION and lists.sizes[PROTECTED] > protected_share:
        move(lists, PROBATION, first(lists, PROTECTED))


@inlined
def read(counts: Counts, chunk: int) -> int:
    """Return the count of `chunk` as of now."""
    return int(counts.uses[chunk, 0] >> min(31, counts.integers[EPOCH] - counts.uses[chunk, 1]))


@inlined
def count(counts: Counts, capacity: int, chunk: int) -> None:
    """Count a use of `chunk`."""
    state = counts.integers
    counts.uses[chunk, 0] = min(COUNT_CAP, read(counts, chunk) + 1)
    counts.uses[chunk, 1] = state[EPOCH]
    state[SAMPLED] += 1
    if state[SAMPLED] >= SAMPLE_FACTOR * capacity:
        state[SAMPLED] -= SAMPLE_FACTOR * capacity
        state[EPOCH] += 1
