"""Offered load against what the engines serve: whether a run's TTFT means anything."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtraces.words import counted

LEAST_REQUESTS = 50
"""Fewer requests on an engine are a burst, not a load."""


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
        overloaded_engines: The numbers of those whose queue does: the last half of their arrivals all found requests
            waiting, and more in the last quarter than in the one before.
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
        return {**asdict(self), "overloaded_engines": list(self.overloaded_engines), "says": self.sentence()}

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
        if self.sustained:
            return f"{offered} offered, and {who} them"
        return f"{offered} offered, but {who} {served}: the queue grows without bound, so no TTFT is given"

    @property
    def burst(self) -> bool:
        """Whether most requests had no first token yet when the last one arrived: they were there, and then served."""
        return self.span_s <= 0 or 2 * self.served_requests_per_s < self.offered_requests_per_s

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
    overloaded, backlog = [], 0
    for number in range(engines):
        own = engine == number
        waiting = _waiting(enqueued[own], scheduled[own])
        backlog += int(waiting[-1]) if len(waiting) else 0
        if len(waiting) >= LEAST_REQUESTS and np.ptp(arrived[own]) > 0 and _grows(waiting):
            overloaded.append(number)
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
        overloaded_engines=tuple(overloaded),
        backlog_at_end=backlog,
    )


def _waiting(enqueued: NDArray[np.float64], scheduled: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return how many earlier requests each arrival finds waiting, in order of arrival."""
    order = np.sort(enqueued)
    return np.arange(len(order)) - np.searchsorted(np.sort(scheduled), order, side="right")


def _grows(waiting: NDArray[np.int64]) -> bool:
    half, quarter = len(waiting) // 2, len(waiting) // 4
    last = waiting[half:]
    return bool(last.min() > 0 and last[-quarter:].mean() > 1.1 * last[:-quarter].mean())
