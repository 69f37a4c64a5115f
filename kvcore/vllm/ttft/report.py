"""What was measured, as figures: medians, spreads, ratios, and what went wrong."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kvcore.vllm.ttft.measure import Sample

OURS = ("kvcore", "kvcore-mp", "kvcore-l2")
PEERS = ("offloading", "offloading-plain", "lmcache")
_RESAMPLES = 2000
_QUIET = 1.2
Key = tuple[str, int, str]
"""System, prompt tokens, situation."""


def figures(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Return median, quartiles and extremes in seconds of each system, length and situation; faults left out."""
    return [
        {"system": system, "tokens": tokens, "situation": situation, **_spread(values)}
        for (system, tokens, situation), values in _grouped(samples).items()
    ]


def quiet(samples: Sequence[Sample]) -> list[Sample]:
    """Return the requests during which the engine's processor was at full speed, by a look before and one behind.

    That is within a fifth of the fastest look of all. What slows a processor of a shared host, a neighbour on its other
    half mostly, comes and goes within tenths of a second and doubles what an engine takes to launch its kernels.
    """
    looks = [look for sample in samples for look in sample.looks_s]
    most = _QUIET * min(looks, default=0.0)
    return [sample for sample in samples if sample.looks_s and max(sample.looks_s) <= most]


def ratios(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return our hits over the best peer's, and what our connector costs where nothing is reused.

    `ratio` is ours over theirs, of medians; `low` and `high` bound it at 95% by a bootstrap over samples.
    """
    groups = _grouped(samples)
    found = []
    for (system, tokens, situation), values in groups.items():
        if system not in OURS:
            continue
        if situation == "l1":
            rivals = {peer: groups[peer, tokens, "l1"] for peer in PEERS if (peer, tokens, "l1") in groups}
            if rivals:
                best = min(rivals, key=lambda peer: float(np.median(rivals[peer])))
                found.append(_ratio(system, tokens, "l1", values, best, rivals[best]))
        elif situation != "l2" and ("none", tokens, situation) in groups:
            found.append(_ratio(system, tokens, situation, values, "none", groups["none", tokens, situation]))
    return found


def outputs(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return, for each system and situation, how many answers equal those of vLLM alone to the same prompts.

    A cold answer is compared with a cold one. One that reuses KV is compared with one that reuses the engine's own, so
    that both compute the same tokens: a prompt's last block.
    """
    alone: dict[tuple[str, str], tuple[int, ...]] = {
        (sample.prompt, sample.situation): sample.output
        for sample in samples
        if sample.system == "none" and not sample.fault
    }
    counts: dict[tuple[str, str], list[int]] = {}
    for sample in samples:
        like = "cold" if sample.situation == "cold" else "gpu"
        expected = alone.get((sample.prompt, like))
        if sample.situation == "decode" or sample.fault or expected is None:
            continue
        count = counts.setdefault((sample.system, sample.situation), [0, 0])
        count[0] += sample.output == expected
        count[1] += 1
    return [
        {"system": system, "situation": situation, "equal": equal, "of": total}
        for (system, situation), (equal, total) in counts.items()
    ]


def faults(samples: Sequence[Sample]) -> list[str]:
    """Return a line for every sample that is not what it is called, and for every answer of ours that differs."""
    lines = [
        f"{sample.system}, run {sample.run}, {sample.situation}, {sample.tokens} tokens: {sample.fault}"
        for sample in samples
        if sample.fault
    ]
    differing = [row for row in outputs(samples) if row["system"] in OURS and row["equal"] < row["of"]]
    return lines + [
        f"{row['system']}, {row['situation']}: {row['of'] - row['equal']} of {row['of']} answers differ from those of "
        "vLLM alone"
        for row in differing
    ]


def table(result: Mapping[str, Any]) -> Any:
    """Return the result as a rich table: a row for each length and situation, a column for each system."""
    from rich.table import Table  # noqa: PLC0415 - for people only

    cells = {(row["system"], row["tokens"], row["situation"]): row for row in result["figures"]}
    systems = list(dict.fromkeys(row["system"] for row in result["figures"]))
    rows = sorted({(tokens, situation) for _, tokens, situation in cells}, key=lambda row: (row[1] == "decode", row))
    title = result.get("title", "TTFT, median (quartiles) in ms")
    out = Table("prompt", "", *systems, title=title, title_justify="left")
    for tokens, situation in rows:
        found = [cells.get((system, tokens, situation)) for system in systems]
        out.add_row(f"{tokens:,}", situation, *("" if cell is None else _cell(cell) for cell in found))
    out.caption = "\n".join(_sentence(ratio) for ratio in result["ratios"])
    return out


def _cell(cell: Mapping[str, Any]) -> str:
    median, low, high = (1000 * cell[name] for name in ("median_s", "q1_s", "q3_s"))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def _sentence(ratio: Mapping[str, Any]) -> str:
    return (
        f"{ratio['system']} {ratio['situation']}, {ratio['tokens']:,} tokens: {ratio['ratio']:.3f} "
        f"of {ratio['against']} ({ratio['low']:.3f} to {ratio['high']:.3f})"
    )


def _grouped(samples: Iterable[Sample]) -> dict[Key, list[float]]:
    groups: dict[Key, list[float]] = {}
    for sample in samples:
        if not sample.fault:
            groups.setdefault((sample.system, sample.tokens, sample.situation), []).append(sample.seconds)
    return groups


def _spread(values: Sequence[float]) -> dict[str, Any]:
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    extremes = {"min_s": min(values), "max_s": max(values)}
    return {"samples": len(values), "median_s": median, "q1_s": low, "q3_s": high, **extremes}


def _ratio(
    system: str, tokens: int, situation: str, ours: Sequence[float], against: str, theirs: Sequence[float]
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    drawn = [np.median(rng.choice(values, (_RESAMPLES, len(values))), axis=1) for values in (ours, theirs)]
    low, high = np.percentile(drawn[0] / drawn[1], [2.5, 97.5]).tolist()
    return {
        "system": system,
        "tokens": tokens,
        "situation": situation,
        "against": against,
        "ratio": float(np.median(ours) / np.median(theirs)),
        "low": low,
        "high": high,
    }
