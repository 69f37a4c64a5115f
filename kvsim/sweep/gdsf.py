"""Greedy dual size frequency, over pieces; the policy is stated in kvcore.policy.eviction.gdsf.

Every chunk is as large as every other here, so a priority is age + uses. The age never falls, so pieces used once wait
in a ring in order of insertion, which is that of their priorities too. The others are in a heap. A key, the priority
and then the number of the insertion or touch, compares the two. A piece that is touched leaves its entry in the ring,
to be dropped when it comes up with a key that is not the piece's.
"""

from typing import NamedTuple

import numpy as np

from kvsim.sweep.heap import NOWHERE, put, take
from kvsim.sweep.jit import inlined, kernel
from kvsim.sweep.paths import Ints, Longs, Paths
from kvsim.sweep.pieces import LENGTH, MARK, MISSING, Scratch, admit, cut, look_up, new_pieces, new_scratch, ring_size

USES = 2
# The policy's integers: the ends of the ring, the length of the heap, the age, the insertions and touches so far.
HEAD = 0
TAIL = 1
HEAP = 2
AGE = 3
CLOCK = 4
CLOCK_BITS = 32


class Store(NamedTuple):
    """The arrays of the policy."""

    pieces: Ints
    keys: Longs
    """By piece; out of date for missing pieces."""
    ring: Ints
    """Pieces, or chunks that no other request uses as a negative number."""
    ring_keys: Longs
    heap: Ints
    """The pieces used more than once, as kvsim.sweep.heap orders them."""
    heap_places: Ints
    """By piece."""
    integers: Longs


def hits(paths: Paths, capacity: int) -> Ints:
    """Return the hits of every request of `paths` in a cache of `capacity` chunks."""
    found = np.empty(len(paths.tails), np.int32)
    pieces = new_pieces(paths, 3)
    size = ring_size(paths, capacity)
    store = Store(
        pieces=pieces,
        keys=np.empty(len(pieces), np.int64),
        ring=np.empty(size, np.int32),
        ring_keys=np.empty(size, np.int64),
        heap=np.empty(len(pieces), np.int32),
        heap_places=np.empty(len(pieces), np.int32),
        integers=np.zeros(5, np.int64),
    )
    run(paths, capacity, store, new_scratch(paths), found)
    return found


@kernel
def run(paths: Paths, capacity: int, store: Store, scratch: Scratch, found: Ints) -> None:
    """Write the hits of every request to `found`."""
    pieces = store.pieces
    state = store.integers
    resident = 0
    for request in range(len(paths.tails)):
        pinned, missing, leading, kept, absent = look_up(paths, request, pieces, scratch)
        found[request] = leading
        admitted = min(absent, capacity - kept)
        if resident + admitted > capacity:
            evict(paths, store, resident + admitted - capacity, request + 1, scratch)
        resident = min(resident + admitted, capacity)
        missing, unused = admit(paths, pieces, scratch, missing, admitted)
        if unused > 0:
            push(store, -unused)
        for place in range(missing - 1, -1, -1):
            piece = scratch.missing[place]
            pieces[piece, USES] = 1
            store.keys[piece] = push(store, piece)
        for place in range(pinned - 1, -1, -1):
            piece = scratch.pinned[place]
            if pieces[piece, USES] == 1:
                store.heap_places[piece] = NOWHERE
            pieces[piece, USES] += 1
            store.keys[piece] = new_key(state, pieces[piece, USES])
            state[HEAP] = put(store.heap, store.heap_places, store.keys, state[HEAP], piece)


@inlined
def new_key(state: Longs, uses: int) -> int:
    """Return the key of a piece inserted or touched now for the `uses`-th time."""
    state[CLOCK] += 1
    return int(((state[AGE] + uses) << CLOCK_BITS) | state[CLOCK])


@inlined
def push(store: Store, entry: int) -> int:
    """Append `entry`, now inserted, to the ring and return its key."""
    key = new_key(store.integers, 1)
    place = store.integers[TAIL] & (len(store.ring) - 1)
    store.ring[place] = entry
    store.ring_keys[place] = key
    store.integers[TAIL] += 1
    return key


@inlined
def evict(paths: Paths, store: Store, over: int, now: int, scratch: Scratch) -> None:
    """Evict the `over` chunks of the lowest keys that request `now` has not pinned."""
    state = store.integers
    mask = len(store.ring) - 1
    passed = 0
    passed_end = len(scratch.aside)
    while over > 0:
        passed = skip_ring(store, now, scratch, passed)
        passed_end = skip_heap(store, now, scratch, passed_end)
        place = state[HEAD] & mask
        in_ring = state[HEAD] < state[TAIL]
        if in_ring and (state[HEAP] == 0 or store.ring_keys[place] < store.keys[store.heap[0]]):
            key = store.ring_keys[place]
            piece = store.ring[place]
        else:
            in_ring = False
            piece = store.heap[0]
            key = store.keys[piece]
        state[AGE] = max(state[AGE], key >> CLOCK_BITS)
        chunks = -piece if piece < 0 else store.pieces[piece, LENGTH]
        if chunks > over:
            if piece < 0:
                store.ring[place] += np.int32(over)
            else:
                cut(paths, store.pieces, piece, chunks - over)
            break
        over -= chunks
        if piece >= 0:
            store.pieces[piece, MARK] = MISSING
        if in_ring:
            state[HEAD] += 1
        else:
            state[HEAP] = take(store.heap, store.heap_places, store.keys, state[HEAP])
    for place in range(passed - 1, -1, -1):
        piece = scratch.aside[place]
        state[HEAD] -= 1
        store.ring[state[HEAD] & mask] = piece
        store.ring_keys[state[HEAD] & mask] = store.keys[piece]
    for place in range(passed_end, len(scratch.aside)):
        state[HEAP] = put(store.heap, store.heap_places, store.keys, state[HEAP], scratch.aside[place])


@inlined
def skip_ring(store: Store, now: int, scratch: Scratch, passed: int) -> int:
    """Drop what is out of date at the ring's head, and set aside what request `now` has pinned.

    Returns how many are set aside, `passed` of them before.
    """
    state = store.integers
    mask = len(store.ring) - 1
    while state[HEAD] < state[TAIL]:
        piece = store.ring[state[HEAD] & mask]
        if piece < 0:
            break
        if store.keys[piece] == store.ring_keys[state[HEAD] & mask]:
            if store.pieces[piece, MARK] != now:
                break
            scratch.aside[passed] = piece
            passed += 1
        state[HEAD] += 1
    return passed


@inlined
def skip_heap(store: Store, now: int, scratch: Scratch, passed_end: int) -> int:
    """Set aside what request `now` has pinned on top of the heap, from the end of the list forwards.

    Returns where that list begins, `passed_end` before.
    """
    state = store.integers
    while state[HEAP] > 0 and store.pieces[store.heap[0], MARK] == now:
        passed_end -= 1
        scratch.aside[passed_end] = store.heap[0]
        state[HEAP] = take(store.heap, store.heap_places, store.keys, state[HEAP])
    return passed_end
