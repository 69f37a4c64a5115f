"""The cost functions of a profile: a measured grid, a fitted form, a transfer curve."""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Grid:
    """Seconds over a rectangle of two counts, interpolated bilinearly.

    That is exact where a step's cost is linear in each of the two, as it is in the batch, in the context of its
    requests, and in the tokens cached in front of a prompt; between two counts of new tokens, whose attention to each
    other grows with the square, it is a hair too long. (A straight line between logarithms bows out above such costs,
    by a twentieth between points that lie a factor of four apart.) Beyond the last points the slope goes on; below the
    first ones the time stays.

    Attributes:
        x: Ascending counts above zero: new tokens, or the batch.
        y: Ascending counts from zero: cached tokens, or a request's context.
        seconds: `seconds[i][j]` is the time at `x[i], y[j]`, above zero.
    """

    x: tuple[int, ...]
    y: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Refuse a grid that cannot be interpolated."""
        if len(self.x) < 2 or len(self.y) < 2:
            raise ValueError("a grid needs two points on each axis")
        if any(b <= a for axis in (self.x, self.y) for a, b in pairwise(axis)):
            raise ValueError("a grid's axes ascend")
        if self.x[0] < 1 or self.y[0] < 0:
            raise ValueError("a grid's axes start at 1 and 0 or above")
        if len(self.seconds) != len(self.x) or any(len(row) != len(self.y) for row in self.seconds):
            raise ValueError(f"a grid of {len(self.x)} x {len(self.y)} points")
        if any(not 0 < value < math.inf for row in self.seconds for value in row):
            raise ValueError("a grid's times are above zero and finite")

    def at(self, x: float, y: float) -> float:
        """Return the time at one point, in seconds; plain floats, for the simulator's inner loop."""
        return self.row(x)(y)

    def row(self, x: float) -> Callable[[float], float]:
        """Return `at` for one x: a function of y, for who asks about the same x many times."""
        xs, ys = self.x, self.y
        i = bisect_right(xs, x, 1, len(xs) - 1) - 1
        u = (max(x, xs[0]) - xs[i]) / (xs[i + 1] - xs[i])
        times = tuple(_between(low, high, u) for low, high in zip(self.seconds[i], self.seconds[i + 1], strict=True))
        first, last = ys[0], len(ys) - 1

        def at(y: float) -> float:
            j = bisect_right(ys, y, 1, last) - 1
            return _between(times[j], times[j + 1], (max(y, first) - ys[j]) / (ys[j + 1] - ys[j]))

        return at

    def at_array(self, x: ArrayLike, y: ArrayLike) -> FloatArray:
        """Return the times at many points, in seconds; x and y broadcast, and so is the result shaped."""
        xs, ys, seconds = np.array(self.x, float), np.array(self.y, float), np.array(self.seconds)
        a, b = np.broadcast_arrays(np.maximum(np.asarray(x, float), xs[0]), np.maximum(np.asarray(y, float), ys[0]))
        i = np.minimum(np.searchsorted(xs, a, side="right"), len(xs) - 1) - 1
        j = np.minimum(np.searchsorted(ys, b, side="right"), len(ys) - 1) - 1
        u = (a - xs[i]) / (xs[i + 1] - xs[i])
        v = (b - ys[j]) / (ys[j + 1] - ys[j])
        lower, upper = (_between_arrays(seconds[i, k], seconds[i + 1, k], u) for k in (j, j + 1))
        return _between_arrays(lower, upper, v)

    def beyond(self, x: float, y: float) -> bool:
        """Return whether a point lies past the grid's last points, where the time is an extrapolation."""
        return x > self.x[-1] or y > self.y[-1]


def _between(low: float, high: float, share: float) -> float:
    """Return what lies at a share of the way, or beyond it; not below both, where disturbed points slope downwards."""
    return max(low + share * (high - low), min(low, high))


def _between_arrays(low: FloatArray, high: FloatArray, share: FloatArray) -> FloatArray:
    return np.maximum(low + share * (high - low), np.minimum(low, high))


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillFit:
    """Prefill of n new tokens behind c cached ones: `max(floor, base + linear n + quadratic n (n + 2 c))` seconds."""

    floor_s: float
    base_s: float
    linear_s: float
    quadratic_s: float

    def __post_init__(self) -> None:
        """Refuse a form that runs backwards in time."""
        if min(self.floor_s, self.base_s, self.linear_s, self.quadratic_s) < 0:
            raise ValueError("a fit's terms are not negative")

    def at(self, new: float, cached: float) -> float:
        """Return the time of one prefill, in seconds."""
        return max(self.floor_s, self.base_s + new * (self.linear_s + self.quadratic_s * (new + 2 * cached)))

    def at_array(self, new: ArrayLike, cached: ArrayLike) -> FloatArray:
        """Return the times of many, in seconds."""
        n, c = np.asarray(new, dtype=np.float64), np.asarray(cached, dtype=np.float64)
        return np.maximum(self.floor_s, self.base_s + n * (self.linear_s + self.quadratic_s * (n + 2 * c)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCurve:
    """A link in one direction: how fast copies of each size go.

    Between the measured sizes the time is interpolated linearly in the size; below the first one it shrinks to
    `latency_s`; past the last one the last rate goes on.

    Attributes:
        sizes: Ascending sizes of a copy, in bytes.
        bytes_per_s: The rate of a copy of each size, latency included.
        latency_s: The time of a copy of no bytes.
    """

    sizes: tuple[int, ...]
    bytes_per_s: tuple[float, ...]
    latency_s: float = 0.0
    _times: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse a curve with no points, or where a larger copy is done sooner."""
        if not self.sizes or len(self.sizes) != len(self.bytes_per_s):
            raise ValueError("a transfer curve has a rate for each of its sizes, at least one")
        if self.sizes[0] < 1 or self.latency_s < 0 or any(rate <= 0 for rate in self.bytes_per_s):
            raise ValueError("a transfer curve's sizes and rates are above zero")
        times = (self.latency_s, *(size / rate for size, rate in zip(self.sizes, self.bytes_per_s, strict=True)))
        object.__setattr__(self, "_times", times)
        if any(b < a for a, b in pairwise(times)) or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError("a transfer curve's sizes ascend, and larger copies do not take less time")

    @property
    def peak_bytes_per_s(self) -> float:
        """The rate of the largest measured copy."""
        return self.bytes_per_s[-1]

    def at(self, size: float) -> float:
        """Return the time of one copy of `size` bytes, in seconds; none for none."""
        if size <= 0:
            return 0.0
        sizes, times = self.sizes, self._times
        i = bisect_right(sizes, size)
        if i == len(sizes):
            return times[-1] + (size - sizes[-1]) / self.bytes_per_s[-1]
        before = sizes[i - 1] if i else 0
        return times[i] + (times[i + 1] - times[i]) * (size - before) / (sizes[i] - before)

    def at_array(self, size: ArrayLike) -> FloatArray:
        """Return the times of many copies, in seconds."""
        wanted = np.asarray(size, dtype=np.float64)
        sizes, times = np.array((0, *self.sizes), dtype=np.float64), np.array(self._times)
        inside = np.interp(wanted, sizes, times)
        past = times[-1] + (wanted - sizes[-1]) / self.peak_bytes_per_s
        return np.where(wanted <= 0, 0.0, np.where(wanted > sizes[-1], past, inside))
