"""From the blocks of a log to the paths of its requests."""

from typing import NamedTuple

import numpy as np

from kvsim.sweep.jit import compiled
from kvsim.sweep.paths import Ints, Longs, Paths

MISSING = np.int32(-1)

HASH_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 over the golden ratio, as a signed number (Knuth, The Art of Computer Programming 3, section 6.4)."""


@compiled
def ids_by_table(starts: Longs, blocks: Longs, stride: int, low: int, span: int) -> tuple[Ints, int]:
    """Return the number of every chunk of every request, in order of first appearance, and how many there are.

    A chunk is `stride` blocks and is named by the last of them; all names are from `low` to `low + span - 1`.
    """
    table = np.full(span, MISSING, np.int32)
    ids = np.empty(count_chunks(starts, stride), np.int32)
    place = 0
    unique = 0
    for request in range(len(starts) - 1):
        for block in range(starts[request] + stride - 1, starts[request + 1], stride):
            name = blocks[block] - low
            number = table[name]
            if number < 0:
                number = np.int32(unique)
                table[name] = number
                unique += 1
            ids[place] = number
            place += 1
    return ids, unique


@compiled
def ids_by_hash(starts: Longs, blocks: Longs, stride: int) -> tuple[Ints, int]:
    """Do as `ids_by_table` for names that are spread over all 64 bits.

    Most chunks follow the chunk that they followed the last time, so that guess is tried before the hash table.
    """
    ids = np.empty(count_chunks(starts, stride), np.int32)
    names = np.empty(1 << 10, np.int64)
    follower = np.empty(1 << 10, np.int32)  # the chunk seen last after each chunk
    slots = np.full(1 << 11, MISSING, np.int32)
    place = 0
    unique = 0
    for request in range(len(starts) - 1):
        before = -1
        for block in range(starts[request] + stride - 1, starts[request + 1], stride):
            name = blocks[block]
            number = follower[before] if before >= 0 else MISSING
            if number < 0 or names[number] != name:
                slot = find_slot(slots, names, name)
                number = slots[slot]
                if number < 0:
                    number = np.int32(unique)
                    slots[slot] = number
                    names[unique] = name
                    follower[unique] = MISSING
                    unique += 1
                    if unique == len(names):
                        names = np.concatenate((names, np.empty_like(names)))
                        follower = np.concatenate((follower, np.empty_like(follower)))
                        slots = larger_slots(slots, names, unique)
                if before >= 0:
                    follower[before] = number
            ids[place] = number
            place += 1
            before = int(number)
    return ids, unique


@compiled
def count_chunks(starts: Longs, stride: int) -> int:
    """Return the number of full chunks of `stride` blocks in all requests."""
    total = 0
    for request in range(len(starts) - 1):
        total += (starts[request + 1] - starts[request]) // stride
    return total


@compiled
def find_slot(slots: Ints, names: Longs, name: int) -> int:
    """Return the slot that holds the number of `name`, or the empty one where it belongs."""
    mask = len(slots) - 1
    mixed = name * HASH_FACTOR  # of which the high bits depend on all of the name
    slot = (mixed ^ (mixed >> 32)) & mask
    while slots[slot] >= 0 and names[slots[slot]] != name:
        slot = (slot + 1) & mask
    return slot


@compiled
def larger_slots(slots: Ints, names: Longs, unique: int) -> Ints:
    """Return a table of twice as many slots for the first `unique` names."""
    larger = np.full(2 * len(slots), MISSING, np.int32)
    for number in range(unique):
        larger[find_slot(larger, names, names[number])] = number
    return larger


@compiled
def count_uses(starts: Longs, stride: int, ids: Ints, unique: int) -> tuple[Ints, bool]:
    """Return how many chains each chunk is in, and whether a chunk always has the same chunk before it.

    If it does, no chain can hold a chunk twice: the two would have the same chunks before them, back to the head,
    which has none.
    """
    uses = np.zeros(unique, np.int32)
    before = np.empty(unique, np.int32)
    is_tree = True
    place = 0
    for request in range(len(starts) - 1):
        last = MISSING
        for _ in range((starts[request + 1] - starts[request]) // stride):
            number = ids[place]
            place += 1
            if uses[number] == 0:
                before[number] = last
            elif before[number] != last:
                is_tree = False
            uses[number] += 1
            last = number
    return uses, is_tree


@compiled
def first_repeat(starts: Longs, stride: int, ids: Ints, unique: int) -> int:
    """Return the first request whose chain holds a chunk twice, or -1."""
    seen = np.full(unique, -1, np.int64)
    place = 0
    for request in range(len(starts) - 1):
        for _ in range((starts[request + 1] - starts[request]) // stride):
            if seen[ids[place]] == request:
                return request
            seen[ids[place]] = request
            place += 1
    return -1


class Nodes(NamedTuple):
    """The nodes of the finest chunks, from which the paths of all sizes follow."""

    offsets: Longs
    """[requests + 1]; request i visits `visits[offsets[i]:offsets[i + 1]]`."""
    visits: Ints
    begins: Ints
    """The place in the chain of each node's first chunk."""
    ends: Ints
    """The place after each node's last chunk."""


@compiled
def find_nodes(starts: Longs, stride: int, ids: Ints, uses: Ints) -> Nodes:
    """Cut the chains of a tree into nodes.

    The requests that use a chunk are among those that use the chunk before it, so the same requests use both exactly
    where their numbers of uses are equal.
    """
    requests = len(starts) - 1
    offsets = np.empty(requests + 1, np.int64)
    visits = np.empty(len(ids), np.int32)
    begins = np.empty(len(uses), np.int32)
    ends = np.empty(len(uses), np.int32)
    node_at = np.full(len(uses), MISSING, np.int32)  # by the chunk that is the head of the node
    nodes = 0
    visited = 0
    chain = 0
    for request in range(requests):
        offsets[request] = visited
        length = (starts[request + 1] - starts[request]) // stride
        place = 0
        while place < length and uses[ids[chain + place]] > 1:
            head = ids[chain + place]
            node = node_at[head]
            if node < 0:
                node = np.int32(nodes)
                nodes += 1
                node_at[head] = node
                begins[node] = place
                while place < length and uses[ids[chain + place]] == uses[head]:
                    place += 1
                ends[node] = place
            visits[visited] = node
            visited += 1
            place = ends[node]
        chain += length
    offsets[requests] = visited
    return Nodes(offsets, visits[:visited].copy(), begins[:nodes].copy(), ends[:nodes].copy())


@compiled
def coarsen(nodes: Nodes, chains: Ints, factor: int) -> Paths:
    """Return the paths for chunks of `factor` of the chunks that the nodes were found with.

    A coarse chunk is named by its last fine one, so the same requests use both: a node of the fine chunks from b to e
    holds the coarse chunks from b // factor to e // factor, perhaps none. `chains` holds the fine chunks of each
    request.
    """
    number = np.full(len(nodes.begins), MISSING, np.int32)  # of the nodes that hold a coarse chunk
    lengths = np.empty(len(nodes.begins), np.int32)
    bases = np.empty(len(nodes.begins), np.int32)
    count = 0
    shared = 0
    for node in range(len(nodes.begins)):
        length = nodes.ends[node] // factor - nodes.begins[node] // factor
        if length > 0:
            number[node] = count
            lengths[count] = length
            bases[count] = shared
            shared += length
            count += 1
    requests = 0
    longest = 0
    accesses = 0
    for chain in chains:
        requests += chain >= factor
        longest = max(longest, chain // factor)
        accesses += chain // factor
    offsets = np.empty(requests + 1, np.int64)
    visits = np.empty(len(nodes.visits), np.int32)
    tails = np.empty(requests, np.int32)
    rows = np.empty(requests, np.int32)
    request = 0
    visited = 0
    unique = shared
    for row in range(len(chains)):
        chain = chains[row] // factor
        if chain == 0:
            continue
        offsets[request] = visited
        end = 0
        for visit in range(nodes.offsets[row], nodes.offsets[row + 1]):
            node = nodes.visits[visit]
            end = nodes.ends[node] // factor
            if number[node] >= 0:
                visits[visited] = number[node]
                visited += 1
        tails[request] = chain - end
        rows[request] = row
        unique += chain - end
        request += 1
    offsets[requests] = visited
    return Paths(
        offsets,
        visits[:visited].copy(),
        tails,
        lengths[:count].copy(),
        bases[:count].copy(),
        rows,
        longest,
        shared,
        unique,
        accesses,
        True,
    )
