"""`tune`: from a log to a recommendation."""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from kvcore.policy import POLICIES
from kvsim.engine.arrivals import refused, why_refused
from kvsim.engine.settings import GIB, RunSettings, SettingsError
from kvsim.errors import UsageError
from kvsim.tuner.evaluate import ChunkedLog, Evaluator, Priced, chunked_logs, one_chunk_gains, useful_range
from kvsim.tuner.grid import (
    check_chunk_sizes,
    check_l1_size,
    check_l1_sizes,
    check_policies,
    default_chunk_sizes,
    smaller,
    spread,
)
from kvsim.tuner.points import Point
from kvsim.tuner.pricing import Costs
from kvsim.tuner.result import Alignment, LogSummary, TuneResult
from kvsim.tuner.rule import Choice, Rule, choose
from kvsim.tuner.trial import Settled, Trial, settle
from kvtraces import Log
from kvtraces.words import counted

DEFAULT_L1_POINTS, MOST_L1_POINTS = 20, 10_000
COMMON_HOST_GB = 2048.0

_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
Progress = Callable[[int, int], None]
"""Called with steps done and steps in all: one a chunk size, one a setting."""


def tune(  # noqa: PLR0913 - what a sweep is
    log: Log,
    costs: Costs,
    *,
    chunk_sizes: Sequence[int] | None = None,
    l1_sizes_gb: Sequence[float] | None = None,
    l1_points: int = DEFAULT_L1_POINTS,
    l1_max_gb: float | None = None,
    policies: Sequence[str] | None = None,
    rule: Rule | None = None,
    threads: int = 2,
    progress: Progress | None = None,
    trial: Trial | None = None,
    trial_progress: Progress | None = None,
    engine: RunSettings | None = None,
) -> TuneResult:
    """Sweep chunk size x L1 size x policy exactly, and recommend one setting by the rule of `kvsim.tuner.rule`.

    TTFT is that of a request alone on an engine without a prefix cache of its own: no queue, nothing else on the link.
    Requests that an engine refuses reach no cache, so they are in no figure.

    With a `trial` the sweep's best settings are then simulated under load, and one of those is recommended.

    Args:
        log: The request log, with block hashes.
        costs: What prefill and copies cost, and the KV's size.
        chunk_sizes: Tokens of a chunk, multiples of the log's block; default: powers of two times the block.
        l1_sizes_gb: L1 sizes in GiB, all ranks together.
        l1_points: How many sizes to spread over the useful range where none are given; smaller ones are tried too where
            a single chunk gains.
        l1_max_gb: The largest size to try then: what the host has.
        policies: Eviction policies; default: all that a server can run.
        rule: The choice's thresholds.
        threads: How many settings to evaluate at once.
        progress: Called as settings are done.
        trial: What to simulate; None: nothing.
        trial_progress: Called as simulations are done.
        engine: What an engine takes, and holds in its own cache; None: the trial's, or `engine_of(costs)`.

    Raises:
        UsageError: A setting that is not one, a log without block hashes or without prompt tokens, or one of which
            every request is refused.
        SettingsError: A setting that cannot be simulated.
    """
    block_tokens = _block_of(log)
    if threads < 1:
        raise UsageError(f"--threads {threads}: at least 1")
    if l1_sizes_gb and l1_max_gb is not None:
        raise UsageError("--l1-sizes-gb and --l1-max-gb: give one")
    if l1_max_gb is not None:
        check_l1_size("--l1-max-gb", l1_max_gb)
    if not 1 <= l1_points <= MOST_L1_POINTS:
        raise UsageError(f"--l1-points {l1_points}: at least 1, and at most {MOST_L1_POINTS:,}")
    sizes = check_chunk_sizes(chunk_sizes, block_tokens) if chunk_sizes else default_chunk_sizes(block_tokens)
    names = check_policies(policies, POLICIES) if policies else list(POLICIES)
    engine = trial.base if trial is not None else engine or engine_of(costs)
    served = _served(log, engine)
    evaluator = Evaluator(served, costs)
    chunked = chunked_logs(served, sizes)
    if l1_sizes_gb:
        l1_sizes = check_l1_sizes(l1_sizes_gb)
    else:
        l1_sizes = _spread_l1(chunked[sizes[0]], costs, l1_points, l1_max_gb)
    _check_fits(costs, l1_sizes[-1], sizes[0])
    tasks = [(size, policy, l1) for size in sizes for policy in names for l1 in l1_sizes]
    priced, points = _sweep(evaluator, chunked, tasks, threads, progress)
    rule = rule or Rule()
    choice = choose(points, rule)
    settled = None
    if trial is not None:
        settled = settle(log, points, choice, trial, rule, trial_progress)
        choice = _by_trial(choice, settled)
    return _result(evaluator, priced, points, choice, rule, settled, engine, len(log) - len(served))


def engine_of(costs: Costs, *, l0_gb: float | None = None, **given: Any) -> RunSettings:
    """Return an engine of a profile, as a simulation has it. Raises SettingsError.

    Where a profile's memory leaves no room for KV, L0 holds a request of the model's length: vLLM starts with no less.
    """
    profile = costs.run_profile
    try:
        return RunSettings(profile=profile, l0_gb=l0_gb, **given)
    except SettingsError:
        if l0_gb is not None:
            raise
    least = profile.kv_bytes(profile.max_model_len) / GIB
    return RunSettings(profile=profile, l0_gb=1.01 * least, **given)


def _served(log: Log, engine: RunSettings) -> Log:
    """Return the requests that an engine does not refuse. Raises UsageError where it refuses them all."""
    turned_away = refused(log, engine)
    if turned_away.all():
        raise UsageError(
            f"nothing to tune: every request is refused, all {len(log):,}: {why_refused(engine)}; "
            "--max-model-len says how long they may be"
        )
    return log.select(~turned_away) if turned_away.any() else log


def _block_of(log: Log) -> int:
    if log.block_tokens is None:
        raise UsageError("the log has lengths alone, no hash_ids: it can drive load, but has no hit ratio")
    if not len(log) or not int(log.input_tokens.sum()):
        raise UsageError("the log has no prompt tokens")
    return log.block_tokens


def _check_fits(costs: Costs, l1_gb: float, chunk_tokens: int) -> None:
    """Raise UsageError where not even the smallest chunk fits into the largest L1."""
    if not costs.kv.capacity_chunks(l1_gb, chunk_tokens):
        least = costs.kv.size_gb(1, chunk_tokens)
        raise UsageError(f"an L1 of {l1_gb:g} GiB holds no chunk: one of {chunk_tokens:,} tokens takes {least:.2g} GiB")


def _spread_l1(chunked: ChunkedLog, costs: Costs, points: int, largest_gb: float | None) -> list[float]:
    """Return L1 sizes over the range in which an LRU cache of the smallest chunks gains.

    What a tiny one gains already, such as a system prompt that all share, is below that range: there are sizes from one
    chunk on, too, then.
    """
    low_gb, high_gb = (costs.kv.size_gb(capacity, chunked.chunk_tokens) for capacity in useful_range(chunked))
    sizes = spread(low_gb, high_gb, points, largest_gb)
    tiny = smaller(costs.kv.size_gb(1, chunked.chunk_tokens), sizes[0]) if one_chunk_gains(chunked) else []
    return [*tiny, *sizes]


def _sweep(
    evaluator: Evaluator,
    chunked: dict[int, ChunkedLog],
    tasks: Sequence[tuple[int, str, float]],
    threads: int,
    progress: Progress | None,
) -> tuple[dict[int, Priced], list[Point]]:
    """Return the priced chunk sizes, and the points of all tasks in their order."""
    priced: dict[int, Priced] = {}
    points: list[Point] = []

    def tell() -> None:
        if progress is not None:
            progress(len(priced) + len(points), len(chunked) + len(tasks))

    def evaluate(task: tuple[int, str, float]) -> Point:
        size, policy, l1 = task
        return evaluator.point(priced[size], policy, evaluator.costs.kv.capacity_chunks(l1, size), l1)

    pool = ThreadPoolExecutor(max_workers=threads)
    try:
        for one in pool.map(evaluator.priced, chunked.values()):
            priced[one.chunked.chunk_tokens] = one
            tell()
        for point in pool.map(evaluate, tasks):
            points.append(point)
            tell()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # on Ctrl-C only the settings under way are waited for
    return priced, points


def _by_trial(choice: Choice, settled: Settled) -> Choice:
    """Return the choice of the simulations; where none of them is good, the sweep's stays."""
    chosen = settled.chosen
    if chosen is None:
        return choice
    return replace(choice, pays=chosen.point is not None, point=chosen.point or choice.point)


def _result(
    evaluator: Evaluator,
    priced: dict[int, Priced],
    points: Sequence[Point],
    choice: Choice,
    rule: Rule,
    settled: Settled | None,
    engine: RunSettings,
    turned_away: int,
) -> TuneResult:
    """Return the result: the choice with its bounds, its neighbours and its per-request figures."""
    log, costs, here = evaluator.log, evaluator.costs, choice.point
    at = priced[here.chunk_tokens]
    point, hits, ttft = evaluator.detail(at, here.policy, here.capacity_chunks, here.l1_size_gb)
    more_gb = here.l1_size_gb + 1
    more = costs.kv.capacity_chunks(more_gb, here.chunk_tokens)
    unbounded = evaluator.point(at, "lru", None)
    summary = _summary(log, turned_away)
    left_out = _left_out(summary, engine)
    return TuneResult(
        log=summary,
        costs=costs,
        engine=engine,
        rule=rule,
        choice=choice,
        points=tuple(points),
        unbounded=unbounded,
        unbounded_finest=evaluator.point(priced[min(priced)], "lru", None),
        belady=evaluator.point(at, "belady", here.capacity_chunks, here.l1_size_gb),
        next_gib=evaluator.point(at, here.policy, more, more_gb),
        alignment=_alignment(evaluator, priced, point, unbounded),
        input_tokens=log.input_tokens,
        hit_tokens=hits,
        ttft_s=ttft,
        no_cache_s=evaluator.no_cache_s,
        notes=_notes(evaluator, choice, unbounded, settled, left_out),
        left_out=left_out,
        settled=settled,
    )


def _alignment(evaluator: Evaluator, priced: dict[int, Priced], here: Point, unbounded: Point) -> Alignment:
    """Return the hits that the setting's chunk size loses against chunks of one block."""
    log, costs = evaluator.log, evaluator.costs
    block = _block_of(log)
    tokens = here.cold.input_tokens
    finest = priced[block].chunked if block in priced else chunked_logs(log, [block])[block]
    most = int(evaluator.hit_tokens(finest, "lru", None).sum())
    at_size = int(evaluator.hit_tokens(finest, here.policy, costs.kv.capacity_chunks(here.l1_size_gb, block)).sum())
    return Alignment(
        finest_tokens=block,
        lost_tokens=most - unbounded.cold.hit_tokens,
        lost_ratio=(most - unbounded.cold.hit_tokens) / tokens,
        lost_ratio_here=(at_size - here.cold.hit_tokens) / tokens,
    )


def _summary(log: Log, turned_away: int) -> LogSummary:
    return LogSummary(
        requests=len(log),
        block_tokens=_block_of(log),
        input_tokens=int(log.input_tokens.sum()),
        output_tokens=int(log.output_tokens.sum()),
        duration_s=float(log.timestamp_ms.max() - log.timestamp_ms.min()) / 1000,
        skipped_rows=log.skipped,
        refused_requests=turned_away,
    )


def _notes(
    evaluator: Evaluator, choice: Choice, unbounded: Point, settled: Settled | None, left_out: str | None
) -> tuple[str, ...]:
    """Return what must be said beside the figures."""
    log, costs, here = evaluator.log, evaluator.costs, choice.point
    notes = []
    if not choice.pays:
        notes.append(settled.reason if settled and settled.chosen else _why_not(choice, unbounded))
    elif here.l1_size_gb > COMMON_HOST_GB:
        notes.append(
            f"{here.l1_size_gb:,.0f} GiB is more than most hosts hold: give yours with --l1-max-gb, or read the table"
        )
    share = 1 - here.cold.loaded_tokens / max(here.cold.hit_tokens, 1)
    if choice.pays and share >= 0.001:
        notes.append(f"{100 * share:.1f}% of the hit tokens are faster computed than copied, and are not loaded")
    if choice.pays and costs.kv.packable and costs.kv.packed_share == 1:
        notes.append("kvcore keeps bf16 KV packed on a GPU, a fifth smaller: --packing lossless counts with that")
    if costs.kv.note:
        notes.append(costs.kv.note)
    longest = int(log.input_tokens.max())
    notes += filter(None, [left_out])
    beyond = costs.profile.extrapolation(longest, 0)
    if beyond:
        notes.append(beyond)
    if settled is None:
        notes += filter(None, [costs.profile.doubt()])
        notes.append("TTFT is without a queue and without the engine's own prefix cache: kvsim run adds both")
    else:
        notes += _warnings(settled)
        if settled.trial.prices is not None and settled.trial.slo_ttft_p95_s is None:
            notes.append("prices decide nothing without a target (--slo-ttft-p95): the cheapest would be the slowest")
        notes.append("the sweep's TTFT is without a queue and without the engine's own prefix cache")
    return tuple(notes)


def _left_out(log: LogSummary, engine: RunSettings) -> str | None:
    """Return what is said of requests that an engine refuses, None where there are none."""
    if not log.refused_requests:
        return None
    everything = counted(log.requests + log.refused_requests, "request")
    return f"{log.refused_requests:,} of {everything} refused by the engine, and in no figure: {why_refused(engine)}"


def _warnings(settled: Settled) -> list[str]:
    """Return the simulations' warnings, each once: of those that differ in numbers alone, that with the largest."""
    found: dict[str, tuple[list[float], str]] = {}
    for one in (*settled.no_cache, *settled.tried):
        for warning in one.figures["warnings"]:
            numbers = [float(number.replace(",", "")) for number in _NUMBER.findall(warning)]
            kind = _NUMBER.sub("#", warning)
            found[kind] = max(found.get(kind, (numbers, warning)), (numbers, warning))
    return [warning for _, warning in found.values()]


def _why_not(choice: Choice, unbounded: Point) -> str:
    """Return why reuse does not pay."""
    best, most = choice.point.cold, unbounded.cold
    if not most.hit_tokens:
        return "reuse cannot pay: no prompt begins with a whole chunk that an earlier one had"
    if most.loaded_tokens == 0:
        return (
            f"reuse cannot pay: {100 * most.token_hit_ratio:.1f}% of the prompt tokens could be hit, "
            "but computing them anew is faster than copying them"
        )
    share = 100 * best.saved_mean_s / best.no_cache.mean_s if best.no_cache.mean_s else 0.0
    return (
        f"reuse hardly pays: the best setting hits {100 * best.token_hit_ratio:.1f}% of the prompt tokens "
        f"({100 * most.token_hit_ratio:.1f}% without end) and saves {share:.2f}% of the mean TTFT"
    )
