"""Offered load against what the engines serve: whether a run's TTFT means anything."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtraces.words import counted

LEAST_REQUESTS = 50
"""Fewer requests do not say whether a queue grows."""
_NEARLY_ALL = 0.95
"""For so much of the last half of the time requests wait at an engine that cannot keep up."""
_UNSERVED = 0.1
"""Where more of the requests have no first token when the last one arrives, it is not seen that they can be served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What came in against what went out, over all engines, while requests arrived.

    Attributes:
        engines: How many.
        requests: Requests that were let in.
        prompt_tokens: Their prompt tokens.
        refused_requests: Requests that were not.
        span_s: From the first arrival to the last, of those let in.
        offered_requests_per_s: Requests over that span; 0 where all arrive at once, which is no rate.
        offered_prompt_tokens_per_s: Their prompt tokens.
        served_requests_per_s: Requests that had their first token before the last arrival. Where the load is not
            sustained, this is the engines' capacity.
        served_prompt_tokens_per_s: Their prompt tokens.
        sustained: Whether no engine's queue grows without bound.
        overloaded_engines: The numbers of those whose queue does: nearly all through the last half of the time in which
            requests arrive some wait there, and more in the last quarter than in the one before. Engines that get few
            requests each are judged together.
        backlog_at_end: Requests waiting at the last arrival.
    """

    engines: int
    requests: int
    prompt_tokens: int
    refused_requests: int
    span_s: float
    offered_requests_per_s: float
    offered_prompt_tokens_per_s: float
    served_requests_per_s: float
    served_prompt_tokens_per_s: float
    sustained: bool
    overloaded_engines: tuple[int, ...]
    backlog_at_end: int

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as an object that JSON can carry, with the sentence that sums them up."""
        told = {"keeps_up": self.keeps_up, "says": self.sentence()}
        return {**asdict(self), "overloaded_engines": list(self.overloaded_engines), **told}

    def sentence(self) -> str:
        """Return what a reader has to know, in one line."""
        if not self.requests:
            return f"nothing is served: every request is refused, all {self.refused_requests:,}"
        who = "one engine serves" if self.engines == 1 else f"{self.engines} engines serve"
        offered = (
            f"{self.offered_requests_per_s:.2f} requests/s ({self.offered_prompt_tokens_per_s:,.0f} prompt tokens/s)"
        )
        served = f"{self.served_requests_per_s:.2f} requests/s ({self.served_prompt_tokens_per_s:,.0f} prompt tokens/s)"
        if self.sustained and self.burst:
            many = f"{counted(self.requests, 'request')} ({self.prompt_tokens:,} prompt tokens)"
            return f"{many} {self._within()}: a burst, which does not say what rate can be served"
        if self.keeps_up:
            return f"{offered} offered, and {who} them"
        if self.sustained:
            unsure = "too few requests to tell whether that load can be served, or too many of them at the end"
            return f"{offered} offered, and {who} {served} while they come: {unsure}"
        return f"{offered} offered, but {who} {served}: the queue grows without bound, so no TTFT is given"

    @property
    def burst(self) -> bool:
        """Whether most requests had no first token yet when the last one arrived: they were there, and then served."""
        return self.span_s <= 0 or 2 * self.served_requests_per_s < self.offered_requests_per_s

    @property
    def keeps_up(self) -> bool:
        """Whether the engines serve what is offered: the load is sustained, and nearly all was served as it came."""
        unserved = self.requests - round(self.served_requests_per_s * self.span_s)
        return self.sustained and not self.burst and unserved <= max(self.engines, _UNSERVED * self.requests)

    def _within(self) -> str:
        if self.requests == 1:
            return "and no other"
        return f"within {self.span_s:.3g} s" if self.span_s > 0 else "at once"


def offered_load(columns: Mapping[str, NDArray[np.generic]], engines: int) -> Load:
    """Judge a run by its columns (`RunResult.columns`)."""
    served = ~columns["refused"].astype(bool)
    arrived = columns["arrived_s"][served].astype(np.float64)
    tokens = columns["prompt_tokens"][served].astype(np.float64)
    first = arrived + columns["ttft_s"][served].astype(np.float64)
    enqueued = arrived + columns["handling_s"][served].astype(np.float64)
    scheduled = enqueued + (columns["queue_s"] + columns["load_s"])[served].astype(np.float64)  # type: ignore[operator]
    engine = columns["engine"][served].astype(np.int64)
    span = float(arrived.max() - arrived.min()) if len(arrived) else 0.0
    rate = 1 / span if span > 0 else 0.0
    before = first <= (arrived.max() if len(arrived) else 0.0)
    backlog = sum(_backlog(enqueued[engine == number], scheduled[engine == number]) for number in range(engines))
    overloaded: list[int] = []
    for group in _groups(np.bincount(engine, minlength=engines)):
        own = np.isin(engine, group)
        if own.sum() >= LEAST_REQUESTS and np.ptp(arrived[own]) > 0:
            overloaded += group if _grows(engine[own], enqueued[own], scheduled[own]) else []
    return Load(
        engines=engines,
        requests=len(arrived),
        prompt_tokens=int(tokens.sum()),
        refused_requests=int((~served).sum()),
        span_s=span,
        offered_requests_per_s=len(arrived) * rate,
        offered_prompt_tokens_per_s=float(tokens.sum()) * rate,
        served_requests_per_s=int(before.sum()) * rate,
        served_prompt_tokens_per_s=float(tokens[before].sum()) * rate,
        sustained=not overloaded,
        overloaded_engines=tuple(sorted(overloaded)),
        backlog_at_end=backlog,
    )


def _groups(requests: NDArray[np.int64]) -> list[list[int]]:
    """Return which engines to judge together, by how many requests each gets: those with few, and the others alone."""
    few = (requests > 0) & (requests < LEAST_REQUESTS)
    alone = np.flatnonzero(requests >= LEAST_REQUESTS).tolist()
    return [*([number] for number in alone), np.flatnonzero(few).tolist()]


def _backlog(enqueued: NDArray[np.float64], scheduled: NDArray[np.float64]) -> int:
    """Return how many earlier requests the last one finds waiting."""
    if not len(enqueued):
        return 0
    return len(enqueued) - 1 - int(np.count_nonzero(scheduled <= enqueued.max()))


def _grows(engine: NDArray[np.int64], enqueued: NDArray[np.float64], scheduled: NDArray[np.float64]) -> bool:
    """Whether these engines cannot keep up: by time, not by request, for a busy minute at the end is no overload."""
    first, last = float(enqueued.min()), float(enqueued.max())
    half, quarter = first + (last - first) / 2, first + 3 * (last - first) / 4
    waits = [_waits_s(enqueued[engine == one], scheduled[engine == one], half, last) for one in np.unique(engine)]
    if np.mean(waits) < _NEARLY_ALL * (last - half):
        return False
    earlier, later = (
        np.clip(scheduled, since, until).sum() - np.clip(enqueued, since, until).sum()
        for since, until in ((half, quarter), (quarter, last))
    )
    return bool(later > 1.1 * earlier)


def _waits_s(enqueued: NDArray[np.float64], scheduled: NDArray[np.float64], since: float, until: float) -> float:
    """Return for how much of a time at least one request waits."""
    order = np.argsort(enqueued)
    begins, ends = np.clip(enqueued[order], since, until), np.clip(scheduled[order], since, until)
    reached = np.maximum.accumulate(ends)
    before = np.concatenate([[since], reached[:-1]])
    return float(np.maximum(0.0, reached - np.maximum(begins, before)).sum())
