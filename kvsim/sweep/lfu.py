"""Least frequently used, over pieces: a piece is touched whole, so its chunks share their count.

Pieces of count 1, which most are, wait in a ring in order of insertion. A piece that is touched leaves its entry
there, to be dropped when it comes up: it cannot be missing by then, since higher counts are evicted only when the ring
has nothing more to give. Pieces of each higher count are a linked list, and the counts that have pieces are another.
"""

import numpy as np

from kvsim.sweep.jit import inlined, kernel
from kvsim.sweep.paths import Ints, Paths
from kvsim.sweep.pieces import (
    LENGTH,
    MARK,
    MISSING,
    Scratch,
    admit,
    cut,
    look_up,
    new_pieces,
    new_scratch,
    push,
    ring_size,
)

COUNT = 2
BEFORE = 3
AFTER = 4
# Columns of a count, of which 0 is none and the list's anchor.
FIRST = 0
LAST = 1
LOWER = 2
HIGHER = 3
NONE = -1


def hits(paths: Paths, capacity: int) -> Ints:
    """Return the hits of every request of `paths` in a cache of `capacity` chunks."""
    found = np.empty(len(paths.tails), np.int32)
    once = np.empty(ring_size(paths, capacity), np.int32)
    run(paths, capacity, new_pieces(paths, 5), new_counts(paths), once, new_scratch(paths), found)
    return found


def new_counts(paths: Paths) -> Ints:
    """Return the table of counts: no chunk is touched more often than the node with the most visits."""
    most = int(np.bincount(paths.nodes).max(initial=0))
    counts = np.full((most + 2, 4), NONE, np.int32)
    counts[0, LOWER] = 0
    counts[0, HIGHER] = 0
    return counts


@kernel
def run(paths: Paths, capacity: int, pieces: Ints, counts: Ints, once: Ints, scratch: Scratch, found: Ints) -> None:
    """Write the hits of every request to `found`."""
    head = 0
    tail = 0
    resident = 0
    for request in range(len(paths.tails)):
        pinned, missing, leading, kept, absent = look_up(paths, request, pieces, scratch)
        found[request] = leading
        admitted = min(absent, capacity - kept)
        if resident + admitted > capacity:
            over = resident + admitted - capacity
            head, over = evict_once(paths, pieces, once, (head, tail), over, request + 1, scratch)
            if over > 0:
                evict_more(paths, pieces, counts, over, request + 1)
        resident = min(resident + admitted, capacity)
        missing, unused = admit(paths, pieces, scratch, missing, admitted)
        for place in range(missing):
            pieces[scratch.missing[place], COUNT] = 1
        tail = push(once, head, tail, unused, scratch, missing)
        for place in range(pinned - 1, -1, -1):
            touch(pieces, counts, scratch.pinned[place])


@inlined
def evict_once(
    paths: Paths, pieces: Ints, once: Ints, ends: tuple[int, int], over: int, now: int, scratch: Scratch
) -> tuple[int, int]:
    """Evict up to `over` chunks of count 1 that request `now` has not pinned.

    Returns the ring's new head and the chunks still to be evicted.
    """
    mask = len(once) - 1
    head, tail = ends
    passed = 0
    while over > 0 and head < tail:
        piece = once[head & mask]
        if piece < 0:
            if -piece > over:
                once[head & mask] += np.int32(over)
                over = 0
                break
            over += piece
        elif pieces[piece, COUNT] == 1:
            if pieces[piece, MARK] == now:
                scratch.aside[passed] = piece
                passed += 1
            else:
                chunks = pieces[piece, LENGTH]
                if chunks > over:
                    cut(paths, pieces, piece, chunks - over)
                    over = 0
                    break
                pieces[piece, MARK] = MISSING
                over -= chunks
        head += 1
    for place in range(passed - 1, -1, -1):
        head -= 1
        once[head & mask] = scratch.aside[place]
    return head, over


@inlined
def evict_more(paths: Paths, pieces: Ints, counts: Ints, over: int, now: int) -> None:
    """Evict `over` chunks of counts above 1 that request `now` has not pinned, the lowest counts first."""
    count = counts[0, HIGHER]
    while over > 0:
        higher = counts[count, HIGHER]
        piece = counts[count, FIRST]
        while piece != NONE and over > 0:
            after = pieces[piece, AFTER]
            if pieces[piece, MARK] != now:
                chunks = pieces[piece, LENGTH]
                if chunks > over:
                    cut(paths, pieces, piece, chunks - over)
                    return
                over -= chunks
                pieces[piece, MARK] = MISSING
                unlink(pieces, counts, piece, count)
            piece = after
        count = higher


@inlined
def touch(pieces: Ints, counts: Ints, piece: int) -> None:
    """Move `piece` to the end of the next higher count."""
    count = pieces[piece, COUNT]
    pieces[piece, COUNT] = count + 1
    if counts[count + 1, FIRST] == NONE:
        lower = 0 if count == 1 else count
        higher = counts[lower, HIGHER]
        counts[count + 1, LOWER] = lower
        counts[count + 1, HIGHER] = higher
        counts[lower, HIGHER] = count + 1
        counts[higher, LOWER] = count + 1
        counts[count + 1, FIRST] = piece
        before = NONE
    else:
        before = counts[count + 1, LAST]
        pieces[before, AFTER] = piece
    if count > 1:
        unlink(pieces, counts, piece, count)
    pieces[piece, BEFORE] = before
    pieces[piece, AFTER] = NONE
    counts[count + 1, LAST] = piece


@inlined
def unlink(pieces: Ints, counts: Ints, piece: int, count: int) -> None:
    """Take `piece` out of the list of `count`, and `count` out of the list of counts if it was the last."""
    before = pieces[piece, BEFORE]
    after = pieces[piece, AFTER]
    if before == NONE:
        counts[count, FIRST] = after
    else:
        pieces[before, AFTER] = after
    if after == NONE:
        counts[count, LAST] = before
    else:
        pieces[after, BEFORE] = before
    if before == NONE and after == NONE:
        lower = counts[count, LOWER]
        higher = counts[count, HIGHER]
        counts[lower, HIGHER] = higher
        counts[higher, LOWER] = lower
