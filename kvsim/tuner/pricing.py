"""What a setting costs: bytes of L1, and time to first token without a queue."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvsim import models
from kvsim.errors import UsageError
from kvsim.models.names import plain
from kvsim.models.shape import ModelShape
from kvsim.models.table import canonical
from kvsim.profiles import Profile, load, lookup

GIB = 1 << 30
PAGE_BYTES = 2 << 20
"""The arena's page: a chunk owns whole pages, so a chunk of 2.1 MiB takes 4 MiB of L1."""

Packing: TypeAlias = Literal["none", "lossless"]
PACKED_SHARE = 51_472 / 65_536
"""What bf16 KV takes packed (`kvkernels.packing`), of its size on the GPU: a row of 16 tokens and 8 heads."""

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSize:
    """How large KV is: bytes a token as it is stored, and on the GPU and on the way there, all ranks together.

    Beyond the GPU it takes `packed_share` of both: 1, or less where it is packed, which `packable` KV can be.
    """

    stored_bytes_per_token: int
    moved_bytes_per_token: int
    note: str | None = None
    packed_share: float = 1.0
    packable: bool = False

    @classmethod
    def of(
        cls, shape: ModelShape, *, tensor_parallel: int = 1, kv_dtype: str = "auto", packing: Packing = "none"
    ) -> "KvSize":
        """Return the sizes of a model's KV.

        Raises UsageError as `ModelShape.bytes_per_token` does, and for packing of what is not bf16.
        """
        if packing == "lossless" and not shape.is_bf16(kv_dtype):
            raise UsageError(f"--packing lossless: KV of {shape.name} is not bf16, and nothing else is packed")
        return cls(
            packed_share=_share(packing),
            stored_bytes_per_token=shape.bytes_per_token(tensor_parallel=tensor_parallel, kv_dtype=kv_dtype),
            moved_bytes_per_token=shape.moved_bytes_per_token(tensor_parallel=tensor_parallel, kv_dtype=kv_dtype),
            note=shape.note(),
            packable=shape.is_bf16(kv_dtype),
        )

    def chunk_bytes(self, chunk_tokens: int) -> int:
        """Return the bytes of L1 that a chunk takes: whole pages."""
        return math.ceil(chunk_tokens * self.l1_bytes_per_token / PAGE_BYTES) * PAGE_BYTES

    @property
    def l1_bytes_per_token(self) -> float:
        """Bytes of a token in L1."""
        return self.stored_bytes_per_token * self.packed_share

    def capacity_chunks(self, l1_size_gb: float, chunk_tokens: int) -> int:
        """Return how many chunks fit in an L1 of so many GiB, all ranks together."""
        return int(l1_size_gb * GIB) // self.chunk_bytes(chunk_tokens)

    def size_gb(self, chunks: int, chunk_tokens: int) -> float:
        """Return the GiB of L1 that so many chunks take."""
        return chunks * self.chunk_bytes(chunk_tokens) / GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """A cost profile and the KV's size: everything between hit tokens and TTFT."""

    profile: Profile
    kv: KvSize

    @property
    def run_profile(self) -> Profile:
        """The profile as a simulation takes it: with this KV's size."""
        stored = self.kv.stored_bytes_per_token
        return replace(self.profile, kv_bytes_per_token=stored, kv_copies=self.kv.moved_bytes_per_token // stored)

    def recompute_s(self, input_tokens: IntArray) -> FloatArray:
        """Return the TTFT of prompts that nothing is cached of, in seconds: [n] for [n]."""
        new = np.maximum(input_tokens, 1)
        return self.profile.prefill_s_array(new, 0) + self.profile.handling_s(0) + self._handling_tokens(input_tokens)

    def load_s(self, input_tokens: IntArray, hit_tokens: IntArray) -> FloatArray:
        """Return the TTFT of prompts whose hit is loaded from L1, in seconds: [n] for [n].

        The whole hit is copied, then what is new is computed behind it. The last token is always computed: its output
        is the first token, so a hit of the whole prompt still takes a step.
        """
        cached = np.minimum(hit_tokens, np.maximum(input_tokens, 1) - 1)
        new = np.maximum(input_tokens, 1) - cached
        copy = self.profile.transfer_s(hit_tokens * self.kv.moved_bytes_per_token * self.kv.packed_share, "h2d")
        step = self.profile.prefill_s_array(new, cached)
        return copy + step + self.profile.handling_s(0) + self._handling_tokens(input_tokens)

    def ttft_s(
        self, input_tokens: IntArray, hit_tokens: IntArray, without_s: FloatArray
    ) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Return TTFT with a cache [n] in seconds, and which hits are loaded [n]: those that beat computing anew.

        Args:
            input_tokens: [n] prompt lengths.
            hit_tokens: [n] leading tokens found in L1.
            without_s: [n] `recompute_s(input_tokens)`.
        """
        ttft = without_s.copy()
        loaded = np.zeros(len(ttft), bool)
        hits = np.flatnonzero(hit_tokens)
        with_load = self.load_s(input_tokens[hits], hit_tokens[hits])
        faster = with_load < without_s[hits]
        ttft[hits[faster]] = with_load[faster]
        loaded[hits[faster]] = True
        return ttft, loaded

    def _handling_tokens(self, input_tokens: IntArray) -> FloatArray:
        return self.profile.handling_token_s * input_tokens.astype(np.float64)


def kv_size(name: str, *, tensor_parallel: int = 1, kv_dtype: str = "auto", packing: Packing = "none") -> KvSize:
    """Return the KV sizes of a model by name or config.json. Raises UsageError."""
    return KvSize.of(models.model(name), tensor_parallel=tensor_parallel, kv_dtype=kv_dtype, packing=packing)


def _shape(profile: Profile) -> ModelShape | None:
    name = canonical(profile.model)
    return None if name is None else models.model(name)


def _copies(profile: Profile) -> int:
    """Return how many ranks hold the same KV: as the profile says; one that is older does not."""
    shape = _shape(profile)
    return profile.tensor_parallel if shape is not None and shape.latent else profile.kv_copies


def _is_of_bf16(profile: Profile) -> bool:
    """Return whether a profile's KV is as large as bf16 makes that of its model, where the model is known."""
    shape = _shape(profile)
    if shape is None:
        return False
    try:
        size = shape.bytes_per_token(tensor_parallel=profile.tensor_parallel, kv_dtype="bf16")
    except UsageError:  # ranks that the model's heads do not allow: the profile is of another model
        return False
    return size == profile.kv_bytes_per_token


def _share(packing: Packing) -> float:
    return PACKED_SHARE if packing == "lossless" else 1.0


def costs(
    *,
    model: str | None = None,
    gpu: str | None = None,
    profile: str | Path | None = None,
    tensor_parallel: int | None = None,
    kv_dtype: str = "auto",
    packing: Packing = "none",
) -> Costs:
    """Return the costs of a model on a GPU, from a shipped profile or from the file `profile`.

    With a profile of your own the model may be left out: it names one, with its KV's size. Raises UsageError for names
    that are not known or not enough, ProfileError for a profile that does not exist or cannot be read.
    """
    if profile is None:
        if model is None or gpu is None:
            raise UsageError("--model and --gpu are needed, or a --profile")
        shape = models.model(model)
        kind = models.gpu(gpu).name
        ranks = 1 if tensor_parallel is None else tensor_parallel
        found = lookup(canonical(shape.name) or shape.name, kind, ranks)
    else:
        found = load(profile)
        if gpu is not None and plain(gpu) != plain(found.gpu) and models.gpu(gpu).name != found.gpu:
            raise UsageError(f"--gpu {gpu}: the profile {profile} is of {found.gpu}")
        ranks = found.tensor_parallel if tensor_parallel is None else tensor_parallel
        if ranks != found.tensor_parallel:
            raise UsageError(f"--tensor-parallel {ranks}: the profile {profile} is of {found.tensor_parallel}")
        if model is None and kv_dtype == "auto":
            size = found.kv_bytes_per_token
            kv = KvSize(
                stored_bytes_per_token=size,
                moved_bytes_per_token=size * _copies(found),
                packed_share=_share(packing),
                packable=_is_of_bf16(found),
            )
            return Costs(profile=found, kv=kv)
        shape = models.model(model or found.model)
    return Costs(profile=found, kv=KvSize.of(shape, tensor_parallel=ranks, kv_dtype=kv_dtype, packing=packing))
