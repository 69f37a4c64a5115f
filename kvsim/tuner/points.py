"""One setting of a sweep and its figures."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Times:
    """TTFT of some requests in seconds: mean, median and 95th percentile (numpy's linear interpolation)."""

    mean_s: float
    p50_s: float
    p95_s: float

    @classmethod
    def of(cls, ttft_s: FloatArray) -> "Times":
        """Return the figures of an array [n], n >= 1."""
        p50, p95 = quantiles(ttft_s, (0.5, 0.95))
        return cls(float(ttft_s.mean()), p50, p95)


def quantiles(values: FloatArray, levels: tuple[float, ...]) -> list[float]:
    """Return numpy's linear quantiles of values [n]; one partial sort for all of them."""
    places = [level * (len(values) - 1) for level in levels]
    low = [int(place) for place in places]
    high = [min(i + 1, len(values) - 1) for i in low]
    ordered = np.partition(values, sorted({*low, *high}))
    return [
        float(ordered[i] + (ordered[j] - ordered[i]) * (place - i))
        for place, i, j in zip(places, low, high, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a setting does for some requests.

    Attributes:
        requests: How many.
        input_tokens: Their prompt tokens.
        hit_tokens: Prompt tokens found in L1.
        loaded_tokens: Those of them that are loaded: the others are faster computed anew.
        ttft: With the cache.
        no_cache: Without one.
    """

    requests: int
    input_tokens: int
    hit_tokens: int
    loaded_tokens: int
    ttft: Times
    no_cache: Times

    @property
    def token_hit_ratio(self) -> float:
        """Hit tokens of all prompt tokens."""
        return self.hit_tokens / self.input_tokens if self.input_tokens else 0.0

    @property
    def saved_mean_s(self) -> float:
        """Mean TTFT saved against no cache, in seconds."""
        return self.no_cache.mean_s - self.ttft.mean_s

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name: counts, ratios to 6 decimals, seconds to 9."""
        return {
            "hit_tokens": self.hit_tokens,
            "loaded_tokens": self.loaded_tokens,
            "token_hit_ratio": round(self.token_hit_ratio, 6),
            "ttft_mean_s": round(self.ttft.mean_s, 9),
            "ttft_p50_s": round(self.ttft.p50_s, 9),
            "ttft_p95_s": round(self.ttft.p95_s, 9),
            "ttft_mean_saved_s": round(self.saved_mean_s, 9),
            "ttft_p50_saved_s": round(self.no_cache.p50_s - self.ttft.p50_s, 9),
            "ttft_p95_saved_s": round(self.no_cache.p95_s - self.ttft.p95_s, 9),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One setting and its figures.

    Attributes:
        chunk_tokens: Tokens of a chunk.
        l1_size_gb: L1 in GiB, all ranks together; infinite for an unbounded cache.
        capacity_chunks: The chunks that fit; None for an unbounded cache.
        policy: The eviction policy.
        hit_chunks: Leading resident chunks, summed over all requests.
        cold: The whole log, from an empty cache.
        warm: The requests from `warm_from` on.
        warm_from: The first request after the cache had filled, but at the latest the one half-way through the log:
            what a cache does that has run for a while.
        filled: Whether the cache had filled by then.
    """

    chunk_tokens: int
    l1_size_gb: float
    capacity_chunks: int | None
    policy: str
    hit_chunks: int
    cold: Figures
    warm: Figures
    warm_from: int
    filled: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the setting and its figures as plain JSON values."""
        return {
            "chunk_tokens": self.chunk_tokens,
            "l1_size_gb": self.l1_size_gb if self.capacity_chunks is not None else None,
            "capacity_chunks": self.capacity_chunks,
            "policy": self.policy,
            "hit_chunks": self.hit_chunks,
            **self.cold.to_dict(),
            "warm": {
                "from_request": self.warm_from,
                "requests": self.warm.requests,
                "filled": self.filled,
                **self.warm.to_dict(),
            },
        }
