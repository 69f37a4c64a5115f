"""A profile: every cost of one model on one GPU (or one tensor-parallel group of them)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from kvcore.policy import LoadCost
from kvsim.profiles.costs import FloatArray, Grid, PrefillFit, TransferCurve

DIRECTIONS = ("h2d", "d2h", "disk_read", "disk_write", "network_read", "network_write")
"""L1 to GPU, GPU to L1, and L1 from and to a lower tier on a local disk or across the network."""
_UNQUIET = 0.2
"""Half of a profile's points differ by more between their repeats: one on a quiet host differs by 0.06, and by one of
0.22 TTFT was predicted a fifth too long (benchmarks/results/predict-next-server-h100.json)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Where one part of a profile comes from, and how far it is off.

    Attributes:
        kind: `measured`, `tables` (composed from measured operators), `fitted` or `assumed`.
        source: Who measured what, with which versions.
        error: The stated error, in words.
        spread: By how much the repeats of a point differ, largest less smallest over the median; the median over
            points. None: unknown.
    """

    kind: str
    source: str
    error: str
    spread: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a model costs on a GPU: the times of engine steps and of copies, and the sizes that bound them.

    Attributes:
        name: Unique among the shipped profiles.
        model: Lower-case short name, such as `qwen3-8b`.
        gpu: Lower-case short name, such as `h100`.
        tensor_parallel: GPUs of one engine.
        layers: Transformer layers: how finely a load can overlap with compute.
        kv_bytes_per_token: KV cache of a token over all ranks.
        weight_bytes: Weights over all ranks.
        gpu_memory_bytes: Device memory over all ranks.
        max_model_len: Longest prompt and output together.
        prefill: Seconds of a step by new tokens (x) and cached tokens in front of them (y), on a GPU that rests in
            between; None: the fit alone.
        prefill_fit: The fitted form; used where there is no grid, and by the core's load-or-recompute.
        decode: Seconds of a step by batch (x) and context tokens of each request (y).
        transfers: Curves by direction (`DIRECTIONS`); the h2d and d2h curves are those of all ranks together.
        duplex: Speed of each direction of PCIe while both are busy, as a fraction of its speed alone.
        handling_base_s: The server's own time for a request, outside the engine's steps.
        handling_token_s: The same, for each prompt token.
        sustained: Time of a prefill on a GPU that computes prompts without rest, over that in `prefill`.
        provenance: Where each part comes from.
    """

    name: str
    model: str
    gpu: str
    tensor_parallel: int
    layers: int
    kv_bytes_per_token: int
    weight_bytes: int
    gpu_memory_bytes: int
    max_model_len: int
    prefill: Grid | None
    prefill_fit: PrefillFit
    decode: Grid
    transfers: Mapping[str, TransferCurve]
    duplex: float
    handling_base_s: float
    handling_token_s: float
    provenance: Mapping[str, Part]
    sustained: float = 1.0

    def __post_init__(self) -> None:
        """Refuse sizes and rates that no machine has."""
        sizes = (self.tensor_parallel, self.layers, self.kv_bytes_per_token, self.gpu_memory_bytes, self.max_model_len)
        if min(sizes) < 1 or self.weight_bytes < 0:
            raise ValueError(f"profile {self.name!r}: sizes are above zero")
        if not 0 < self.duplex <= 1:
            raise ValueError(f"profile {self.name!r}: duplex is a fraction of the speed alone, above 0, at most 1")
        if not 1 <= self.sustained < math.inf:
            raise ValueError(f"profile {self.name!r}: sustained is 1 or above: a GPU that rests is not the slower one")
        missing = [direction for direction in ("h2d", "d2h") if direction not in self.transfers]
        if missing or any(direction not in DIRECTIONS for direction in self.transfers):
            raise ValueError(f"profile {self.name!r}: transfers are {', '.join(DIRECTIONS)}; h2d and d2h are needed")

    def prefill_s(self, new: float, cached: float = 0) -> float:
        """Return the time of a step that computes `new` tokens behind `cached` ones, in seconds; none for none."""
        if new <= 0:
            return 0.0
        return self.prefill_fit.at(new, cached) if self.prefill is None else self.prefill.at(new, cached)

    def prefill_s_array(self, new: ArrayLike, cached: ArrayLike = 0) -> FloatArray:
        """Return `prefill_s` of many; the arguments broadcast, and so is the result shaped."""
        costs = self.prefill_fit if self.prefill is None else self.prefill
        return np.where(np.asarray(new) > 0, costs.at_array(new, cached), 0.0)

    def decode_step_s(self, batch: float, context: float) -> float:
        """Return the time in which `batch` requests of `context` tokens each get one token, in seconds."""
        return self.decode.at(batch, context)

    def transfer_s(self, size: ArrayLike, direction: str) -> FloatArray:
        """Return the time of copies of `size` bytes with the link to themselves, in seconds, shaped like `size`.

        Raises:
            KeyError: The profile has no such direction.
        """
        return self.transfers[direction].at_array(size)

    def handling_s(self, prompt_tokens: float) -> float:
        """Return what the server takes for a request beside the engine's steps, in seconds."""
        return self.handling_base_s + self.handling_token_s * prompt_tokens

    def kv_bytes(self, tokens: int) -> int:
        """Return the KV cache of `tokens` tokens, in bytes over all ranks."""
        return self.kv_bytes_per_token * tokens

    def extrapolation(self, new: int, cached: int) -> str | None:
        """Return a warning where a prefill as large as this lies beyond the measured grid, None where it does not."""
        grid = self.prefill
        if grid is None or not grid.beyond(new, cached):
            return None
        return (
            f"profile {self.name}: prefill of up to {new:,} new and {cached:,} cached tokens was asked for, "
            f"measured are {grid.x[0]:,} to {grid.x[-1]:,} new and {grid.y[0]:,} to {grid.y[-1]:,} cached: extrapolated"
        )

    def doubt(self) -> str | None:
        """Return a warning where its prefills were measured beside other work, None where nothing says so."""
        spread = self.provenance["prefill"].spread if "prefill" in self.provenance else None
        if spread is None or spread < _UNQUIET:
            return None
        return (
            f"profile {self.name}: repeats of a point spread by {100 * spread:.1f}% (median): other work ran beside, "
            "so measure again before you rely on times"
        )

    def load_cost(self, chunk_tokens: int, lower: tuple[str, ...] = ()) -> LoadCost:
        """Return the core's load-or-recompute costs for this profile.

        Args:
            chunk_tokens: Tokens of a chunk.
            lower: The kinds of the tiers below tier 0, `disk` or `network` each.
        """
        curves = [self.transfers["h2d"], *(self.transfers[f"{kind}_read"] for kind in lower)]
        return LoadCost(
            chunk_tokens=chunk_tokens,
            prefill_floor_ns=1e9 * self.prefill_fit.floor_s,
            prefill_base_ns=1e9 * self.prefill_fit.base_s,
            prefill_linear_ns=1e9 * self.prefill_fit.linear_s,
            prefill_quadratic_ns=1e9 * self.prefill_fit.quadratic_s,
            latency_ns=tuple(1e9 * curve.latency_s for curve in curves),
            bytes_per_s=tuple(curve.peak_bytes_per_s for curve in curves),
            floor_cuts=True,
        )
