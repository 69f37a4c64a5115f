"""Settling a sweep by simulation: its best settings under load, with tiers, a TTFT target and prices."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from kvsim.engine.arrivals import refused, why_refused
from kvsim.engine.load import Load
from kvsim.engine.settings import MOST, RunSettings, SettingsError
from kvsim.errors import UsageError
from kvsim.runner import RunResult, run_many
from kvsim.tuner.points import Point
from kvsim.tuner.rule import Choice, Rule
from kvtraces import Log

DEFAULT_TOP = 8
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What a server costs, in one currency.

    Attributes:
        gpu_hour: A GPU for an hour.
        ram_gb_hour: A GiB of L1 for an hour.
        disk_gb_hour: A GiB of L2 for an hour.
    """

    gpu_hour: float = 0.0
    ram_gb_hour: float = 0.0
    disk_gb_hour: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a price that is none."""
        for name in ("gpu_hour", "ram_gb_hour", "disk_gb_hour"):
            if not 0 <= getattr(self, name) <= MOST:
                flag = f"--price-{name.replace('_', '-')}"
                raise UsageError(f"{flag} {getattr(self, name):g}: not negative, and at most {MOST:g}")

    def an_hour(self, settings: RunSettings) -> float | None:
        """Return what a setting's servers cost an hour; None for a tier without end."""
        if settings.l1_gb is None or settings.l2_gb is None:
            return None
        gpus = settings.engines * settings.profile.tensor_parallel
        return self.gpu_hour * gpus + self.ram_gb_hour * settings.l1_gb + self.disk_gb_hour * settings.l2_gb


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What to simulate of a sweep.

    Attributes:
        base: The engines, the load and the rest; chunk size, policy, sizes and the number of engines are replaced.
        top: How many of the sweep's settings: the best one at some L1 sizes, evenly chosen, that which the sweep
            recommends and the largest among them; where there are more than sizes, the next best at the recommended
            size. An L1 far below one engine's L0 holds little that L0 does not: such sizes come last.
        engines: Numbers of engine instances to try each with.
        l2_sizes_gb: L2 sizes to try each with; 0 is none.
        slo_ttft_p95_s: The target: p95 of TTFT at most so many seconds.
        prices: What servers cost.
        workers: Processes.
        cluster: A Ray cluster's address, to simulate there (see `kvsim.cluster.run_on_cluster`).
    """

    base: RunSettings
    top: int = DEFAULT_TOP
    engines: tuple[int, ...] = (1,)
    l2_sizes_gb: tuple[float, ...] = (0.0,)
    slo_ttft_p95_s: float | None = None
    prices: Prices | None = None
    workers: int = field(default=2)
    cluster: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be tried."""
        if self.top < 1:
            raise UsageError(f"--simulate {self.top}: at least 1, or 0 for none")
        if self.workers < 1:
            raise UsageError(f"{self.workers} workers: at least 1")
        if not self.engines or not self.l2_sizes_gb:
            raise UsageError("--engines and --l2-sizes-gb: an empty list")
        if any(not 0 <= size <= MOST for size in self.l2_sizes_gb):
            raise UsageError(f"--l2-sizes-gb: sizes are not negative, and at most {MOST:g}")
        if self.slo_ttft_p95_s is not None and not 0 < self.slo_ttft_p95_s < math.inf:
            raise UsageError(f"--slo-ttft-p95 {self.slo_ttft_p95_s:g}: seconds, above zero")

    def refused(self, log: Log) -> int:
        """Return how many requests every setting refuses. Raises SettingsError where that is all of them."""
        count = int(refused(log, self.base).sum())
        if count == len(log):
            raise SettingsError(
                f"nothing can be simulated: every request is refused, all {count:,}: {why_refused(self.base)}"
            )
        return count

    @property
    def least_gb(self) -> float:
        """The L1 size below which one is enough to try: an eighth of L0; 0 where several engines share L1."""
        return self.base.l0_gib / 8 if max(self.engines) == 1 else 0.0

    def settings(self, point: Point | None, l2_gb: float, engines: int) -> RunSettings:
        """Return the setting of a point of the sweep; of no cache for None. Raises SettingsError."""
        if point is None:
            return replace(self.base, engines=engines, l1_gb=0.0, l2_gb=0.0)
        return replace(
            self.base,
            engines=engines,
            chunk_tokens=point.chunk_tokens,
            policy=point.policy,
            l1_gb=point.l1_size_gb,
            l2_gb=l2_gb,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A setting that was simulated.

    Attributes:
        settings: What was run.
        point: The sweep's figures of it; None for no cache.
        load: What was offered and served.
        ttft_mean_s: Mean TTFT in seconds; None where the engines cannot sustain the load.
        ttft_s: Percentiles of TTFT in seconds; None each likewise.
        figures: The run's other figures, as `RunResult.summary` has them.
        meets_target: Whether p95 is within the target; None without a target.
        cost: Price of a million prompt tokens served; None without prices, or where the engines do not keep up.
    """

    settings: RunSettings
    point: Point | None
    load: Load
    ttft_mean_s: float | None
    ttft_s: Mapping[str, float | None]
    figures: Mapping[str, Any]
    meets_target: bool | None
    cost: float | None

    @property
    def good(self) -> bool:
        """Whether its engines keep up with the load, within the target if there is one."""
        return self.load.keeps_up and self.meets_target is not False

    def to_dict(self) -> dict[str, Any]:
        """Return the setting and its figures as plain JSON values."""
        settings, kept = self.settings, ("hit_tokens", "loaded_tokens", "queue_s", "load_s", "prefill_s")
        return {
            "engines": settings.engines,
            "chunk_tokens": None if self.point is None else settings.chunk_tokens,
            "l1_size_gb": settings.l1_gb,
            "l2_size_gb": settings.l2_gb,
            "policy": None if self.point is None else settings.policy,
            "sustained": self.load.sustained,
            "meets_slo": self.meets_target,
            "ttft_mean_s": self.ttft_mean_s,
            "ttft_s": dict(self.ttft_s),
            "cost_per_million_prompt_tokens": self.cost,
            **{name: self.figures[name] for name in (*kept, "refused_requests", "utilisation", "load", "warnings")},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What the simulations settled.

    Attributes:
        trial: What was asked for.
        no_cache: Without L1 and L2, by number of engines.
        tried: The settings with a cache.
        refused: Requests that every one of them refuses: the figures, and the target, are of the others.
        chosen: What is recommended, which may be no cache; None where no setting is good.
        reason: Why, in one sentence.
    """

    trial: Trial
    no_cache: tuple[Tried, ...]
    tried: tuple[Tried, ...]
    refused: int
    chosen: Tried | None
    reason: str

    def without(self, engines: int) -> Tried:
        """Return the run without a cache on so many engines."""
        return next(one for one in self.no_cache if one.settings.engines == engines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        trial = self.trial
        prices = trial.prices
        return {
            "rate_scale": trial.base.rate_scale,
            "routing": trial.base.routing,
            "l0_blocks": trial.base.l0_blocks,
            "max_model_len": trial.base.model_len,
            "refused_requests": self.refused,
            "slo_ttft_p95_s": trial.slo_ttft_p95_s,
            "prices": None
            if prices is None
            else {name: getattr(prices, name) for name in ("gpu_hour", "ram_gb_hour", "disk_gb_hour")},
            "no_cache": [one.to_dict() for one in self.no_cache],
            "settings": [one.to_dict() for one in self.tried],
            "chosen": None if self.chosen is None else self.chosen.to_dict(),
            "reason": self.reason,
        }


def candidates(points: Sequence[Point], choice: Choice, top: int, least_gb: float = 0.0) -> list[Point]:
    """Return the settings of a sweep to simulate, by ascending L1 size: see `Trial.top`.

    Where there are more sizes than that, those below `least_gb` and the recommended one come last, all but one.
    """
    frontier = list(choice.frontier)
    small = sum(point.l1_size_gb < min(least_gb, choice.point.l1_size_gb) for point in frontier)
    frontier = frontier[max(0, min(len(frontier) - top, small - 1)) :]
    if top >= len(frontier):
        here = choice.point.l1_size_gb
        rest = [point for point in points if point.l1_size_gb == here and point not in frontier]
        rest.sort(key=lambda point: -point.cold.saved_mean_s)
        picked = frontier + rest[: top - len(frontier)]
    else:
        places = np.rint(np.linspace(0, len(frontier) - 1, top)).astype(int).tolist()
        here = frontier.index(choice.point) if choice.point in frontier else places[0]
        if here not in places:  # the largest size stays: what it saves is what the others are measured by
            nearest = min(range(1, top - 1) or [0], key=lambda i: abs(places[i] - here))
            places[nearest] = here
        picked = [frontier[place] for place in places]
    return sorted(picked, key=lambda point: point.l1_size_gb)


def settle(
    log: Log, points: Sequence[Point], choice: Choice, trial: Trial, rule: Rule, progress: Progress | None
) -> Settled:
    """Simulate the best settings of a sweep, and no cache, and choose.

    With a target, the cheapest setting that meets it, no cache included, and the sweep's sizes next below are simulated
    until one does not: by price, without prices by fewest engines,
    then smallest L1, then smallest L2. Without one, on the fewest engines that sustain the load, the smallest L1 whose
    mean TTFT saves within `rule.within` of the most that any saves.

    Raises:
        SettingsError: A setting that cannot be run with this log.
    """
    turned_away = trial.refused(log)
    engines = sorted(set(trial.engines))
    wanted: list[tuple[Point | None, float, int]] = [(None, 0.0, count) for count in engines]
    lower = sorted(set(trial.l2_sizes_gb))
    wanted += list(product(candidates(points, choice, trial.top, trial.least_gb), lower, engines))
    settings = [trial.settings(*one) for one in wanted]
    results = run_many(log, settings, workers=trial.workers, cluster=trial.cluster, progress=progress)
    tried = [_tried(trial, point, result) for (point, _, _), result in zip(wanted, results, strict=True)]
    bare, cached = tuple(tried[: len(engines)]), tuple(tried[len(engines) :])
    chosen, reason = _chosen(bare, cached, trial, rule)
    if trial.slo_ttft_p95_s is not None and chosen is not None:
        further = _smaller(log, choice, trial, chosen, cached)
        cached = tuple(sorted((*cached, *further), key=lambda one: one.settings.l1_gb or 0.0))
        chosen, reason = _chosen(bare, cached, trial, rule)
    if turned_away:
        reason = f"{reason}, not counting {turned_away:,} of {len(log):,} requests, which are refused"
    return Settled(trial=trial, no_cache=bare, tried=cached, refused=turned_away, chosen=chosen, reason=reason)


def _smaller(log: Log, choice: Choice, trial: Trial, chosen: Tried, cached: Sequence[Tried]) -> list[Tried]:
    """Simulate the sweep's next smaller sizes below one that meets the target, until one does not or is known."""
    known = [one.settings for one in cached]
    found: list[Tried] = []
    below = [point for point in choice.frontier if point.l1_size_gb < (chosen.settings.l1_gb or 0.0)]
    for point in reversed(below):
        setting = trial.settings(point, chosen.settings.l2_gb or 0.0, chosen.settings.engines)
        if setting in known or (found and not found[-1].good):
            break
        (result,) = run_many(log, [setting], workers=1, cluster=trial.cluster)
        found.append(_tried(trial, point, result))
    return found


def _tried(trial: Trial, point: Point | None, result: RunResult) -> Tried:
    load, p95 = result.load, result.ttft_s["p95"]
    target = trial.slo_ttft_p95_s
    an_hour = None if trial.prices is None else trial.prices.an_hour(result.settings)
    rate = load.offered_prompt_tokens_per_s
    return Tried(
        settings=result.settings,
        point=point,
        load=load,
        ttft_mean_s=result.ttft_s["mean"],
        ttft_s=result.ttft_s,
        figures=result.summary(),
        meets_target=None if target is None else p95 is not None and p95 <= target,
        cost=None if an_hour is None or not load.keeps_up or not rate else an_hour / (3600 * rate) * 1e6,
    )


def _chosen(bare: Sequence[Tried], cached: Sequence[Tried], trial: Trial, rule: Rule) -> tuple[Tried | None, str]:
    good = [one for one in (*bare, *cached) if one.good]
    target = trial.slo_ttft_p95_s
    if not good:
        return None, _none_good([*bare, *cached], target)
    if target is not None:
        if trial.prices is not None:
            best = min(good, key=lambda one: (one.cost if one.cost is not None else math.inf, *_size(one), _mean(one)))
            return best, f"the cheapest of {len(good)} simulated settings with p95 TTFT within {target:g} s"
        best = min(good, key=lambda one: (*_size(one), _mean(one)))
        return best, f"the smallest of {len(good)} simulated settings with p95 TTFT within {target:g} s"
    fewest = min(one.settings.engines for one in good)
    here = [one for one in good if one.settings.engines == fewest]
    return _knee(here, rule)


def _knee(good: Sequence[Tried], rule: Rule) -> tuple[Tried, str]:
    """Choose among settings of one number of engines, no cache possibly among them."""
    bare = next((one for one in good if one.point is None), None)
    cached = [one for one in good if one.point is not None]
    if not cached and bare is not None:
        return bare, "no setting with a cache sustains the load, none at all does"
    best = min(_mean(one) for one in cached)
    if bare is None:
        enough, reason = best * (1 + rule.within), "without a cache these engines cannot serve the load"
    else:
        gain = _mean(bare) - best
        if gain <= 0 or gain < rule.worth * _mean(bare):
            share = 100 * gain / _mean(bare)
            return (
                bare,
                f"reuse does not pay under this load: the best simulated setting saves {share:.2f}% of the mean TTFT",
            )
        enough = _mean(bare) - (1 - rule.within) * gain
        reason = f"the smallest simulated L1 that saves within {100 * rule.within:g}% of the most mean TTFT"
    return min((one for one in cached if _mean(one) <= enough), key=lambda one: (*_size(one), _mean(one))), reason


def lacking(tried: Sequence[Tried]) -> str | None:
    """Return what no setting does with the load; None where some keep up, so that what none meets is the target."""
    if any(one.load.keeps_up for one in tried):
        return None
    return "is seen to sustain the load" if any(one.load.sustained for one in tried) else "sustains the load"


def _none_good(tried: Sequence[Tried], target: float | None) -> str:
    if (what := lacking(tried)) is not None:
        unsure = [one for one in tried if one.load.sustained]
        most = max(unsure or tried, key=lambda one: (one.settings.engines, one.load.served_prompt_tokens_per_s))
        return f"no simulated setting {what}; the best: {most.load.sentence()}"
    able = [one for one in tried if one.load.keeps_up]
    nearest = min(able, key=lambda one: one.ttft_s["p95"] or math.inf)
    return f"no simulated setting has p95 TTFT within {target:g} s; the nearest has {nearest.ttft_s['p95']:.3g} s"


def _size(one: Tried) -> tuple[float, ...]:
    settings = one.settings
    tiers = (math.inf if size is None else size for size in (settings.l1_gb, settings.l2_gb))
    return (settings.engines, *tiers)


def _mean(one: Tried) -> float:
    return math.inf if one.ttft_mean_s is None else one.ttft_mean_s
