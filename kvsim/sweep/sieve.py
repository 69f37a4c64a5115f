"""SIEVE, over pieces: a piece is touched whole, so its chunks share their visited mark."""

from typing import NamedTuple

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
    queues = np.empty((2, ring_size(paths, capacity)), np.int32)
    run(paths, capacity, new_pieces(paths, 2), queues, new_scratch(paths), found)
    return found


class Hand(NamedTuple):
    """Where the hand is: which of the two queues lies ahead of it, and the ends of that and of what it has passed."""

    ahead: int
    head: int
    tail: int
    passed_head: int
    passed_tail: int


@kernel
def run(paths: Paths, capacity: int, pieces: Ints, queues: Ints, scratch: Scratch, found: Ints) -> None:
    """Write the hits of every request to `found`.

    The two queues hold what lies ahead of the hand and what it has passed, oldest first. A piece's mark is above 0
    where it is visited.
    """
    hand = Hand(0, 0, 0, 0, 0)
    resident = 0
    for request in range(len(paths.tails)):
        _, missing, leading, kept, absent = look_up(paths, request, pieces, scratch)
        found[request] = leading
        admitted = min(absent, capacity - kept)
        if resident + admitted > capacity:
            hand = evict(paths, pieces, queues, hand, resident + admitted - capacity, request + 1)
        resident = min(resident + admitted, capacity)
        missing, unused = admit(paths, pieces, scratch, missing, admitted)
        tail = push(queues[hand.ahead], hand.head, hand.tail, unused, scratch, missing)
        hand = Hand(hand.ahead, hand.head, tail, hand.passed_head, hand.passed_tail)


@inlined
def evict(paths: Paths, pieces: Ints, queues: Ints, hand: Hand, over: int, now: int) -> Hand:
    """Move the hand until it has evicted `over` chunks, and return where it is then.

    Pieces that request `now` has pinned carry their visited mark already, and keep it.
    """
    mask = queues.shape[1] - 1
    side, head, tail, passed_head, passed_tail = hand
    while over > 0:
        piece = queues[side, head & mask]
        if piece < 0:
            if -piece > over:
                queues[side, head & mask] += np.int32(over)
                break
            over += piece
        else:
            mark = pieces[piece, MARK]
            if mark > 0:
                if mark != now:
                    pieces[piece, MARK] = 0
                queues[1 - side, passed_tail & mask] = piece
                passed_tail += 1
            else:
                chunks = pieces[piece, LENGTH]
                if chunks > over:
                    cut(paths, pieces, piece, chunks - over)
                    break
                pieces[piece, MARK] = MISSING
                over -= chunks
        head += 1
        if head == tail:
            side = 1 - side
            head, tail, passed_head, passed_tail = passed_head, passed_tail, head, tail
    return Hand(side, head, tail, passed_head, passed_tail)
