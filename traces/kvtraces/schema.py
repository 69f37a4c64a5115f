"""The trace schema: JSONL, a Mooncake row plus optional fields, so that other tools can read our logs and we theirs.

Mooncake: Qin et al., "Mooncake: A KVCache-centric Disaggregated Architecture for LLM Serving", FAST 2025. It holds
neither tokens nor text.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

MAX_TOKENS = 2**31
MAX_BLOCK_TOKENS = 2**24
MAX_SEQ = 2**53
MAX_ID = 2**63 - 1
MAX_MS = 1e15

Tokens = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
Milliseconds = Annotated[float, Meta(ge=0, lt=MAX_MS)]
BlockId = Annotated[int, Meta(ge=0, le=MAX_ID)]
Text = Annotated[str, Meta(max_length=1024)]


class Row(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request. Times in milliseconds, lengths and matches in tokens."""

    timestamp: Milliseconds
    """Arrival, from any origin."""
    input_length: Tokens
    output_length: Tokens
    hash_ids: list[BlockId]
    """First 63 bits of the hashes of the prompt's blocks; the trailing partial block may have one too."""
    block_size: Annotated[int, Meta(ge=1, le=MAX_BLOCK_TOKENS)] | None = None
    """Tokens in a block."""
    seq: Annotated[int, Meta(ge=0, le=MAX_SEQ)] | None = None
    """Order of lookup: rows are sorted by it, whatever order they were written in."""
    request_id: Text | None = None
    session_id: Text | None = None
    instance: Text | None = None
    """The engine instance that served the request."""
    model: Text | None = None
    salt: Text | None = None
    """Cache salt or a name for it. The block hashes already keep salts apart."""
    status: Text | None = None
    l0_tokens: Tokens | None = None
    """Prompt tokens found in the engine's own prefix cache."""
    matched_l1: Tokens | None = None
    """Leading L1 chunks x chunk tokens, whatever L0 holds."""
    matched_l2: Tokens | None = None
    loaded_tokens: Tokens | None = None
    """Tokens copied into the engine, beyond what L0 held."""
    queue_ms: Milliseconds | None = None
    load_ms: Milliseconds | None = None
    """What waiting for its load cost the request: until it was ready for its first step, or within that step for as
    long as attention stood still. What is copied while the engine computes costs nothing."""
    prefill_ms: Milliseconds | None = None
    ttft_ms: Milliseconds | None = None
    """Time to first token, measured in the engine."""
    output_hash_ids: list[BlockId] | None = None
    """The blocks that follow the prompt's full blocks once the output is appended."""


NUMBERS = (
    "seq",
    "l0_tokens",
    "matched_l1",
    "matched_l2",
    "loaded_tokens",
    "queue_ms",
    "load_ms",
    "prefill_ms",
    "ttft_ms",
)
"""Optional fields that become float64 columns of a Log."""
INTEGERS = ("seq", "l0_tokens", "matched_l1", "matched_l2", "loaded_tokens")
"""Those of them that a row writes as integers."""
TEXTS = ("request_id", "session_id", "instance", "model", "salt", "status")
"""Optional fields that become string columns of a Log."""
