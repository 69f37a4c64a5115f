"""Exact figures of one setting: hits from the sweep, TTFT from the cost profile."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvsim.errors import UsageError
from kvsim.sweep import Chains, hit_chunks, lru_curve
from kvsim.sweep.chains import chains_of_sizes
from kvsim.sweep.paths import Paths
from kvsim.tuner.points import Figures, FloatArray, IntArray, Point, Times
from kvsim.tuner.pricing import Costs
from kvtraces import Log


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkedLog:
    """A log at one chunk size.

    Attributes:
        chains: The prompts' full chunks.
        distinct: [n] how many different chunks requests 0 to i hold together.
    """

    chains: Chains
    distinct: IntArray

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return self.chains.chunk_tokens

    def warm_from(self, capacity: int | None) -> tuple[int, bool]:
        """Return the first request after a cache of `capacity` chunks had filled, and whether it had by the middle one.

        The middle one is the latest that is returned. Nothing is evicted before a cache is full, so it fills when so
        many different chunks have been stored.
        """
        n = len(self.distinct)
        full = n if capacity is None else int(np.searchsorted(self.distinct, capacity)) + 1
        return min(full, n // 2), full <= n // 2


def chunked_logs(log: Log, sizes: Sequence[int]) -> dict[int, ChunkedLog]:
    """Return a log at several chunk sizes. Raises UsageError for a log that no prefix cache can have seen."""
    try:
        found = chains_of_sizes(log, sizes)
    except ValueError as error:  # a prompt that names a block twice: hashes that do not chain
        raise UsageError(str(error)) from error
    return {
        size: ChunkedLog(chains=chains, distinct=_distinct(chains.paths, len(log))) for size, chains in found.items()
    }


def _distinct(paths: Paths, requests: int) -> IntArray:
    """Return [n] how many different chunks the first requests hold together.

    Nodes are numbered in order of their first visit, so those seen so far are all up to the highest number seen.
    """
    new = np.zeros(requests, np.int64)
    if len(paths.nodes):
        ends = np.append(paths.bases, paths.shared).astype(np.int64)
        seen = np.maximum.accumulate(np.append(np.int32(-1), paths.nodes))[paths.offsets]
        new[paths.rows] = np.diff(ends[seen + 1])
    new[paths.rows] += paths.tails
    return np.cumsum(new)


class Evaluator:
    """A log and its costs: gives the figures of any setting."""

    def __init__(self, log: Log, costs: Costs) -> None:
        """Compute what every setting is compared with: TTFT without a cache."""
        self.log = log
        self.costs = costs
        self.no_cache_s: FloatArray = costs.recompute_s(log.input_tokens)
        self._no_cache = {0: Times.of(self.no_cache_s)}

    def hit_tokens(self, chunked: ChunkedLog, policy: str, capacity: int | None) -> IntArray:
        """Return the hit tokens of every request: [n]."""
        hits: IntArray = hit_chunks(chunked.chains, policy, capacity).astype(np.int64) * chunked.chunk_tokens
        return hits

    def priced(self, chunked: ChunkedLog) -> "Priced":
        """Return a chunk size's TTFT for every hit that any setting can give: pays off from a few settings on."""
        return Priced(self.costs, self.log.input_tokens, self.no_cache_s, chunked)

    def point(self, priced: "Priced", policy: str, capacity: int | None, l1_size_gb: float | None = None) -> Point:
        """Return a setting's figures; an L1 without end has the size that it grows to."""
        return self.detail(priced, policy, capacity, l1_size_gb)[0]

    def detail(
        self, priced: "Priced", policy: str, capacity: int | None, l1_size_gb: float | None = None
    ) -> tuple[Point, IntArray, FloatArray]:
        """Return a setting's figures, its hit tokens [n] and its TTFT [n] in seconds."""
        chunked = priced.chunked
        chunks = hit_chunks(chunked.chains, policy, capacity)
        hits = chunks.astype(np.int64) * chunked.chunk_tokens
        ttft = priced.ttft_s(chunks)
        loaded = np.where(ttft < self.no_cache_s, hits, 0)
        warm_from, filled = chunked.warm_from(capacity)
        if l1_size_gb is None:
            kept = int(chunked.distinct[-1]) if capacity is None else capacity
            l1_size_gb = self.costs.kv.size_gb(kept, chunked.chunk_tokens)
        point = Point(
            chunk_tokens=chunked.chunk_tokens,
            l1_size_gb=l1_size_gb,
            capacity_chunks=capacity,
            policy=policy,
            hit_chunks=int(chunks.sum()),
            cold=self._figures(0, hits, loaded, ttft),
            warm=self._figures(warm_from, hits, loaded, ttft),
            warm_from=warm_from,
            filled=filled,
        )
        return point, hits, ttft

    def _figures(self, first: int, hits: IntArray, loaded: IntArray, ttft: FloatArray) -> Figures:
        no_cache = self._no_cache.get(first)
        if no_cache is None:
            no_cache = self._no_cache[first] = Times.of(self.no_cache_s[first:])
        return Figures(
            requests=len(hits) - first,
            input_tokens=int(self.log.input_tokens[first:].sum()),
            hit_tokens=int(hits[first:].sum()),
            loaded_tokens=int(loaded[first:].sum()),
            ttft=Times.of(ttft[first:]),
            no_cache=no_cache,
        )


class Priced:
    """TTFT of every request for every hit that it can have, at one chunk size.

    No cache hits more than one without end, so a request has few possible hits, and all settings of a chunk size
    look their TTFT up in one table.
    """

    def __init__(self, costs: Costs, input_tokens: IntArray, no_cache_s: FloatArray, chunked: ChunkedLog) -> None:
        """Compute the table, some rows at a time."""
        self.chunked = chunked
        most = hit_chunks(chunked.chains, "lru", None).astype(np.int64)
        ends = np.cumsum(most + 1)
        self._starts = ends - most - 1
        self._table = np.empty(int(ends[-1]), np.float64)
        first = 0
        while first < len(most):
            end = max(int(np.searchsorted(ends, self._starts[first] + _SLAB)), first + 1)
            rows = np.repeat(np.arange(first, end), most[first:end] + 1)
            low = int(self._starts[first])
            hits = (np.arange(low, low + len(rows)) - self._starts[rows]) * chunked.chunk_tokens
            self._table[low : low + len(rows)], _ = costs.ttft_s(input_tokens[rows], hits, no_cache_s[rows])
            first = end

    def ttft_s(self, hit_chunks: NDArray[np.int32]) -> FloatArray:
        """Return TTFT [n] in seconds for the hits [n] of a setting."""
        ttft: FloatArray = self._table[self._starts + hit_chunks]
        return ttft


_SLAB = 1 << 20
"""Rows of a table that are computed at once: some tens of MiB of intermediate figures."""


def useful_range(chunked: ChunkedLog) -> tuple[int, int]:
    """Return the capacities in chunks between which a cache gains: from a hundredth to all but a 200th of the gain.

    The gain is what LRU hits beyond a cache of one chunk. Where it hits no more than that, or has no single curve, the
    ends are one chunk and all of them.
    """
    most = max(chunked.chains.unique, 1)
    if not chunked.chains.paths.is_tree:
        return 1, most
    curve = lru_curve(chunked.chains)
    first, last = int(curve[min(1, len(curve) - 1)]), int(curve[-1])
    if first == last:
        return 1, most
    low, high = np.searchsorted(curve, (first + 0.01 * (last - first), first + 0.995 * (last - first)))
    return int(low), int(high)


def one_chunk_gains(chunked: ChunkedLog) -> bool:
    """Whether a cache of one chunk hits a hundredth of what one without end does: the head that all prompts share."""
    if not chunked.chains.paths.is_tree:
        return True  # not known: no curve
    curve = lru_curve(chunked.chains)
    return int(curve[min(1, len(curve) - 1)]) > 0.01 * int(curve[-1])
