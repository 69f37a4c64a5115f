"""What a tuning run found, as objects, numpy columns and JSON."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvsim.engine.settings import RunSettings
from kvsim.profiles.load import to_json
from kvsim.tuner.points import FloatArray, Point, Times
from kvsim.tuner.pricing import Costs
from kvsim.tuner.rule import Choice, Rule
from kvsim.tuner.trial import Settled, Tried


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSummary:
    """The log in figures: see the names. All but the last two are of the requests that an engine does not refuse."""

    requests: int
    block_tokens: int
    input_tokens: int
    output_tokens: int
    duration_s: float
    skipped_rows: int
    refused_requests: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        rate = self.requests / self.duration_s if self.duration_s else None
        return {
            "requests": self.requests,
            "block_tokens": self.block_tokens,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "mean_input_tokens": round(self.input_tokens / self.requests, 3),
            "duration_s": round(self.duration_s, 3),
            "requests_per_s": None if rate is None else round(rate, 6),
            "skipped_rows": self.skipped_rows,
            "refused_requests": self.refused_requests,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """Hits lost because only whole chunks are cached, against chunks of the log's own block.

    Attributes:
        finest_tokens: That block.
        lost_tokens: Hit tokens lost by an unbounded cache.
        lost_ratio: The same, of all prompt tokens.
        lost_ratio_here: Lost at the recommended L1 and policy; below zero where coarse chunks hit more.
    """

    finest_tokens: int
    lost_tokens: int
    lost_ratio: float
    lost_ratio_here: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        return {
            "finest_chunk_tokens": self.finest_tokens,
            "unbounded_lost_tokens": self.lost_tokens,
            "unbounded_lost_ratio": round(self.lost_ratio, 6),
            "lost_ratio": round(self.lost_ratio_here, 6),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TuneResult:
    """A recommendation and everything it rests on. Shapes: n requests that are not refused, s settings.

    Attributes:
        log: The log's summary.
        costs: The cost profile and the KV's size.
        engine: What an engine takes, and holds in its own cache.
        rule: The thresholds of the choice.
        choice: What was chosen, and the best setting of each L1 size.
        points: [s] every setting swept.
        unbounded: The recommended chunk size in a cache without end.
        unbounded_finest: The smallest chunk size swept in a cache without end.
        belady: The recommended chunk size and L1 under Belady's bound.
        next_gib: The recommended setting with one GiB more.
        alignment: Hits lost to whole chunks.
        input_tokens: [n] prompt lengths.
        hit_tokens: [n] what the recommended setting hits.
        ttft_s: [n] its TTFT in seconds.
        no_cache_s: [n] TTFT without a cache.
        notes: What a reader must know beside the figures, one sentence each.
        left_out: The note that says which requests are in no figure; None where all are.
        settled: What was simulated; None where nothing was.
    """

    log: LogSummary
    costs: Costs
    engine: RunSettings
    rule: Rule
    choice: Choice
    points: tuple[Point, ...]
    unbounded: Point
    unbounded_finest: Point
    belady: Point
    next_gib: Point
    alignment: Alignment
    input_tokens: NDArray[np.int64]
    hit_tokens: NDArray[np.int64]
    ttft_s: FloatArray
    no_cache_s: FloatArray
    notes: tuple[str, ...]
    left_out: str | None = None
    settled: Settled | None = None

    @property
    def pays(self) -> bool:
        """Whether reuse pays."""
        return self.choice.pays

    @property
    def point(self) -> Point:
        """The recommended setting; where reuse does not pay, the one that saves most."""
        return self.choice.point

    @property
    def next_size(self) -> Point | None:
        """The recommended chunk size and policy at the next larger L1 swept; None at the largest."""
        here = self.point
        larger = [
            point
            for point in self.points
            if (point.chunk_tokens, point.policy) == (here.chunk_tokens, here.policy)
            and point.l1_size_gb > here.l1_size_gb
        ]
        return min(larger, key=lambda point: point.l1_size_gb, default=None)

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the sweep as columns [s] by name, in the order of `points`."""
        rows = [point.to_dict() for point in self.points]
        return {name: np.array([row[name] for row in rows]) for name in rows[0] if name != "warm"} | {
            f"warm_{name}": np.array([row["warm"][name] for row in rows]) for name in rows[0]["warm"]
        }

    def recommendation(self) -> dict[str, Any]:
        """Return the recommendation as plain JSON values; without a setting where reuse does not pay.

        Where settings were simulated, TTFT is that of the simulation (null where no setting is good), and that of the
        sweep is under `unqueued`; `meets_slo` is of the requests that are not refused.
        """
        cold = self.point.cold
        common = {"pays": self.pays, "no_cache": _times("ttft", cold.no_cache), "notes": list(self.notes)}
        if not self.pays:
            nothing = {"chunk_tokens": None, "l1_size_gb": 0.0, "capacity_chunks": 0, "policy": None}
            found = {**nothing, **_without(cold.no_cache), **common, "best_setting": self.point.to_dict()}
        else:
            found = {
                **self.point.to_dict(),
                "cold": {"from_request": 0, "requests": cold.requests, **cold.to_dict()},
                **common,
                "chunk_bytes": self.costs.kv.chunk_bytes(self.point.chunk_tokens),
                "next_gib": self._gain(self.next_gib),
                "next_size": None if self.next_size is None else self._gain(self.next_size),
                "of_unbounded": self._share(self.unbounded),
                "of_belady": self._share(self.belady),
                "alignment": self.alignment.to_dict(),
            }
        return found if self.settled is None else {**found, **_under_load(found, self.settled)}

    def _gain(self, larger: Point) -> dict[str, Any]:
        """Return what a larger L1 adds to the recommended one."""
        more, here = larger.cold, self.point.cold
        return {
            "l1_size_gb": larger.l1_size_gb,
            "gained_token_hit_ratio": round(more.token_hit_ratio - here.token_hit_ratio, 6),
            "ttft_mean_saved_s": round(here.ttft.mean_s - more.ttft.mean_s, 9),
            "ttft_p50_saved_s": round(here.ttft.p50_s - more.ttft.p50_s, 9),
            "ttft_p95_saved_s": round(here.ttft.p95_s - more.ttft.p95_s, 9),
        }

    def _share(self, bound: Point) -> float | None:
        """Return the recommended setting's hits as a fraction of a bound's."""
        return round(self.point.cold.hit_tokens / bound.cold.hit_tokens, 6) if bound.cold.hit_tokens else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the per-request arrays as plain JSON values."""
        kv = self.costs.kv
        return {
            "recommendation": self.recommendation(),
            "ceiling": {
                "unbounded": self._ceiling(self.unbounded),
                "unbounded_finest": self._ceiling(self.unbounded_finest),
                "belady": self._ceiling(self.belady),
            },
            "frontier": [point.to_dict() for point in self.choice.frontier],
            "rule": {"within": self.rule.within, "near": self.rule.near, "worth": self.rule.worth},
            "log": self.log.to_dict(),
            "engine": {"l0_gb": round(self.engine.l0_gib, 6), "max_model_len": self.engine.model_len},
            "kv": {
                "stored_bytes_per_token": kv.stored_bytes_per_token,
                "moved_bytes_per_token": kv.moved_bytes_per_token,
                "packed_share": kv.packed_share,
            },
            "profile": json.loads(to_json(self.costs.profile)),
            "sweep": [point.to_dict() for point in self.points],
            **({} if self.settled is None else {"simulated": self.settled.to_dict()}),
        }

    def _ceiling(self, bound: Point) -> dict[str, Any]:
        """Return a bound; an unbounded cache with the GiB that it grows to."""
        return bound.to_dict() | {"l1_size_gb": round(bound.l1_size_gb, 6)}


def _times(prefix: str, times: Times) -> dict[str, float]:
    return {f"{prefix}_{name}": round(getattr(times, name), 9) for name in ("mean_s", "p50_s", "p95_s")}


def _without(times: Times) -> dict[str, Any]:
    nothing = {"hit_tokens": 0, "loaded_tokens": 0, "token_hit_ratio": 0.0}
    saved = dict.fromkeys(("ttft_mean_saved_s", "ttft_p50_saved_s", "ttft_p95_saved_s"), 0.0)
    return {**nothing, **_times("ttft", times), **saved}


_TIMES = ("ttft_mean_s", "ttft_p50_s", "ttft_p95_s")
_SAVED = ("ttft_mean_saved_s", "ttft_p50_saved_s", "ttft_p95_saved_s")


def _under_load(found: dict[str, Any], settled: Settled) -> dict[str, Any]:
    """Return what a simulation puts in the place of a recommendation's figures, and adds to them."""
    chosen = settled.chosen
    engines = max(settled.trial.engines) if chosen is None else chosen.settings.engines
    with_, without = _simulated_times(chosen), _simulated_times(settled.without(engines))
    saved = {
        name: None if before is None or after is None else round(before - after, 9)
        for name, before, after in zip(_SAVED, without.values(), with_.values(), strict=True)
    }
    return {
        **with_,
        **saved,
        "no_cache": without,
        "unqueued": {**{name: found[name] for name in (*_TIMES, *_SAVED)}, "no_cache": found["no_cache"]},
        "engines": engines,
        "l2_size_gb": 0.0 if chosen is None else chosen.settings.l2_gb,
        "sustained": chosen is not None or any(one.load.keeps_up for one in settled.tried),
        "refused_requests": settled.refused,
        "meets_slo": False if chosen is None and settled.trial.slo_ttft_p95_s is not None else _meets(chosen),
        "cost_per_million_prompt_tokens": None if chosen is None else chosen.cost,
        "reason": settled.reason,
    }


def _meets(chosen: Tried | None) -> bool | None:
    return None if chosen is None else chosen.meets_target


def _simulated_times(one: Tried | None) -> dict[str, float | None]:
    if one is None:
        return dict.fromkeys(_TIMES)
    values = (one.ttft_mean_s, one.ttft_s["p50"], one.ttft_s["p95"])
    return {name: None if value is None else round(value, 9) for name, value in zip(_TIMES, values, strict=True)}
