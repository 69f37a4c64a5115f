"""The charts of a tuning run, whatever draws them."""

from collections.abc import Iterable

import numpy as np

from kvsim.plots import Chart, FloatArray, Series
from kvsim.report.units import gib
from kvsim.tuner.points import Point
from kvsim.tuner.result import TuneResult

_CDF_POINTS = 400


def charts(result: TuneResult) -> dict[str, Chart]:
    """Return the charts by name, in the order in which they are shown."""
    return {"hit_ratio": hit_ratio(result), "ttft_cdf": ttft_cdf(result), "marginal_gain": marginal_gain(result)} | (
        {"policies": policies(result)} if len({point.policy for point in result.points}) > 1 else {}
    )


def hit_ratio(result: TuneResult) -> Chart:
    """Return hit ratio against L1 size, a line a chunk size, under the recommended policy, with the knee marked."""
    here = result.point
    sizes = sorted({point.chunk_tokens for point in result.points})
    lines = [
        _line(f"{size:,}", (p for p in result.points if (p.chunk_tokens, p.policy) == (size, here.policy)))
        for size in sizes
    ]
    mark = (here.l1_size_gb, here.cold.token_hit_ratio, f"{gib(here.l1_size_gb)}") if result.pays else None
    return Chart(
        title=f"Prompt tokens found in L1, by tokens of a chunk ({here.policy})",
        x_name="L1 size, GiB",
        y_name="token hit ratio",
        series=lines,
        log_x=True,
        mark=mark,
        percent=True,
    )


def policies(result: TuneResult) -> Chart:
    """Return hit ratio against L1 size, a line a policy, at the recommended chunk size."""
    here = result.point
    names = list(dict.fromkeys(point.policy for point in result.points))
    lines = [
        _line(name, (p for p in result.points if (p.chunk_tokens, p.policy) == (here.chunk_tokens, name)))
        for name in names
    ]
    return Chart(
        title=f"Prompt tokens found in L1, by policy (chunks of {here.chunk_tokens:,} tokens)",
        x_name="L1 size, GiB",
        y_name="token hit ratio",
        series=lines,
        log_x=True,
        percent=True,
    )


def ttft_cdf(result: TuneResult) -> Chart:
    """Return the share of requests with their first token by a time, with and without the recommended cache."""
    return Chart(
        title="Requests with their first token by then, unqueued",
        x_name="TTFT, s",
        y_name="share of requests",
        series=[_cdf("with L1", result.ttft_s), _cdf("no cache", result.no_cache_s)],
        log_x=True,
        percent=True,
    )


def marginal_gain(result: TuneResult) -> Chart:
    """Return what a GiB more adds to the hit ratio, by L1 size, for the recommended chunk size and policy."""
    here = result.point
    points = _by_size(p for p in result.points if (p.chunk_tokens, p.policy) == (here.chunk_tokens, here.policy))
    sizes = np.array([point.l1_size_gb for point in points])
    ratios = np.array([point.cold.token_hit_ratio for point in points])
    if len(points) == 1:  # nothing to compare it with but no cache at all
        sizes, ratios = np.append(0.0, sizes), np.append(0.0, ratios)
    gain = np.maximum(100 * np.diff(ratios) / np.diff(sizes), 0.0)
    line = Series(f"{here.chunk_tokens:,} tokens, {here.policy}", sizes[1:], gain)
    marked = np.flatnonzero(line.x == here.l1_size_gb)
    mark = (here.l1_size_gb, float(gain[marked[0]]), gib(here.l1_size_gb)) if result.pays and len(marked) else None
    return Chart(
        title="Gain of another GiB",
        x_name="L1 size, GiB",
        y_name="points of hit ratio a GiB",
        series=[line],
        log_x=True,
        mark=mark,
    )


def _by_size(points: Iterable[Point]) -> list[Point]:
    return sorted(points, key=lambda point: point.l1_size_gb)


def _line(name: str, points: Iterable[Point]) -> Series:
    ordered = _by_size(points)
    return Series(name, np.array([p.l1_size_gb for p in ordered]), np.array([p.cold.token_hit_ratio for p in ordered]))


def _cdf(name: str, ttft_s: FloatArray) -> Series:
    """Return a distribution at as many quantiles as a chart can show."""
    levels = np.linspace(0, 1, min(len(ttft_s), _CDF_POINTS))
    return Series(name, np.quantile(ttft_s, levels), levels)
