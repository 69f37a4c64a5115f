"""A simulated run in words and rows, for the terminal and for reports."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvsim.engine.arrivals import why_refused
from kvsim.engine.settings import RunSettings
from kvsim.report.units import gib, percent, seconds
from kvsim.runner import PERCENTILES, RunResult

SPREAD_HEADINGS = ("", "mean", "p50", "p90", "p95", "p99")
PARTS = {"handling_s": "server's handling", "queue_s": "queue", "load_s": "load", "prefill_s": "prefill"}
RESOURCES = {
    "gpu": "GPU",
    "gpu_prefill": "GPU, prefill alone",
    "pcie_h2d": "PCIe, L1 to GPU",
    "pcie_d2h": "PCIe, GPU to L1",
    "l2_read": "L2, reads",
    "l2_write": "L2, writes",
}


def setting_facts(settings: RunSettings, chunk_tokens: int | None) -> list[tuple[str, str]]:
    """Return what was run, by name."""
    profile = settings.profile
    instances = "1 engine" if settings.engines == 1 else f"{settings.engines} engines, {settings.routing}"
    l0 = settings.l0_tokens
    facts = [
        ("costs", f"{profile.name}: {profile.model} on {profile.gpu}, tensor parallel {profile.tensor_parallel}"),
        (
            "engines",
            f"{instances}, {settings.max_num_batched_tokens:,} tokens a step, {settings.model_len:,} a request",
        ),
        ("L0", f"{gib(l0 * profile.gpu_bytes_per_token / 2**30)} an engine, {l0:,} tokens"),
    ]
    if settings.l1_gb == 0:
        facts.append(("L1", "none"))
        return facts
    facts.append(("L1", f"{_size(settings.l1_gb)}, chunks of {chunk_tokens or 0:,} tokens, {settings.policy}"))
    if settings.l2_gb != 0:
        facts.append(("L2", f"{_size(settings.l2_gb)} of {settings.l2_kind}, {settings.l2_policy}"))
    return facts


def _size(size_gb: float | None) -> str:
    return "without end" if size_gb is None else gib(size_gb)


def times_rows(result: RunResult) -> list[list[str]]:
    """Return TTFT with its parts and without a cache, as text under `SPREAD_HEADINGS`; dashes where there is none."""
    summary = result.summary()
    rows = [["TTFT", *_times(result.ttft_s)]]
    rows += [[f"  {name}", *_times(summary[column])] for column, name in PARTS.items()]
    if result.ttft_no_cache_s is not None:
        rows.append(["TTFT without L1", *_times(result.ttft_no_cache_s)])
    return rows


def _times(spread: Mapping[str, float | None]) -> list[str]:
    return [_time(spread.get(name)) for name in ("mean", *(f"p{p}" for p in PERCENTILES))]


def _time(value: float | None) -> str:
    if value is None:
        return "-"
    return seconds(value) if value >= 1e-6 else "0"


def hit_rows(result: RunResult) -> list[tuple[str, int, float]]:
    """Return (name, tokens, share of the served prompt tokens) by tier, and what was loaded."""
    summary = result.summary()
    total = max(summary["prompt_tokens"], 1)
    hits: dict[str, Any] = summary["hit_tokens"]
    rows = [("L0, the engine's own", hits["l0"])]
    if result.settings.l1_gb != 0:
        rows.append(("L1", hits["l1"]))
        if result.settings.l2_gb != 0:
            rows.append(("L2, not in L1", hits["l2"]))
        rows.append(("loaded beyond L0", summary["loaded_tokens"]))
    return [(name, tokens, tokens / total) for name, tokens in rows]


def use_rows(result: RunResult) -> list[tuple[str, float]]:
    """Return the busy share of each resource, by its name."""
    return [(RESOURCES.get(name, name), share) for name, share in result.utilisation.items()]


def run_notes(result: RunResult) -> list[str]:
    """Return what must be said beside the figures."""
    notes: Sequence[str] = []
    refused = int(result.columns["refused"].sum())
    if refused:
        notes = [
            (f"{refused:,} of {len(result.columns['refused']):,} requests refused: {why_refused(result.settings)}")
        ]
    skipped = {reason: count for reason, count in result.refused_chunks.items() if count and reason != "resident"}
    if skipped:
        told = ", ".join(f"{count:,} ({reason})" for reason, count in skipped.items())
        notes = [*notes, f"chunks not stored or not loaded: {told}"]
    preempted = result.total("preemptions")
    if preempted:
        notes = [*notes, f"{preempted:,} preemptions: L0 was full"]
    before = result.load_no_cache
    if before is not None and result.load.sustained and not before.sustained:
        notes = [*notes, f"without L1 and L2 {before.sentence()}"]
    return [*notes, *result.warnings]


def saved(result: RunResult) -> str | None:
    """Return what the cache saves, in one sentence; None where there is nothing to compare."""
    without, with_ = result.ttft_no_cache_s, result.ttft_s
    if without is None or result.settings.l1_gb == 0:
        return None
    pairs = [(name, without[name], with_[name]) for name in ("mean", "p50", "p95")]
    if any(a is None or b is None for _, a, b in pairs):
        return None
    told = ", ".join(
        f"{name} {seconds(after)} instead of {seconds(before)} ({_change(before, after)})"
        for name, before, after in pairs
        if before is not None and after is not None
    )
    return f"TTFT with L1: {told}"


def _change(before: float, after: float) -> str:
    if before <= 0:
        return "no change"
    share = 1 - after / before
    return f"{percent(abs(share))} {'less' if share >= 0 else 'more'}"
