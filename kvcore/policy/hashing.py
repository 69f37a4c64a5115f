"""The names of cached KV: one SHA-256 chain per prompt, one link per engine block.

A block's hash covers its tokens and, through its parent, everything before it; block 0's parent is the digest of the
namespace, that is of everything outside the prompt that changes KV. Two prompts therefore share a hash exactly where
they share KV. The scheme is that of vLLM's prefix caching (Kwon et al., "Efficient Memory Management for Large Language
Model Serving with PagedAttention", SOSP 2023), with SHA-256 over an encoding fixed here in place of the
interpreter's hash, so that every process, restart and machine computes the same names.
"""

import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 32
MAX_TOKEN_ID = 2**32 - 1
_NAMESPACE_TAG = b"kvcore namespace 1"
_ITEMS_TAG = b"kvcore multimodal 1"

TokenIds: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """Everything but the prompt that changes KV; chunks of differing namespaces never match one another."""

    model: str
    """The model's name or path."""
    revision: str = ""
    """Commit of the model's weights."""
    kv_dtype: str
    """Element type of the KV cache, `bfloat16` or `fp8_e4m3` say."""
    layout: str
    """Order of a block's dimensions in memory, `LBNHC` say."""
    isa: str = ""
    """Instruction set that packed the inside of a block (CPU backends); empty where a block is plain."""
    block_tokens: int
    """Tokens in an engine block."""
    parallel: tuple[tuple[str, int], ...] = ()
    """Rank layout: ranks by kind of parallelism, `(("tensor", 2), ("pipeline", 1))` say, in any order."""
    lora: str | None = None
    """Identity of the LoRA adapter; None for the base model. An adapter's name alone does not say what it holds."""
    salt: str | None = None
    """Cache salt, which keeps tenants apart; None for the shared cache."""

    def __post_init__(self) -> None:
        """Refuse a namespace that has no canonical form; raises ValueError."""
        if self.block_tokens < 1:
            raise ValueError(f"block_tokens must be at least 1, not {self.block_tokens}")
        kinds = [kind for kind, _ in self.parallel]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"parallel names a kind twice: {kinds}")

    def encode(self) -> bytes:
        """Return the canonical bytes: versioned, sorted by field name, every part prefixed by its length."""
        parts = [_prefixed(_NAMESPACE_TAG)]
        for name in sorted(f.name for f in fields(self)):
            parts.append(_prefixed(name.encode()))
            parts.append(_prefixed(_encode_value(getattr(self, name))))
        return b"".join(parts)

    def digest(self) -> bytes:
        """Return the 32 bytes that are the parent of every prompt's block 0."""
        return sha256(self.encode()).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class MultimodalItem:
    """An image, audio clip or video whose embeddings replace placeholder tokens, which alone do not tell it apart."""

    identifier: str
    """Hash of the content, as the engine computes it."""
    offset: int
    """Position in the prompt of the item's first placeholder, in tokens."""
    length: int
    """How many placeholder tokens it fills."""

    def __post_init__(self) -> None:
        """Refuse an item that lies nowhere; raises ValueError."""
        if self.offset < 0 or self.length < 1:
            raise ValueError(
                f"multimodal item {self.identifier!r}: offset must be >= 0 and length >= 1, "
                f"not {self.offset} and {self.length}"
            )


def block_hashes(
    token_ids: TokenIds,
    block_tokens: int,
    parent: bytes,
    multimodal: Sequence[MultimodalItem] = (),
    *,
    start: int = 0,
) -> list[bytes]:
    """Return the chained hash of every full block of `token_ids`; a trailing partial block has none.

    Hash i is SHA-256 of hash i - 1 (`parent` for the first), the block's token ids as little-endian uint32, and,
    where multimodal items overlap the block, their offsets relative to it and their identifiers.

    A chain goes on where it ended: pass the last hash as `parent`, the tokens after its block, and as `start` how many
    tokens of the prompt come before `token_ids[0]`. Items always lie at positions of the whole prompt.

    Raises ValueError for a token id outside 0 to 2**32 - 1 or not an integer, a parent that is not 32 bytes, a block
    of no tokens, or a `start` inside a block.
    """
    if block_tokens < 1:
        raise ValueError(f"block_tokens must be at least 1, not {block_tokens}")
    if len(parent) != DIGEST_BYTES:
        raise ValueError(f"a parent hash has {DIGEST_BYTES} bytes, this one {len(parent)}")
    if start < 0 or start % block_tokens:
        raise ValueError(f"start must be a multiple of block_tokens ({block_tokens}), not {start}")
    tokens = token_bytes(token_ids)
    block_bytes = 4 * block_tokens
    ends = range(block_bytes, len(tokens) + 1, block_bytes)
    hashes: list[bytes] = []
    if not multimodal:
        for end in ends:
            parent = sha256(parent + tokens[end - block_bytes : end]).digest()
            hashes.append(parent)
        return hashes
    folded = _fold_items(multimodal, block_tokens, start // block_tokens, len(ends))
    for end, items in zip(ends, folded, strict=True):
        parent = sha256(parent + tokens[end - block_bytes : end] + items).digest()
        hashes.append(parent)
    return hashes


def token_bytes(token_ids: TokenIds) -> bytes:
    """Return token ids as little-endian uint32.

    Raises ValueError, naming the first offender, for an id outside 0 to 2**32 - 1 or one that is not an integer.
    """
    if isinstance(token_ids, np.ndarray):
        if token_ids.ndim != 1 or token_ids.dtype.kind not in "iu":
            raise ValueError(f"token ids must be a 1-D array of integers, not {token_ids.ndim}-D {token_ids.dtype}")
        if token_ids.size and (int(token_ids.min()) < 0 or int(token_ids.max()) > MAX_TOKEN_ID):
            raise _bad_token(token_ids.tolist())
        return token_ids.astype("<u4").tobytes()
    if isinstance(token_ids, bytes | bytearray | memoryview | str):
        raise ValueError(f"token ids must be a sequence of integers, not {type(token_ids).__name__}")  # noqa: TRY004
    try:
        words = array("I", token_ids)
    except (OverflowError, TypeError):
        raise _bad_token(token_ids) from None
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def chunk_names(hashes: Sequence[bytes], blocks_per_chunk: int) -> tuple[bytes, ...]:
    """Return the names of the full chunks of a chain: the hash of each chunk's last block.

    Raises ValueError if a chunk has no blocks.
    """
    if blocks_per_chunk < 1:
        raise ValueError(f"blocks_per_chunk must be at least 1, not {blocks_per_chunk}")
    return tuple(hashes[blocks_per_chunk - 1 :: blocks_per_chunk])


def trace_ids(digests: Sequence[bytes]) -> NDArray[np.int64]:
    """Return the first 63 bits of each hash, the form in which a request log names a block, [len(digests)].

    Raises ValueError if one is not 32 bytes.
    """
    joined = b"".join(digests)
    if len(joined) != DIGEST_BYTES * len(digests):
        raise ValueError(f"every digest must have {DIGEST_BYTES} bytes")
    first_words = np.frombuffer(joined, dtype=">u8")[:: DIGEST_BYTES // 8]
    return (first_words >> np.uint64(1)).astype(np.int64)


def _bad_token(token_ids: Sequence[Any]) -> ValueError:
    for position, token in enumerate(token_ids):
        if not isinstance(token, int | np.integer):
            return ValueError(f"token {position} is {token!r}, not an integer")
        if not 0 <= token <= MAX_TOKEN_ID:
            return ValueError(f"token {position} is {token}, outside 0 to {MAX_TOKEN_ID}")
    return ValueError("token ids must be a sequence of integers")


def _fold_items(items: Sequence[MultimodalItem], block_tokens: int, first_block: int, count: int) -> Iterator[bytes]:
    """Yield what items add to each of `count` blocks from `first_block` on: empty for a block without one."""
    of_block: dict[int, list[MultimodalItem]] = {}
    for item in sorted(items, key=lambda item: (item.offset, item.identifier, item.length)):
        first = max(item.offset // block_tokens, first_block)
        last = min((item.offset + item.length - 1) // block_tokens, first_block + count - 1)
        for block in range(first, last + 1):
            of_block.setdefault(block, []).append(item)
    for block in range(first_block, first_block + count):
        overlapping = of_block.get(block)
        yield b"" if overlapping is None else _encode_items(overlapping, block * block_tokens)


def _encode_items(items: Sequence[MultimodalItem], block_start: int) -> bytes:
    parts = [_prefixed(_ITEMS_TAG)]
    for item in items:
        parts.append((item.offset - block_start).to_bytes(8, "little", signed=True))
        parts.append(_prefixed(item.identifier.encode()))
    return b"".join(parts)


def _encode_value(value: str | int | tuple[tuple[str, int], ...] | None) -> bytes:
    """Encode a namespace's field: a tag of its type, so that "1", 1 and None differ, then its bytes."""
    match value:
        case None:
            return b"n"
        case str():
            return b"s" + value.encode()
        case int():
            return b"i" + value.to_bytes(8, "little", signed=True)
        case _:
            pairs = (
                _prefixed(kind.encode()) + ranks.to_bytes(8, "little", signed=True) for kind, ranks in sorted(value)
            )
            return b"p" + b"".join(pairs)


def _prefixed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data
