"""Fitting costs: the form of `LoadCost` and of profiles, to measured times."""

import numpy as np
from numpy.typing import NDArray


def non_negative(columns: NDArray[np.float64], seconds: NDArray[np.float64]) -> tuple[float, ...]:
    """Return the factors of `columns` (points, terms) closest to `seconds` (points): none of them is negative.

    Least squares of the relative error, dropping the most negative term until none is negative.
    """
    kept = list(range(columns.shape[1]))
    while True:
        scaled = columns[:, kept] / seconds[:, None]
        size = np.abs(scaled).max(axis=0)
        found = np.linalg.lstsq(scaled / size, np.ones(len(seconds)), rcond=None)[0] / size
        if len(kept) == 1 or (found >= 0).all():
            terms = dict(zip(kept, found.tolist(), strict=True))
            return tuple(max(0.0, terms.get(i, 0.0)) for i in range(columns.shape[1]))
        kept.pop(int(np.argmin(found * size)))
