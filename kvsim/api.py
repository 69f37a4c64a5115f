"""`simulate`: one setting over a log, by the sweep or by the core."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvcore.policy import POLICIES, CoreConfig, TierConfig
from kvsim.errors import UsageError
from kvtraces import Log

Engine = Literal["sweep", "core"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Simulation:
    """What a cache of one tier hits of a log when requests take no time. Shapes: n requests.

    Attributes:
        chunk_tokens: Tokens of a chunk.
        capacity_chunks: Chunks that fit; None for a cache without end.
        policy: The eviction policy.
        input_tokens: [n] prompt lengths.
        chunk_accesses: [n] full chunks of each prompt.
        hit_chunks: [n] leading ones of them that were resident.
    """

    chunk_tokens: int
    capacity_chunks: int | None
    policy: str
    input_tokens: NDArray[np.int64]
    chunk_accesses: NDArray[np.int64]
    hit_chunks: NDArray[np.int64]

    @property
    def hit_tokens(self) -> NDArray[np.int64]:
        """[n] prompt tokens hit."""
        return self.hit_chunks * self.chunk_tokens

    @property
    def token_hit_ratio(self) -> float:
        """Hit tokens of all prompt tokens."""
        total = int(self.input_tokens.sum())
        return int(self.hit_tokens.sum()) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the setting and its totals as plain JSON values; the ratio to 6 decimals."""
        return {
            "chunk_tokens": self.chunk_tokens,
            "policy": self.policy,
            "capacity_chunks": self.capacity_chunks,
            "requests": len(self.input_tokens),
            "chunk_accesses": int(self.chunk_accesses.sum()),
            "hit_chunks": int(self.hit_chunks.sum()),
            "hit_tokens": int(self.hit_tokens.sum()),
            "input_tokens": int(self.input_tokens.sum()),
            "token_hit_ratio": round(self.token_hit_ratio, 6),
        }


def simulate(
    log: Log,
    *,
    chunk_tokens: int,
    capacity_chunks: int | None = None,
    policy: str = "lru",
    engine: Engine = "sweep",
) -> Simulation:
    """Return what one setting hits: exact, each request taking no time, from an empty cache.

    Args:
        log: The request log, with block hashes.
        chunk_tokens: Tokens of a chunk, a multiple of the log's block.
        capacity_chunks: Chunks that fit; None for a cache without end.
        policy: An eviction policy, or belady, the offline bound.
        engine: `sweep` compiles the policy; `core` runs the policy core, the code of the server. Both hit the same.

    Raises:
        UsageError: A setting that is not one, or a log of lengths alone.
    """
    _check(log, chunk_tokens, capacity_chunks, policy, engine)
    accesses = np.diff(log.starts) * int(log.block_tokens or 0) // chunk_tokens
    if capacity_chunks == 0:
        hits = np.zeros(len(log), np.int64)
    elif engine == "core":
        from kvsim.engine.instant import simulate_core  # noqa: PLC0415 - the core is not needed by the sweep

        tier = TierConfig(name="l1", pages=capacity_chunks, eviction=policy)
        hits = simulate_core(log, CoreConfig(tiers=(tier,)), chunk_tokens).hit_chunks
    else:
        from kvsim.sweep import chains, hit_chunks  # noqa: PLC0415 - numba is not needed by the core

        hits = hit_chunks(chains(log, chunk_tokens), policy, capacity_chunks).astype(np.int64)
    return Simulation(
        chunk_tokens=chunk_tokens,
        capacity_chunks=capacity_chunks,
        policy=policy,
        input_tokens=log.input_tokens,
        chunk_accesses=accesses,
        hit_chunks=hits,
    )


def _check(log: Log, chunk_tokens: int, capacity: int | None, policy: str, engine: str) -> None:
    if log.block_tokens is None:
        raise UsageError("the log has lengths alone, no hash_ids: it can drive load, but has no hit ratio")
    if chunk_tokens > 1 << 30:
        raise UsageError(f"chunk size {chunk_tokens}: at most {1 << 30:,} tokens")
    if chunk_tokens < 1 or chunk_tokens % log.block_tokens:
        raise UsageError(f"chunk size {chunk_tokens} is no multiple of the log's block of {log.block_tokens} tokens")
    if capacity is not None and not 0 <= capacity < 1 << 62:
        raise UsageError(f"a capacity of {capacity} chunks: it cannot be negative, or 2^62 and more")
    if engine not in ("sweep", "core"):
        raise UsageError(f"unknown engine {engine!r}; there are sweep, core")
    if policy == "belady":
        if engine == "core":
            raise UsageError(
                "policy belady needs the future, and the core decides as requests come: use --engine sweep"
            )
    elif policy not in POLICIES:
        raise UsageError(f"unknown policy {policy!r}; there are {', '.join(POLICIES)}, belady")
