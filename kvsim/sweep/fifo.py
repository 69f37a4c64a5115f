"""First in, first out, over pieces."""

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


def hits(paths: Paths, capacity: int) -> Ints:
    """Return the hits of every request of `paths` in a cache of `capacity` chunks."""
    found = np.empty(len(paths.tails), np.int32)
    queue = np.empty(ring_size(paths, capacity), np.int32)
    run(paths, capacity, new_pieces(paths, 2), queue, new_scratch(paths), found)
    return found


@kernel
def run(paths: Paths, capacity: int, pieces: Ints, queue: Ints, scratch: Scratch, found: Ints) -> None:
    """Write the hits of every request to `found`."""
    head = 0
    tail = 0
    resident = 0
    for request in range(len(paths.tails)):
        _, missing, leading, kept, absent = look_up(paths, request, pieces, scratch)
        found[request] = leading
        admitted = min(absent, capacity - kept)
        if resident + admitted > capacity:
            head = evict(paths, pieces, queue, head, resident + admitted - capacity, request + 1, scratch)
        resident = min(resident + admitted, capacity)
        missing, unused = admit(paths, pieces, scratch, missing, admitted)
        tail = push(queue, head, tail, unused, scratch, missing)


@inlined
def evict(paths: Paths, pieces: Ints, queue: Ints, head: int, over: int, now: int, scratch: Scratch) -> int:
    """Evict the first `over` chunks of the queue that request `now` has not pinned; return the queue's new head."""
    mask = len(queue) - 1
    passed = 0
    while over > 0:
        piece = queue[head & mask]
        if piece < 0:
            if -piece > over:
                queue[head & mask] += np.int32(over)
                break
            over += piece
        elif pieces[piece, MARK] == now:
            scratch.aside[passed] = piece
            passed += 1
        else:
            chunks = pieces[piece, LENGTH]
            if chunks > over:
                cut(paths, pieces, piece, chunks - over)
                break
            pieces[piece, MARK] = MISSING
            over -= chunks
        head += 1
    for place in range(passed - 1, -1, -1):
        head -= 1
        queue[head & mask] = scratch.aside[place]
    return head
