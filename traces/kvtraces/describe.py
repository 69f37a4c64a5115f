"""What a log holds, in a few figures."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtraces.log import IntArray, Log


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """A distribution of lengths, in tokens."""

    p50: float
    p95: float
    max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A log in figures. The last three are None for a log of lengths alone."""

    requests: int
    skipped: int
    """Bad rows left out."""
    duration_s: float
    """From the first arrival to the last."""
    requests_per_s: float
    """0 where all arrive at once."""
    input_tokens: int
    output_tokens: int
    input_lengths: Lengths
    output_lengths: Lengths
    block_tokens: int | None
    unique_blocks: int | None
    unbounded_token_hit_ratio: float | None
    """Prompt tokens in leading full blocks that an earlier prompt had, over all of them: a cache without bound."""


def describe(log: Log) -> Summary:
    """Return a log's figures. Raises ValueError for a log without requests."""
    if not len(log):
        raise ValueError("there is nothing to describe in a log without requests")
    duration_s = float(np.ptp(log.timestamp_ms)) / 1000
    prompt_tokens = int(log.input_tokens.sum())
    unique_blocks, hit_ratio = None, None
    if log.block_tokens is not None:
        new = _first_seen(log)
        unique_blocks = int(np.count_nonzero(new))
        hit_ratio = int(leading_hits(log, new).sum()) * log.block_tokens / max(prompt_tokens, 1)
    return Summary(
        requests=len(log),
        skipped=log.skipped,
        duration_s=duration_s,
        requests_per_s=len(log) / duration_s if duration_s else 0.0,
        input_tokens=prompt_tokens,
        output_tokens=int(log.output_tokens.sum()),
        input_lengths=_lengths(log.input_tokens),
        output_lengths=_lengths(log.output_tokens),
        block_tokens=log.block_tokens,
        unique_blocks=unique_blocks,
        unbounded_token_hit_ratio=hit_ratio,
    )


def _first_seen(log: Log) -> NDArray[np.bool_]:
    from kvtraces._seen import first_seen  # noqa: PLC0415 - numba is loaded only where it is needed

    return first_seen(log.blocks)


def leading_hits(log: Log, new: NDArray[np.bool_]) -> IntArray:
    """Return [n] how many leading blocks of each prompt were in an earlier one: the hits of a cache without bound.

    `new` says of each of the log's blocks whether it is seen for the first time.
    """
    positions = np.append(np.flatnonzero(new), len(new))
    first_new = positions[np.searchsorted(positions, log.starts[:-1])]
    hits: IntArray = np.minimum(first_new, log.starts[1:]) - log.starts[:-1]
    return hits


def _lengths(tokens: IntArray) -> Lengths:
    p50, p95 = np.percentile(tokens, [50, 95]).tolist()
    return Lengths(p50=p50, p95=p95, max=int(tokens.max()))
