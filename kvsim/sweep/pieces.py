"""Residency by pieces: what fifo, lfu, sieve and gdsf share.

A node's chunks are all used by the same requests, so they differ only where an eviction or an admission ended within
the node. A piece is a run of a node's chunks that are resident since the same insertion, or that are missing. Nodes
begin as one piece, and all work is done on whole pieces but for the one at which an eviction or admission ends.

Piece p < n begins node p. The piece that begins at chunk i > 0 of node p is piece n + bases[p] + i.
"""

from typing import NamedTuple

import numpy as np

from kvsim.sweep.jit import inlined
from kvsim.sweep.paths import Ints, Paths

LENGTH = 0
"""Column of a piece's chunks."""
MARK = 1
"""Column of a piece's mark: MISSING, or the number of the request that pinned it last, counted from 1 (0: none)."""
MISSING = -1


class Scratch(NamedTuple):
    """Lists of a request's pieces, head first, rewritten at every request."""

    pinned: Ints
    missing: Ints
    aside: Ints


def new_pieces(paths: Paths, columns: int) -> Ints:
    """Return a table of `columns` columns in which every node is one missing piece."""
    nodes = len(paths.lengths)
    pieces = np.empty((nodes + paths.shared, columns), np.int32)
    pieces[:nodes, LENGTH] = paths.lengths
    pieces[:nodes, MARK] = MISSING
    return pieces


def new_scratch(paths: Paths) -> Scratch:
    """Return lists that hold any request's pieces."""
    return Scratch(*(np.empty(paths.longest, np.int32) for _ in Scratch._fields))


def ring_size(paths: Paths, capacity: int) -> int:
    """Return a power of two above the number of queue entries that can be resident at once.

    An entry holds at least one resident chunk; and there are no more than pieces and tails.
    """
    return 1 << (min(capacity, paths.shared + len(paths.tails)) + 2).bit_length()


@inlined
def cut(paths: Paths, pieces: Ints, piece: int, kept: int) -> None:
    """Make all but the first `kept` chunks of `piece` a missing piece."""
    nodes = len(paths.lengths)
    rest = nodes + paths.bases[piece] + kept if piece < nodes else piece + kept
    pieces[rest, LENGTH] = pieces[piece, LENGTH] - kept
    pieces[rest, MARK] = MISSING
    pieces[piece, LENGTH] = kept


@inlined
def look_up(paths: Paths, request: int, pieces: Ints, scratch: Scratch) -> tuple[int, int, int, int, int]:
    """Find the hits of `request`, pin its resident pieces, and join adjacent missing pieces.

    Lists both in `scratch`. Returns how many pieces are pinned and how many missing, the hits, and the chunks that
    are pinned and that are missing, the tail included.
    """
    hits = 0
    kept = 0
    absent = 0
    pinned = 0
    missing = 0
    for visit in range(paths.offsets[request], paths.offsets[request + 1]):
        node = paths.nodes[visit]
        length = paths.lengths[node]
        first_extra = len(paths.lengths) + paths.bases[node]
        place = 0
        piece = int(node)
        joined = MISSING  # the missing piece that ends before this one
        while True:
            chunks = pieces[piece, LENGTH]
            if pieces[piece, MARK] >= 0:
                if absent == 0:
                    hits += chunks
                kept += chunks
                pieces[piece, MARK] = request + 1
                scratch.pinned[pinned] = piece
                pinned += 1
                joined = MISSING
            else:
                absent += chunks
                if joined >= 0:
                    pieces[joined, LENGTH] += chunks
                else:
                    scratch.missing[missing] = piece
                    missing += 1
                    joined = piece
            place += chunks
            if place == length:
                break
            piece = first_extra + place
    return pinned, missing, hits, kept, absent + paths.tails[request]


@inlined
def admit(paths: Paths, pieces: Ints, scratch: Scratch, missing: int, room: int) -> tuple[int, int]:
    """Mark the first `room` missing chunks resident; what does not fit of a piece is cut off.

    Returns how many of the `missing` pieces those are, and what is left of the room for the tail.
    """
    for place in range(missing):
        if room == 0:
            return place, 0
        piece = scratch.missing[place]
        if pieces[piece, LENGTH] > room:
            cut(paths, pieces, piece, room)
        pieces[piece, MARK] = 0
        room -= pieces[piece, LENGTH]
    return missing, room


@inlined
def push(ring: Ints, head: int, tail: int, unused: int, scratch: Scratch, admitted: int) -> int:
    """Append what a request inserts to the queue, tail to head, and return the queue's new end.

    That is `unused` chunks which no other request uses, then the first `admitted` of the missing pieces. A queue's
    entry is a piece, or such chunks as a negative number; adjacent ones are one entry.
    """
    mask = len(ring) - 1
    if unused > 0:
        if tail > head and ring[(tail - 1) & mask] < 0:
            ring[(tail - 1) & mask] -= np.int32(unused)
        else:
            ring[tail & mask] = -unused
            tail += 1
    for place in range(admitted - 1, -1, -1):
        ring[tail & mask] = scratch.missing[place]
        tail += 1
    return tail
