"""When requests arrive, and which are let in."""

import numpy as np
from numpy.typing import NDArray

from kvsim.engine.settings import RunSettings, SettingsError
from kvtraces import Log

COARSE_MS = 100.0
"""Steps of a log's times from which on those of one time queue for each other; most prefills are shorter."""
LEAST_TIMES = 10
"""Fewer different times tell no step."""
TIED_SHARE = 0.1
"""Fewer requests of one time with others change little."""


def arrival_times(log: Log, settings: RunSettings) -> NDArray[np.float64]:
    """Return when each request of a log arrives, in seconds from the first one.

    Raises:
        SettingsError: The log is empty, or has one time alone and is to be spread.
    """
    count = len(log)
    if not count:
        raise SettingsError("the log has no requests")
    if settings.arrivals in ("recorded", "spread"):
        times = log.timestamp_ms if settings.arrivals == "recorded" else _spread(log.timestamp_ms)
        return np.asarray(1e-3 * (times - times.min()) / settings.rate_scale)
    rate = (settings.rate_per_s or 1.0) * settings.rate_scale
    if settings.arrivals == "uniform":
        return np.arange(count) / rate
    gaps = np.random.default_rng(settings.seed).exponential(1 / rate, count)
    return np.asarray(np.cumsum(gaps) - gaps[0])


def _spread(timestamp_ms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return times [n] of which those that are equal are spread evenly over the log's step, in their order.

    None comes after what is later in the log, where steps are uneven.
    """
    times, which, counts = np.unique(timestamp_ms, return_inverse=True, return_counts=True)
    if len(times) == 1:
        raise SettingsError("arrivals spread: all requests have one time, which tells no step; give uniform")
    room = np.append(np.minimum(np.diff(times), _step_ms(times)), _step_ms(times))
    order = np.argsort(timestamp_ms, kind="stable")
    place = np.empty(len(timestamp_ms), np.int64)
    place[order] = np.arange(len(timestamp_ms)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.asarray(timestamp_ms + (room / counts)[which] * place)


def _step_ms(times_ms: NDArray[np.float64]) -> float:
    """Return the step of different times, which ascend: few are closer. Mooncake's steps of 3 s are 2.997 to 3.003."""
    return float(np.quantile(np.diff(times_ms), 0.05, method="lower"))


def coarse_times(log: Log, settings: RunSettings) -> str | None:
    """Return what to say of recorded times whose steps are so coarse that requests arrive in bunches; None if not."""
    if settings.arrivals != "recorded" or not len(log):
        return None
    times, counts = np.unique(log.timestamp_ms, return_counts=True)
    tied = int(counts[counts > 1].sum())
    if len(times) < LEAST_TIMES or tied < TIED_SHARE * len(log) or (step_ms := _step_ms(times)) < COARSE_MS:
        return None
    return (
        f"the log's times are in steps of {1e-3 * step_ms:.3g} s, and {tied:,} of {len(log):,} requests share theirs: "
        "taken as arriving at once they wait for each other, and TTFT is too long; --arrivals spread spreads them over "
        "the step"
    )


def refused(log: Log, settings: RunSettings) -> NDArray[np.bool_]:
    """Return which requests are turned away: no prompt, longer than the model's length, or than the GPU's cache."""
    tokens = log.input_tokens + log.output_tokens
    return np.asarray((log.input_tokens < 1) | (tokens > min(settings.model_len, settings.l0_tokens)))


def why_refused(settings: RunSettings) -> str:
    """Return what `refused` turns away, in words."""
    return (
        f"longer with their output than the model's {settings.model_len:,} tokens or the GPU's cache of "
        f"{settings.l0_tokens:,}, or without a prompt"
    )
