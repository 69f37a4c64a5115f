"""What simulations settled of a sweep, in words and rows."""

from kvsim.report.units import gib, percent, seconds
from kvsim.tuner.trial import Settled, Tried, lacking
from kvtraces.words import counted


def trial_sentences(settled: Settled) -> list[str]:
    """Return what the recommendation does under load, one sentence each."""
    chosen, target = settled.chosen, settled.trial.slo_ttft_p95_s
    scale = settled.trial.base.rate_scale
    traffic = "the recorded traffic" if scale == 1 else f"{scale:g} times the recorded traffic"
    if chosen is None:
        return [f"Under {traffic} {settled.reason}."]
    words = [f"Simulated under {traffic}: {_times(chosen)}; {settled.reason}."]
    if chosen.point is not None:
        words.append(_against(chosen, settled.without(chosen.settings.engines), target))
    if chosen.cost is not None:
        words.append(f"A million prompt tokens cost {chosen.cost:.4g}{_dearer(settled, chosen)}.")
    return words


def trial_headline(settled: Settled) -> str:
    """Return the recommendation of no cache, or of nothing, in one line."""
    chosen, target = settled.chosen, settled.trial.slo_ttft_p95_s
    if chosen is None:
        what = lacking((*settled.no_cache, *settled.tried)) or f"meets the target of {target:g} s"
        return f"No recommendation: no simulated setting {what}."
    engines = chosen.settings.engines
    who = "one engine does" if engines == 1 else f"{engines} engines do"
    if target is None:
        return f"No L1: under this load reuse does not pay; {who} without."
    but = f", but for {counted(settled.refused, 'request')} refused" if settled.refused else ""
    return f"No L1: {who} without, within the target of {target:g} s{but}."


def _against(chosen: Tried, bare: Tried, target: float | None) -> str:
    if not bare.load.sustained:
        return f"Without L1: {bare.load.sentence()}."
    missed = "" if target is None or bare.meets_target else f", beyond the target of {target:g} s"
    before, after = bare.ttft_mean_s or 0.0, chosen.ttft_mean_s or 0.0
    saved = 1 - after / before if before else 0.0
    return f"Without L1: {_times(bare)}{missed}; the mean is {percent(saved)} less with it."


def _dearer(settled: Settled, chosen: Tried) -> str:
    good = [one for one in settled.no_cache if one.good and one.cost is not None]
    bare = min(good, key=lambda one: one.cost or 0.0, default=None)
    if bare is None or bare is chosen:
        return ""
    return f", without L1 {bare.cost:.4g} on {counted(bare.settings.engines, 'engine')}"


def _times(one: Tried) -> str:
    p50, p95 = one.ttft_s["p50"], one.ttft_s["p95"]
    return f"TTFT p50 {seconds(p50 or 0.0)}, p95 {seconds(p95 or 0.0)}"


LEAST = ("TTFT p50", "queue p95", "GPU", "refused")
"""Columns to leave out where the others need the place; as many are refused by every setting, which is told."""


def trial_headings(settled: Settled) -> list[str]:
    """Return the headings of `trial_rows`."""
    return [heading for heading, shown in _columns(settled) if shown]


def _columns(settled: Settled) -> list[tuple[str, bool]]:
    several = len(settled.no_cache) > 1
    tiers = any(one.settings.l2_gb for one in settled.tried)
    return [
        ("eng.", several),
        ("L1 GiB", True),
        ("L2 GiB", tiers),
        ("chunk", True),
        ("policy", True),
        ("TTFT p50", True),
        ("TTFT p95", True),
        ("queue p95", True),
        ("saved", True),
        ("GPU", True),
        ("refused", settled.refused > 0),
        ("target", settled.trial.slo_ttft_p95_s is not None),
        ("cost", settled.trial.prices is not None),
    ]


def trial_rows(settled: Settled) -> list[list[str]]:
    """Return every simulated setting, no cache first, as text under `trial_headings`."""
    shown = [kept for _, kept in _columns(settled)]
    rows = []
    for one in (*settled.no_cache, *settled.tried):
        cells = _cells(one, settled.without(one.settings.engines))
        rows.append([cell for cell, kept in zip(cells, shown, strict=True) if kept])
    return rows


def trial_marked(settled: Settled) -> int | None:
    """Return the row that is recommended; None where none is."""
    everything = [*settled.no_cache, *settled.tried]
    return next((i for i, one in enumerate(everything) if one is settled.chosen), None)


def _cells(one: Tried, bare: Tried) -> list[str]:
    settings, cached, refused = one.settings, one.point is not None, one.load.refused_requests
    queue = one.figures["queue_s"]["p95"]
    saved = None
    if one.ttft_mean_s is not None and bare.ttft_mean_s:
        saved = 1 - one.ttft_mean_s / bare.ttft_mean_s
    return [
        f"{settings.engines}",
        _gib(settings.l1_gb),
        _gib(settings.l2_gb),
        f"{settings.chunk_tokens:,}" if cached and settings.chunk_tokens else "-",
        settings.policy if cached else "none",
        _seconds(one.ttft_s["p50"]),
        _seconds(one.ttft_s["p95"]) if one.load.sustained else "overload",
        _seconds(queue),
        "-" if saved is None else percent(saved),
        percent(one.figures["utilisation"].get("gpu", 0.0)),
        f"{refused:,}",
        {True: f"met for {one.load.requests:,}" if refused else "met", False: "missed", None: "-"}[one.meets_target],
        "-" if one.cost is None else f"{one.cost:.4g}",
    ]


def _gib(size: float | None) -> str:
    if size is None:
        return "inf"
    return gib(size).removesuffix(" GiB") if size else "0"


def _seconds(value: float | None) -> str:
    return "-" if value is None else seconds(value) if value >= 1e-6 else "0"
