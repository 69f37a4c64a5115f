"""Predicted against recorded, request by request: how far a simulation is off, where, and why."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvsim.engine.arrivals import why_refused
from kvsim.engine.settings import RunSettings, SettingsError
from kvsim.engine.simulation import Progress
from kvsim.runner import PERCENTILES, RunResult, run
from kvtraces import Log
from kvtraces.words import counted

Floats = NDArray[np.float64]
PARTS = ("queue", "load", "prefill")
HITS = {"l0": "l0_tokens", "l1": "matched_l1", "l2": "matched_l2", "loaded": "loaded_tokens"}
"""What is compared of the hits: our name, and the column of both the run and the trace schema."""
BINS = 20
_RESAMPLES = 500
"""Of the bootstrap over requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """Hit tokens of one tier, over the requests that have them recorded and are not refused by the simulation."""

    requests: int
    predicted: int
    recorded: int
    error: float | None
    """predicted / recorded - 1; None where nothing was recorded but something predicted."""
    equal_requests: float
    """Share of the requests for which both are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantile:
    """One percentile of TTFT, in seconds, and how far the prediction is off."""

    predicted_s: float
    recorded_s: float
    error: float
    """predicted / recorded - 1."""
    low: float
    """95% interval of the error for these arrivals, by a bootstrap over blocks of requests in a row (`redrawn`)."""
    high: float
    baseline_s: float
    baseline_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PartError:
    """One part of TTFT: means in seconds, and its share of the absolute error of all parts."""

    predicted_s: float
    recorded_s: float
    mean_absolute_error_s: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Requests of similar prompt length: where the error is."""

    from_tokens: int
    to_tokens: int
    requests: int
    predicted_s: float
    recorded_s: float
    error: float
    why: str | None
    """The part that is furthest off there; None where the log has no parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worst:
    """A request far off."""

    request: int
    prompt_tokens: int
    predicted_s: float
    recorded_s: float
    why: str | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Validation:
    """How a prediction compares with what was recorded.

    Attributes:
        requests: Rows of the log.
        compared: Rows whose TTFT is recorded.
        hits: By tier, and `loaded`; those that the log records.
        ttft: By percentile.
        mean_absolute_error_s: Of TTFT, request by request.
        median_relative_error: Median over requests of |predicted / recorded - 1|.
        baseline_mean_absolute_error_s: Of the baseline, the mean TTFT of other requests of similar prompt length.
        beats_baseline: Whether the simulation's mean absolute error is the smaller one.
        parts: Queue, load and prefill; empty where the log does not record them.
        groups: By prompt length, the worst first.
        worst: The ten requests that are furthest off.
        cdf: `share` (0 to 1), and at each the `predicted_s`, `recorded_s` and `baseline_s` TTFT.
        result: The simulation.
    """

    requests: int
    compared: int
    hits: Mapping[str, Hits]
    ttft: Mapping[str, Quantile]
    mean_absolute_error_s: float
    median_relative_error: float
    baseline_mean_absolute_error_s: float
    beats_baseline: bool
    parts: Mapping[str, PartError]
    groups: tuple[Group, ...]
    worst: tuple[Worst, ...]
    cdf: Mapping[str, Floats]
    result: RunResult

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as an object that JSON can carry; the run's own under `run`."""
        plain = ("requests", "compared", "mean_absolute_error_s", "median_relative_error", "beats_baseline")
        return {
            **{name: getattr(self, name) for name in plain},
            "baseline_mean_absolute_error_s": self.baseline_mean_absolute_error_s,
            "hits": {name: asdict(hits) for name, hits in self.hits.items()},
            "ttft": {name: asdict(quantile) for name, quantile in self.ttft.items()},
            "parts": {name: asdict(part) for name, part in self.parts.items()},
            "groups": [asdict(group) for group in self.groups],
            "worst": [asdict(worst) for worst in self.worst],
            "cdf": {name: values.tolist() for name, values in self.cdf.items()},
            "run": self.result.summary(),
        }


def validate(
    log: Log,
    settings: RunSettings,
    *,
    handling: bool = True,
    progress: Progress | None = None,
) -> Validation:
    """Simulate a recorded log and compare.

    The settings' profile must not have been calibrated on this log. The baseline that every second request is compared
    with is fitted on those between, and theirs on these, so its data are disjoint too.

    Args:
        log: A log with the column `ttft_ms`; `l0_tokens`, `matched_l1`, `matched_l2`, `loaded_tokens`, `queue_ms`,
            `load_ms` and `prefill_ms` are compared where it has them.
        settings: What it was recorded under.
        handling: Whether the recorded TTFT and queue begin at the request's arrival at the server, as `kvcore serve
            --record` writes them, or only inside the engine, behind the server's own handling.
        progress: As in `run`.

    Raises:
        SettingsError: The log has too few requests with a recorded TTFT, or cannot be run under the settings.
    """
    recorded = 1e-3 * _recorded(log, "ttft_ms")
    result = run(log, settings, baseline=False, progress=progress)
    predicted = result.columns["ttft_s"].astype(np.float64)
    if not handling:
        predicted = predicted - result.columns["handling_s"].astype(np.float64)
    usable = np.flatnonzero(np.isfinite(recorded) & np.isfinite(predicted) & (recorded > 0))
    if len(usable) < 4 * BINS:
        raise SettingsError(_too_few(int((recorded > 0).sum()), len(usable), settings))
    served = np.flatnonzero(~result.columns["refused"].astype(np.bool_))
    arrived = usable[np.argsort(log.timestamp_ms[usable], kind="stable")]
    baseline = from_others(log.input_tokens[usable], recorded[usable])
    parts = {name: _part(log, result, usable, name) for name in PARTS if _has(log, f"{name}_ms", usable)}
    if handling and "queue" in parts:
        there, then = parts["queue"]
        parts["queue"] = there + result.columns["handling_s"].astype(np.float64)[usable], then
    errors = {name: np.abs(there - then) for name, (there, then) in parts.items()}
    error, baseline_error = (
        float(np.mean(np.abs(there - recorded[usable]))) for there in (predicted[usable], baseline)
    )
    return Validation(
        requests=len(log),
        compared=len(usable),
        hits={name: _hits(log, result, column, served) for name, column in HITS.items() if _has(log, column, served)},
        ttft=_quantiles(predicted[arrived], recorded[arrived], baseline, settings.seed),
        mean_absolute_error_s=error,
        median_relative_error=float(np.median(np.abs(predicted[usable] / recorded[usable] - 1))),
        baseline_mean_absolute_error_s=baseline_error,
        beats_baseline=error < baseline_error,
        parts=_parts(parts, errors),
        groups=_groups(log.input_tokens[usable], predicted[usable], recorded[usable], errors),
        worst=_worst(usable, log.input_tokens[usable], predicted[usable], recorded[usable], errors),
        cdf=_cdf(predicted[usable], recorded[usable], baseline),
        result=result,
    )


def _too_few(recorded: int, usable: int, settings: RunSettings) -> str:
    """Return why nothing can be compared."""
    refused = recorded - usable
    but = f", but the simulation refuses {refused:,} of them: {why_refused(settings)}" if refused else ""
    return f"{counted(recorded, 'request')} with a recorded ttft_ms{but}; a comparison needs {4 * BINS} at least"


def from_others(tokens: NDArray[np.int64], ttft: Floats) -> Floats:
    """Return the baseline's TTFT of each request: `mean_by_length` of every second one, for those between."""
    found = np.empty_like(ttft)
    for here, others in ((0, 1), (1, 0)):
        found[here::2] = mean_by_length(tokens[others::2], ttft[others::2], tokens[here::2])
    return found


def mean_by_length(fit_tokens: NDArray[np.int64], fit_ttft: Floats, tokens: NDArray[np.int64]) -> Floats:
    """Return the baseline's TTFT for prompts of `tokens` tokens: the mean of the fitted ones of similar length.

    Similar are those of one of 20 bins with as many fitted requests in each (fewer where lengths repeat).
    """
    edges = np.unique(np.quantile(fit_tokens, np.linspace(0, 1, BINS + 1)[1:-1], method="lower"))
    which = np.searchsorted(edges, fit_tokens, side="right")
    sums, counts = np.bincount(which, fit_ttft, len(edges) + 1), np.bincount(which, minlength=len(edges) + 1)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), fit_ttft.mean())
    return np.asarray(means[np.searchsorted(edges, tokens, side="right")], dtype=np.float64)


def _recorded(log: Log, column: str) -> Floats:
    values = log.extra.get(column)
    if values is None:
        raise SettingsError(f"the log has no {column} column: there is nothing to compare with")
    return values.astype(np.float64)


def _has(log: Log, column: str, rows: NDArray[np.int64]) -> bool:
    values = log.extra.get(column)
    return values is not None and bool(np.isfinite(values.astype(np.float64)[rows]).any())


def _part(log: Log, result: RunResult, rows: NDArray[np.int64], name: str) -> tuple[Floats, Floats]:
    """Return a part of TTFT as predicted and as recorded; what was not recorded is taken as predicted."""
    predicted = result.columns[f"{name}_s"].astype(np.float64)[rows]
    recorded = 1e-3 * _recorded(log, f"{name}_ms")[rows]
    return predicted, np.where(np.isfinite(recorded), recorded, predicted)


def _hits(log: Log, result: RunResult, column: str, served: NDArray[np.int64]) -> Hits:
    recorded = _recorded(log, column)
    rows = served[np.isfinite(recorded[served])]
    there, then = result.columns[column].astype(np.int64)[rows], recorded[rows].astype(np.int64)
    total, real = int(there.sum()), int(then.sum())
    return Hits(
        requests=len(rows),
        predicted=total,
        recorded=real,
        error=total / real - 1 if real else (0.0 if not total else None),
        equal_requests=float(np.mean(there == then)),
    )


def _quantiles(predicted: Floats, recorded: Floats, baseline: Floats, seed: int) -> dict[str, Quantile]:
    rng = np.random.default_rng(seed)
    points = list(PERCENTILES)
    drawn = np.empty((_RESAMPLES, len(points)))
    for i in range(_RESAMPLES):
        rows = redrawn(len(predicted), rng)
        drawn[i] = np.percentile(predicted[rows], points) / np.percentile(recorded[rows], points) - 1
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    there, then, plain = (np.percentile(values, points) for values in (predicted, recorded, baseline))
    return {
        f"p{point}": Quantile(
            predicted_s=float(there[i]),
            recorded_s=float(then[i]),
            error=float(there[i] / then[i] - 1),
            low=float(low[i]),
            high=float(high[i]),
            baseline_s=float(plain[i]),
            baseline_error=float(plain[i] / then[i] - 1),
        )
        for i, point in enumerate(points)
    }


def block_requests(count: int) -> int:
    """Return how many requests in a row `redrawn` keeps together, of `count`.

    The cube root of the count is the order at which the bootstrap's error is least; four times that is a choice: longer
    ones gave no better intervals of queues at 30 to 80% load.
    """
    return round(4 * float(np.cbrt(count)))


def redrawn(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw as many rows as there are, in blocks of neighbours; behind the last row comes the first.

    Requests wait for each other, so neighbours are off alike: drawn one by one they would pass for more evidence than
    they are. Near saturation, where few queues fill a log, the interval by blocks is too narrow still. After Politis
    and Romano, "A circular block-resampling procedure for stationary data", 1992.
    """
    block = block_requests(count)
    begins = rng.integers(0, count, -(-count // block))
    return np.asarray((begins[:, None] + np.arange(block)) % count, dtype=np.int64).ravel()[:count]


def _parts(parts: Mapping[str, tuple[Floats, Floats]], errors: Mapping[str, Floats]) -> dict[str, PartError]:
    total = sum(float(error.mean()) for error in errors.values())
    return {
        name: PartError(
            predicted_s=float(there.mean()),
            recorded_s=float(then.mean()),
            mean_absolute_error_s=float(errors[name].mean()),
            share=float(errors[name].mean()) / total if total else 0.0,
        )
        for name, (there, then) in parts.items()
    }


def _why(errors: Mapping[str, Floats], rows: NDArray[np.int64]) -> str | None:
    return max(errors, key=lambda name: float(errors[name][rows].mean()), default=None)


def _groups(
    tokens: NDArray[np.int64], predicted: Floats, recorded: Floats, errors: Mapping[str, Floats]
) -> tuple[Group, ...]:
    """Split by quartiles of prompt length; the group with the largest relative error comes first."""
    edges = np.unique(np.quantile(tokens, [0.25, 0.5, 0.75]))
    which = np.searchsorted(edges, tokens, side="right")
    groups = []
    for number in np.unique(which).tolist():
        rows = np.flatnonzero(which == number)
        there, then = float(predicted[rows].mean()), float(recorded[rows].mean())
        groups.append(
            Group(
                from_tokens=int(tokens[rows].min()),
                to_tokens=int(tokens[rows].max()),
                requests=len(rows),
                predicted_s=there,
                recorded_s=then,
                error=there / then - 1,
                why=_why(errors, rows),
            )
        )
    return tuple(sorted(groups, key=lambda group: -abs(group.error)))


def _worst(
    requests: NDArray[np.int64],
    tokens: NDArray[np.int64],
    predicted: Floats,
    recorded: Floats,
    errors: Mapping[str, Floats],
) -> tuple[Worst, ...]:
    rows = np.argsort(-np.abs(predicted - recorded), kind="stable")[:10]
    return tuple(
        Worst(
            request=int(requests[row]),
            prompt_tokens=int(tokens[row]),
            predicted_s=float(predicted[row]),
            recorded_s=float(recorded[row]),
            why=_why(errors, np.array([row])),
        )
        for row in rows.tolist()
    )


def _cdf(predicted: Floats, recorded: Floats, baseline: Floats) -> dict[str, Floats]:
    share = np.linspace(0, 1, 201)
    return {
        "share": share,
        "predicted_s": np.quantile(predicted, share),
        "recorded_s": np.quantile(recorded, share),
        "baseline_s": np.quantile(baseline, share),
    }
