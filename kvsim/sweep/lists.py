"""Residency chunk by chunk: what the policies share whose lists break nodes up, and lru where there are no nodes.

Chunks are numbered: those of the nodes first, node by node, then those of the tails in the order of their requests.
A chunk is in one of the lists 1, 2, ..., or in none (0). Lists from GHOST on hold chunks that were evicted.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvsim.sweep.jit import inlined
from kvsim.sweep.paths import Ints, Longs, Paths

Bytes = NDArray[np.int8]

GHOST = 4
LISTS = 6
PINNED = 16
"""Added to the number of a chunk's list while its request is served."""
BEFORE = 0
AFTER = 1


class Lists(NamedTuple):
    """Doubly linked lists of chunks, the next victim first."""

    links: Ints
    """[chunks + LISTS, 2] the neighbours of each chunk. Row `chunks + i` is the anchor of list i, which lies before
    its first chunk and after its last."""
    member: Bytes
    """[chunks] the list that each chunk is in."""
    sizes: Longs
    """[LISTS] the chunks in each list."""


class Chunks(NamedTuple):
    """Lists of a request's chunks, head first, rewritten at every request."""

    chain: Ints
    pinned: Ints
    missing: Ints


def new_lists(paths: Paths) -> Lists:
    """Return empty lists."""
    links = np.empty((paths.unique + LISTS, 2), np.int32)
    links[paths.unique :] = np.arange(paths.unique, paths.unique + LISTS)[:, None]
    return Lists(links, np.zeros(paths.unique, np.int8), np.zeros(LISTS, np.int64))


def new_chunks(paths: Paths) -> Chunks:
    """Return lists that hold any request's chunks."""
    return Chunks(*(np.empty(paths.longest, np.int32) for _ in Chunks._fields))


@inlined
def anchor(lists: Lists, which: int) -> int:
    """Return the anchor of list `which`."""
    return len(lists.member) + which


@inlined
def first(lists: Lists, which: int) -> int:
    """Return the first chunk of list `which`, which must not be empty."""
    return int(lists.links[anchor(lists, which), AFTER])


@inlined
def append(lists: Lists, which: int, chunk: int) -> None:
    """Put `chunk`, which is in no list, at the end of list `which`."""
    links = lists.links
    end = anchor(lists, which)
    last = links[end, BEFORE]
    links[last, AFTER] = chunk
    links[chunk, BEFORE] = last
    links[chunk, AFTER] = end
    links[end, BEFORE] = chunk
    lists.member[chunk] = which
    lists.sizes[which] += 1


@inlined
def remove(lists: Lists, chunk: int) -> None:
    """Take `chunk` out of its list, and unpin it."""
    before = lists.links[chunk, BEFORE]
    after = lists.links[chunk, AFTER]
    lists.links[before, AFTER] = after
    lists.links[after, BEFORE] = before
    lists.sizes[lists.member[chunk] & (PINNED - 1)] -= 1
    lists.member[chunk] = 0


@inlined
def move(lists: Lists, which: int, chunk: int) -> None:
    """Move `chunk` to the end of list `which`; it stays pinned if it was."""
    pin = lists.member[chunk] & PINNED
    remove(lists, chunk)
    append(lists, which, chunk)
    lists.member[chunk] |= pin


@inlined
def next_unpinned(lists: Lists, before: int) -> tuple[int, int]:
    """Return the first chunk after `before` that is not pinned, and the one before that.

    Returns -1 for a chunk where the list ends first. To search a list from its first chunk on, start from its anchor;
    to go on after a chunk was removed, from the one that was before it.
    """
    chunk = int(lists.links[before, AFTER])
    while chunk < len(lists.member) and lists.member[chunk] & PINNED:
        before = chunk
        chunk = int(lists.links[before, AFTER])
    if chunk >= len(lists.member):
        chunk = -1
    return chunk, before


@inlined
def look_up(paths: Paths, request: int, tail: int, lists: Lists, chunks: Chunks) -> tuple[int, int, int]:
    """Split the chain of `request` into the resident chunks, which it pins, and the missing ones.

    The request's tail begins with chunk `tail`. Lists both in `chunks`, and returns how many they are, and how many of
    the resident ones are leading.
    """
    length = write_chain(paths, request, tail, chunks.chain)
    pinned = 0
    missing = 0
    leading = 0
    for place in range(length):
        chunk = chunks.chain[place]
        if 0 < lists.member[chunk] < GHOST:
            if missing == 0:
                leading += 1
            lists.member[chunk] |= PINNED
            chunks.pinned[pinned] = chunk
            pinned += 1
        else:
            chunks.missing[missing] = chunk
            missing += 1
    return pinned, missing, leading


@inlined
def write_chain(paths: Paths, request: int, tail: int, chain: Ints) -> int:
    """Write the chunks of `request`, whose tail begins with chunk `tail`, to `chain`; return how many they are."""
    length = 0
    for visit in range(paths.offsets[request], paths.offsets[request + 1]):
        node = paths.nodes[visit]
        for place in range(paths.lengths[node]):
            chain[length] = paths.bases[node] + place
            length += 1
    for place in range(paths.tails[request]):
        chain[length] = tail + place
        length += 1
    return length
