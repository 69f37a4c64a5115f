"""From measured points to grids: the server's own time, the fitted forms, the points that could not be measured."""

from collections.abc import Callable, Mapping

import numpy as np

from kvcore.policy.fit import non_negative
from kvsim.profiles import Grid, PrefillFit

Points = Mapping[tuple[int, int], float]
Form = Callable[[float, float], float]


def handling(prefill: Points, decode: Points) -> tuple[float, float]:
    """Return the server's own time for a request: a base and a part for each prompt token, in seconds.

    The step that computes one token behind a cached prefix is a decode step; what such a TTFT takes longer is not the
    engine's. Neither part is negative.
    """
    shortest = min(new for new, _ in prefill)
    alone = {context: seconds for (batch, context), seconds in decode.items() if batch == 1}
    contexts = sorted(alone)
    rows = sorted((new + cached, seconds) for (new, cached), seconds in prefill.items() if new == shortest)
    tokens = np.array([row[0] for row in rows], dtype=np.float64)
    extra = np.array([row[1] for row in rows]) - np.interp(tokens, contexts, [alone[c] for c in contexts])
    if len(rows) < 2:
        return max(0.0, float(extra[0])), 0.0
    slope, base = np.polyfit(tokens, extra, 1)
    if slope < 0 or base < 0:
        slope, base = (0.0, extra.mean()) if slope < 0 else (float(np.median(extra / np.maximum(tokens, 1))), 0.0)
    return max(0.0, float(base)), max(0.0, float(slope))


def undisturbed(points: Points) -> dict[tuple[int, int], float]:
    """Return each point's time, or that of one that computes more behind as much or more, where that took less.

    What disturbs an engine only adds to its times, and no step is faster for computing more.
    """
    return {(new, cached): min(s for (n, c), s in points.items() if n >= new and c >= cached) for new, cached in points}


def fit_prefill(points: Points) -> PrefillFit:
    """Return the fitted form of prefill times, by least squares of the relative error; no term is negative."""
    rows = sorted(points.items())
    n = np.array([new for (new, _), _ in rows], dtype=np.float64)
    c = np.array([cached for (_, cached), _ in rows], dtype=np.float64)
    seconds = np.array([value for _, value in rows])
    base, linear, quadratic = non_negative(np.stack([np.ones_like(n), n, n * (n + 2 * c)], axis=1), seconds)
    return PrefillFit(floor_s=float(seconds.min()), base_s=base, linear_s=linear, quadratic_s=quadratic)


def prefill_grid(points: Points, fit: PrefillFit) -> Grid:
    """Return the grid of the measured points; the others follow the fit from the next one with less cached."""
    return _grid(points, fit.at)


def decode_grid(points: Points) -> Grid:
    """Return the grid of the measured points; the others follow a form that is linear in the batch and its tokens."""
    rows = sorted(points.items())
    b = np.array([batch for (batch, _), _ in rows], dtype=np.float64)
    context = np.array([tokens for (_, tokens), _ in rows], dtype=np.float64)
    seconds = np.array([value for _, value in rows])
    terms = non_negative(np.stack([np.ones_like(b), b, b * context], axis=1), seconds)
    return _grid(points, lambda x, y: terms[0] + terms[1] * x + terms[2] * x * y)


def _grid(points: Points, form: Form) -> Grid:
    x, y = sorted({a for a, _ in points}), sorted({b for _, b in points})
    rows = []
    for a in x:
        row: list[float] = []
        for b in y:
            value = points.get((a, b))
            if value is None:
                measured = [known for known in y if (a, known) in points and known < b]
                ratio = points[a, measured[-1]] / form(a, measured[-1]) if measured else 1.0
                value = ratio * form(a, b)
            row.append(max(value, 1e-9))
        rows.append(tuple(row))
    return Grid(tuple(x), tuple(y), tuple(rows))


def spread(repeats: Mapping[tuple[str, int, int], list[float]]) -> float | None:
    """Return the median over points of (largest - smallest) / median of their repeats; None without repeats."""
    shares = [(max(values) - min(values)) / float(np.median(values)) for values in repeats.values() if len(values) > 1]
    return float(np.median(shares)) if shares else None
