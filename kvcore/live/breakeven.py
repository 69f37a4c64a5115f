"""Load or recompute: from which length on a hit is worth its copy, by what vLLM and the server have measured here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np

from kvcore.live import wire
from kvcore.live.hittest import Row, asked, base_of, timed
from kvcore.live.tools import report
from kvcore.policy import LoadCost
from kvcore.policy.fit import non_negative

NAME = "load or recompute"
Point: TypeAlias = tuple[int, float]
"""Tokens of a prompt, and the seconds of its prefill."""
_REPEATS = 2
_BLOCK = 16
"""Tokens of the shortest prompt: what any step takes."""
_ABOVE = 1.1
"""Prompts that take so much longer than any step tell what a token costs."""
_SHORT = 1024
"""Hits of fewer tokens are little gained, or lost."""
_LONGEST = 131_072
"""Prompts beyond this many tokens are not looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How fast chunks come out of a tier: `latency_s` once, then `bytes_per_s`."""

    latency_s: float
    bytes_per_s: float


def break_even(endpoint: str, vllm_url: str, model: str, prompt_tokens: int, write: Path | None) -> list[Row]:
    """Return the row of the checklist, having asked vLLM for fresh prompts of five lengths, each twice.

    Args:
        endpoint: Of the server.
        vllm_url: A vLLM that uses it. What it computes here is stored as any prompt is.
        model: What to ask it for.
        prompt_tokens: The longest of the prompts.
        write: A file for the costs, as `kvcore serve --load-cost` takes it.

    Raises OSError where vLLM is not reachable or the file cannot be written, ValueError or KeyError for an answer that
    is none of its API's.
    """
    status, metrics = report(endpoint, wire.Status(), 5.0), report(endpoint, wire.GetMetrics(), 5.0)
    engines = [one for one in status["instances"] if one["ready"] and one["namespace"].get("model") != "bench"]
    if not engines:
        return [(NAME, "skip", "no engine is registered", "")]
    chunk_bytes = int(engines[0]["chunk_bytes"])
    links, missing = links_of(metrics, chunk_bytes, threads=status["l2_threads"])
    if missing:
        advice = "ask again when prompts have been loaded from there: the rate is that of real loads"
        return [(NAME, "skip", f"nothing has been loaded from {missing} yet", advice)]
    points = prefill_points(vllm_url, model, prompt_tokens)
    cost = load_cost(points, links, status["chunk_tokens"])
    if write is not None:
        write.write_bytes(msgspec.json.format(msgspec.json.encode(cost)) + b"\n")
    return [_row(cost, chunk_bytes, points, write)]


def links_of(metrics: dict[str, Any], chunk_bytes: int, *, threads: int | None) -> tuple[tuple[Link, ...], str]:
    """Return the link of each tier by a server's running totals, and the first tier without any.

    Args:
        metrics: The reply to `GetMetrics`.
        chunk_bytes: Of a chunk.
        threads: How many threads read from L2; None without L2.
    """
    totals = {tuple(key): (sum(counts), float(seconds)) for key, _, counts, seconds in metrics["histograms"]}
    loaded = sum(value for name, *_, value in metrics["values"] if name == "kvcore_loaded_bytes")
    _, seconds = totals.get(("kvcore_load_seconds",), (0, 0.0))
    if not loaded or not seconds:
        return (), "L1"
    links = [Link(latency_s=0.0, bytes_per_s=loaded / seconds)]
    if threads is not None:
        reads, seconds = totals.get(("kvcore_l2_seconds", "get"), (0, 0.0))
        if not reads or not seconds:
            return (), "L2"
        one = seconds / reads
        # n chunks take ceil(n / threads) turns: n / threads, and half a turn more but for one thread.
        links.append(Link(latency_s=one * (threads - 1) / (2 * threads), bytes_per_s=threads * chunk_bytes / one))
    return tuple(links), ""


def prefill_points(vllm_url: str, model: str, prompt_tokens: int) -> list[Point]:
    """Measure fresh prompts of a block, and of an eighth to all of `prompt_tokens`: the faster of two, as vLLM says."""
    base = base_of(vllm_url)
    model, prompt_tokens = asked(base, model, prompt_tokens)
    random = np.random.default_rng()
    found = []
    for tokens in sorted({_BLOCK, *(max(_BLOCK, prompt_tokens >> halvings) for halvings in range(4))}):
        prompts = [random.integers(100, 1000, tokens).tolist() for _ in range(_REPEATS)]
        found.append((tokens, min(timed(base, model, prompt)[1] for prompt in prompts)))
    return found


def load_cost(points: Sequence[Point], links: Sequence[Link], chunk_tokens: int) -> LoadCost:
    """Return the costs by which a server decides; the shortest prompt tells what any step takes."""
    floor = min(seconds for _, seconds in points)
    base, linear, quadratic = fitted([point for point in points if point[1] > _ABOVE * floor] or points)
    return LoadCost(
        chunk_tokens=chunk_tokens,
        prefill_floor_ns=1e9 * floor,
        prefill_base_ns=1e9 * base,
        prefill_linear_ns=1e9 * linear,
        prefill_quadratic_ns=1e9 * quadratic,
        latency_ns=tuple(1e9 * link.latency_s for link in links),
        bytes_per_s=tuple(link.bytes_per_s for link in links),
        floor_cuts=True,
    )


def fitted(points: Sequence[Point]) -> tuple[float, ...]:
    """Return a, b, c >= 0 with a + b n + c n^2 closest to the seconds of n tokens, by relative error."""
    tokens, seconds = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    return non_negative(np.stack([np.ones_like(tokens), tokens, tokens**2], axis=1), seconds)


def worth_from(cost: LoadCost, tier: int, chunk_bytes: int) -> int | None:
    """Return the tokens from which on a hit in a tier is faster to load than to compute; None: never.

    The prompt is the hit and one token, which is computed either way.
    """
    for chunks in range(1, _LONGEST // cost.chunk_tokens + 1):
        tokens = chunks * cost.chunk_tokens
        sizes = tuple(chunks * chunk_bytes * (tier == at) for at in range(len(cost.bytes_per_s)))
        if cost.load_ns(sizes, 0) + cost.prefill_ns(1, tokens) < cost.prefill_ns(tokens + 1, 0):
            return tokens
    return None


def _row(cost: LoadCost, chunk_bytes: int, points: Iterable[Point], write: Path | None) -> Row:
    worth = [worth_from(cost, tier, chunk_bytes) for tier in range(len(cost.bytes_per_s))]
    said = [
        f"L{tier + 1} at {rate / 1e9:.1f} GB/s: "
        + ("never faster than computing" if tokens is None else f"faster from {tokens:,} tokens on")
        for tier, (rate, tokens) in enumerate(zip(cost.bytes_per_s, worth, strict=True))
    ]
    computed = ", ".join(f"{tokens:,} in {seconds:.3f}" for tokens, seconds in points)
    fine = all(tokens is not None and tokens <= max(_SHORT, cost.chunk_tokens) for tokens in worth)
    advice = f"costs written to {write}: kvcore serve --load-cost {write}" if write is not None else ""
    if not fine and write is None:
        advice = "--write-load-cost FILE here, and --load-cost FILE of the server, leave shorter hits to the engine"
    return NAME, "ok" if fine else "warn", f"{'; '.join(said)} (computed: {computed} s)", advice
