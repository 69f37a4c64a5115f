"""A recommendation in plain words, for the terminal and the report."""

from kvsim.plots import number
from kvsim.report.trial_words import trial_headline, trial_sentences
from kvsim.report.units import gib, mib, percent, seconds, sentence
from kvsim.tuner.points import Figures, Point
from kvsim.tuner.result import TuneResult
from kvsim.tuner.trial import DEFAULT_TOP
from kvtraces.words import counted


def headline(result: TuneResult) -> str:
    """Return the recommendation in one line."""
    chosen = None if result.settled is None else result.settled.chosen
    if not recommends(result):
        if result.settled is not None:
            return trial_headline(result.settled)
        return "No L1: reuse does not pay on this log."
    words = _setting(result)
    if chosen is None:
        return f"{words}."
    lower, engines = chosen.settings.l2_gb, chosen.settings.engines
    if lower:
        words += f", an L2 of {gib(lower)}"
    return f"{words}, on {counted(engines, 'engine')}."


def recommends(result: TuneResult) -> bool:
    """Whether a setting is recommended: reuse pays, and where settings were simulated, one of them is good."""
    return result.pays and (result.settled is None or result.settled.chosen is not None)


def _setting(result: TuneResult) -> str:
    point = result.point
    size = mib(result.costs.kv.chunk_bytes(point.chunk_tokens))
    return f"Chunks of {point.chunk_tokens:,} tokens ({size}), an L1 of {gib(point.l1_size_gb)}, policy {point.policy}"


def sentences(result: TuneResult) -> list[str]:
    """Return what the recommendation brings and rests on, one sentence each."""
    if not result.pays:
        settled = result.settled is not None and result.settled.chosen is not None
        why = [] if settled else [sentence(result.notes[0])]
        return [*_left_out(result), *_simulated(result), *why, _without(result)]
    point = result.point
    cold, warm = point.cold, point.warm
    words = [
        *_left_out(result),
        *_simulated(result),
        *_own_cache(result),
        f"It finds {percent(cold.token_hit_ratio)} of all prompt tokens in L1: {_share(result)}.",
        f"TTFT without a queue: {_times(cold)}.",
    ]
    state = (
        "after the cache had filled" if point.filled else "the second half of the log; the cache was not full by then"
    )
    found = percent(warm.token_hit_ratio)
    words.append(f"Once warm (from request {point.warm_from:,} on, {state}): {found} found, {_times(warm)}.")
    words.append(_more(result))
    words.append(_alignment(result))
    return words


def _left_out(result: TuneResult) -> list[str]:
    return [] if result.left_out is None else [f"{result.left_out}."]


def _simulated(result: TuneResult) -> list[str]:
    if result.settled is None:
        return []
    words = trial_sentences(result.settled)
    if result.pays and result.settled.chosen is None:
        words.append(f"The setting is the sweep's, which knows no queue: c{_setting(result)[1:]}.")
    return words


def _own_cache(result: TuneResult) -> list[str]:
    """Return how the engine's own cache compares with L1, where no simulation has settled it."""
    if result.settled is not None:
        return []
    own, point, whole = result.engine.l0_tokens, result.point, result.unbounded_finest
    in_l1 = (point.capacity_chunks or 0) * point.chunk_tokens
    everything = result.costs.kv.capacity_chunks(whole.l1_size_gb, whole.chunk_tokens) * whole.chunk_tokens
    if everything <= own:
        compared = f"as much as all prompts of the log take ({everything:,})"
    else:
        compared = f"{'no less' if in_l1 <= own else 'less'} than this L1 ({in_l1:,})"
    holds = f"It holds {gib(result.engine.l0_gib)} ({own:,} tokens), {compared}, and what it finds needs no L1"
    return [f"The engine's own cache is not in what follows. {holds}: --simulate {DEFAULT_TOP} says what L1 adds."]


def _more(result: TuneResult) -> str:
    words = f"One GiB more would {_gain(result.point, result.next_gib)} of the mean TTFT"
    larger = result.next_size
    if larger is None:
        return f"{words}; no larger L1 was tried."
    return f"{words}; {gib(larger.l1_size_gb)} would {_gain(result.point, larger)}."


def _gain(here: Point, larger: Point) -> str:
    points = 100 * (larger.cold.token_hit_ratio - here.cold.token_hit_ratio)
    saved = here.cold.ttft.mean_s - larger.cold.ttft.mean_s
    hits = f"add {points:.2g} points of hit ratio" if points >= 0 else f"lose {-points:.2g} points of hit ratio"
    return f"{hits} and {'save' if saved >= 0 else 'cost'} {seconds(abs(saved))}"


def _share(result: TuneResult) -> str:
    cold = result.point.cold
    parts = []
    for bound, name in ((result.unbounded, "a cache without end"), (result.belady, "Belady's bound at this size")):
        if bound.cold.hit_tokens:
            share = cold.hit_tokens / bound.cold.hit_tokens
            parts.append(f"{percent(share)} of what {name} finds ({percent(bound.cold.token_hit_ratio)})")
    return ", ".join(parts)


def _times(figures: Figures) -> str:
    with_, without = figures.ttft, figures.no_cache
    saved = figures.saved_mean_s / without.mean_s if without.mean_s else 0.0
    return (
        f"p50 {seconds(with_.p50_s)} instead of {seconds(without.p50_s)}, "
        f"p95 {seconds(with_.p95_s)} instead of {seconds(without.p95_s)}, mean {percent(saved)} less"
    )


def _alignment(result: TuneResult) -> str:
    lost = result.alignment
    if result.point.chunk_tokens == lost.finest_tokens:
        return f"A chunk is one block of the log ({lost.finest_tokens:,} tokens): no finer one can be tried."
    here, unbounded = round(100 * lost.lost_ratio_here, 2), f"{100 * lost.lost_ratio:.2f}"
    change = f"{'gains' if here < 0 else 'loses'} {abs(here):.2f}"
    end = f"and loses {unbounded}" if here < 0 else unbounded
    return (
        f"Against chunks of one block ({lost.finest_tokens:,} tokens) it {change} points "
        f"of hit ratio at this size, {end} without end."
    )


def _without(result: TuneResult) -> str:
    times = result.point.cold.no_cache
    return f"TTFT without a queue and without a cache: p50 {seconds(times.p50_s)}, p95 {seconds(times.p95_s)}."


def further_notes(result: TuneResult) -> list[str]:
    """Return the notes that `sentences` has not said already, as sentences."""
    notes = result.notes if result.pays else result.notes[1:]
    return [sentence(note) for note in notes if note != result.left_out]


FRONTIER_HEADINGS = (
    "L1 GiB",
    "chunk",
    "policy",
    "hits",
    "TTFT p50",
    "p95",
    "saved p50",
    "saved p95",
    "saved mean",
    "pts/GiB",
)


def frontier_rows(result: TuneResult) -> list[list[str]]:
    """Return the best setting of each L1 size, as text under `FRONTIER_HEADINGS`."""
    rows: list[list[str]] = []
    ratio, size = 0.0, 0.0
    for point in result.choice.frontier:
        cold = point.cold
        gain = 100 * (cold.token_hit_ratio - ratio) / (point.l1_size_gb - size)
        ratio, size = cold.token_hit_ratio, point.l1_size_gb
        rows.append(
            [
                f"{point.l1_size_gb:,.6g}",
                f"{point.chunk_tokens:,}",
                point.policy,
                percent(cold.token_hit_ratio),
                seconds(cold.ttft.p50_s),
                seconds(cold.ttft.p95_s),
                seconds(cold.no_cache.p50_s - cold.ttft.p50_s),
                seconds(cold.no_cache.p95_s - cold.ttft.p95_s),
                percent(cold.saved_mean_s / cold.no_cache.mean_s if cold.no_cache.mean_s else 0.0),
                f"{gain:,.1f}" if gain >= 10 else f"{gain:.4f}",
            ]
        )
    return rows


def marked_row(result: TuneResult) -> int | None:
    """Return the frontier's row that is recommended; None where none is."""
    frontier = result.choice.frontier
    return frontier.index(result.point) if result.pays and result.point in frontier else None


def log_facts(result: TuneResult) -> list[tuple[str, str]]:
    """Return the log's summary and the costs used, by name."""
    log, costs = result.log, result.costs
    profile, kv = costs.profile, costs.kv
    rate = f", {number(log.requests / log.duration_s)} a second" if log.duration_s else ""
    facts = [
        ("requests", f"{log.requests:,} in {log.duration_s:,.0f} s{rate}"),
        ("prompt tokens", f"{log.input_tokens:,}, {log.input_tokens / log.requests:,.0f} a request"),
        ("output tokens", f"{log.output_tokens:,}"),
        ("block", f"{log.block_tokens:,} tokens"),
        ("KV", f"{kv.l1_bytes_per_token:,.0f} bytes a token in L1, all ranks together"),
        (
            "cost profile",
            f"{profile.name}: {profile.model} on {profile.gpu}, tensor parallel {profile.tensor_parallel}",
        ),
    ]
    if log.skipped_rows:
        facts.append(("bad rows", f"{log.skipped_rows:,} left out"))
    if log.refused_requests:
        facts.append(("refused", f"{log.refused_requests:,} requests more, left out"))
    return facts
