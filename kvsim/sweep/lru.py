"""Least recently used, for all capacities at once.

Mattson, Gecsei, Slutz, Traiger, "Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970: under
LRU every cache holds the top of one stack, so a chunk hits in the caches of at least its depth.

Since chunks are inserted and touched tail to head, a request leaves its chain on top of the stack head first, above
the old stack without it. A chunk lies above all that follow it in a chain, so no cache holds a chunk without those
before it; hence this order comes about whatever the capacity, also where only the head of a chain is admitted. What
later requests leave of a chain are its last nodes, contiguous in the stack; so the nodes of a chain that the same
request used last are a run whose depths are consecutive, and one sum over later requests gives all of them.
"""

from typing import NamedTuple

import numpy as np

from kvsim.sweep.jit import inlined, kernel
from kvsim.sweep.paths import Ints, Longs, Paths

FAN = 7
"""log2 of the requests, and of the groups of requests, that are summed up in one number of the next level."""


class Runs(NamedTuple):
    """The runs of all requests, in order; those of a request head first."""

    request: Ints
    above: Ints
    """The chunks above the run in the stack."""
    length: Ints
    """The chunks in the run."""


class Sums(NamedTuple):
    """The chunks on the stack that each request was the last to use, and their sums over groups of requests."""

    single: Ints
    group: Ints
    groups: Ints


def runs(paths: Paths) -> Runs:
    """Return the runs of `paths`, which must be a tree."""
    requests = len(paths.tails)
    user = np.full(len(paths.lengths), -1, np.int32)
    sums = Sums(*(np.zeros((requests >> level * FAN) + 1, np.int32) for level in range(3)))
    found = Runs(*(np.empty(len(paths.nodes), np.int32) for _ in Runs._fields))
    count = write_runs(paths, user, sums, found)
    return Runs(*(column[:count] for column in found))


@kernel
def write_runs(paths: Paths, user: Ints, sums: Sums, found: Runs) -> int:
    """Write all runs to `found` and return how many they are; `user` is the last request that used each node, or -1."""
    count = 0
    for request in range(len(paths.tails)):
        chunks = 0
        last = -1
        for visit in range(paths.offsets[request], paths.offsets[request + 1]):
            node = paths.nodes[visit]
            before = user[node]
            user[node] = request
            if before >= 0:
                if before != last:
                    # The request's chunks so far lay above too, but have been taken off the stack.
                    found.request[count] = request
                    found.above[count] = chunks + later_chunks(sums, before, request)
                    found.length[count] = 0
                    count += 1
                    last = before
                found.length[count - 1] += paths.lengths[node]
                add(sums, before, -paths.lengths[node])
            chunks += paths.lengths[node]
        add(sums, request, chunks + paths.tails[request])
    return count


@inlined
def add(sums: Sums, request: int, chunks: int) -> None:
    """Add `chunks` to those of `request`."""
    sums.single[request] += np.int32(chunks)
    sums.group[request >> FAN] += np.int32(chunks)
    sums.groups[request >> 2 * FAN] += np.int32(chunks)


@inlined
def later_chunks(sums: Sums, request: int, end: int) -> int:
    """Return the chunks of the requests after `request` and before `end`, from which on there are none yet."""
    group = (request >> FAN) + 1
    groups = (request >> 2 * FAN) + 1
    return (
        total(sums.single, request + 1, min(end, group << FAN))
        + total(sums.group, group, min((end >> FAN) + 1, groups << FAN))
        + total(sums.groups, groups, (end >> 2 * FAN) + 1)
    )


@inlined
def total(numbers: Ints, begin: int, end: int) -> int:
    """Return the sum of `numbers[begin:end]`."""
    found = 0
    for place in range(begin, end):
        found += numbers[place]
    return found


def hits_of_requests(runs: Runs, requests: int, capacity: int) -> Ints:
    """Return the hits of every request in a cache of `capacity` chunks."""
    hits = np.clip(capacity - runs.above, 0, runs.length)
    found = np.zeros(requests, np.int32)
    np.add.at(found, runs.request, hits)
    return found


@kernel
def write_hits_of_capacities(runs: Runs, capacities: Longs, whole: Longs, part: Longs) -> None:
    """Add up the hits in a cache of each of `capacities`, which ascend.

    `whole[i]` are the hits from capacity i on: of the runs that it holds whole and the one before does not. `part[i]`
    are those of capacity i alone.
    """
    for run in range(len(runs.above)):
        above = runs.above[run]
        length = runs.length[run]
        place = 0
        while place < len(capacities) and capacities[place] <= above:
            place += 1
        while place < len(capacities) and capacities[place] < above + length:
            part[place] += capacities[place] - above
            place += 1
        whole[place] += length


def hits_of_capacities(runs: Runs, capacities: Longs) -> Longs:
    """Return the hits of all requests together in a cache of each of `capacities`, which ascend."""
    whole = np.zeros(len(capacities) + 1, np.int64)
    part = np.zeros(len(capacities), np.int64)
    write_hits_of_capacities(runs, capacities, whole, part)
    hits: Longs = part + whole.cumsum()[:-1]
    return hits


def hits_of_all_capacities(runs: Runs, unique: int) -> Longs:
    """Return [unique + 1] the hits of all requests together in a cache of every capacity from 0 up."""
    first = np.bincount(runs.above + 1, minlength=unique + 1)
    after = np.bincount(runs.above + runs.length + 1, minlength=unique + 1)
    ending = first[: unique + 1] - after[: unique + 1]
    hits: Longs = ending.cumsum().cumsum()
    return hits
