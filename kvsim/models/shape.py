"""The part of a model's architecture that decides how large its KV is."""

from dataclasses import dataclass

from kvsim.errors import UsageError

KV_DTYPES = {
    "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2, "half": 2,
    "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp32": 4, "float32": 4,
}  # fmt: skip
"""Bytes of one KV value by the dtype's names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model as its KV cache sees it.

    Attributes:
        name: What it was asked for by.
        layers: Layers that keep KV.
        kv_heads: KV heads of a layer; 1 for MLA.
        head_values: Values that one head keeps a token: 2 x head_dim (K and V), or the latent width for MLA.
        latent: Whether the layers are MLA: each rank holds the same latent, and L1 stores it once.
        local_layers: How many layers attend to a window only.
        window_tokens: That window.
        kv_dtype: The dtype that `auto` stands for.
    """

    name: str
    layers: int
    kv_heads: int
    head_values: int
    latent: bool = False
    local_layers: int = 0
    window_tokens: int = 0
    kv_dtype: str = "bf16"

    def bytes_per_token(self, *, tensor_parallel: int = 1, kv_dtype: str = "auto") -> int:
        """Return the bytes of KV that L1 keeps for one token, all ranks together.

        With fewer KV heads than ranks each rank keeps a whole head, so heads are kept several times; MLA's latent is
        the same on every rank and is stored once. Raises UsageError for a dtype without a name here, or ranks that do
        not divide the heads.
        """
        value_bytes = self._value_bytes(kv_dtype)
        return self.layers * self._stored_heads(tensor_parallel) * self.head_values * value_bytes

    def moved_bytes_per_token(self, *, tensor_parallel: int = 1, kv_dtype: str = "auto") -> int:
        """Return the bytes that a load of one token moves over all ranks' links together.

        What L1 keeps, but for MLA, whose latent goes to every rank.
        """
        stored = self.bytes_per_token(tensor_parallel=tensor_parallel, kv_dtype=kv_dtype)
        return stored * tensor_parallel if self.latent else stored

    def note(self) -> str | None:
        """Return what a reader must know about the count, if anything."""
        if not self.local_layers:
            return None
        return (
            f"{self.local_layers} of {self.layers} layers attend to {self.window_tokens} tokens only; L1 keeps them "
            "whole, as vLLM does under a KV connector, so they are counted whole"
        )

    def is_bf16(self, kv_dtype: str = "auto") -> bool:
        """Return whether KV of this dtype (`auto`: the model's) is bf16."""
        return (self.kv_dtype if kv_dtype == "auto" else kv_dtype.lower()) in {"bf16", "bfloat16"}

    def _value_bytes(self, kv_dtype: str) -> int:
        dtype = self.kv_dtype if kv_dtype == "auto" else kv_dtype.lower()
        if dtype not in KV_DTYPES:
            raise UsageError(f"unknown KV dtype {kv_dtype!r}; there are auto, {', '.join(KV_DTYPES)}")
        return KV_DTYPES[dtype]

    def _stored_heads(self, ranks: int) -> int:
        if ranks < 1:
            raise UsageError(f"tensor parallel {ranks}: at least 1")
        if self.latent:
            return 1
        if self.kv_heads % ranks and ranks % self.kv_heads:
            raise UsageError(
                f"{self.name} has {self.kv_heads} KV heads, which {ranks} tensor-parallel ranks cannot share"
            )
        return max(self.kv_heads, ranks)
