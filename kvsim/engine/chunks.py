"""The chunks of a log's prompts, as the core names them."""

import numpy as np

from kvtraces import Log


def blocks_per_chunk(log: Log, chunk_tokens: int) -> int:
    """Return how many of the log's blocks make a chunk.

    Raises:
        ValueError: The log has lengths alone, or a chunk is no whole number of its blocks.
    """
    if log.block_tokens is None:
        raise ValueError("the log has no hash_ids: its lengths can drive load, but nothing says what is reused")
    if chunk_tokens < 1 or chunk_tokens % log.block_tokens:
        raise ValueError(
            f"chunks of {chunk_tokens} tokens: not a multiple of the log's {log.block_tokens}-token blocks"
        )
    return chunk_tokens // log.block_tokens


def chunk_chains(log: Log, chunk_tokens: int) -> list[tuple[int, ...]]:
    """Return each request's full chunks, head first; a chunk of k blocks is named by its last block.

    Raises:
        ValueError: As `blocks_per_chunk`.
    """
    step = blocks_per_chunk(log, chunk_tokens)
    counts = np.diff(log.starts) // step
    ends = np.concatenate(([0], np.cumsum(counts)))
    owner = np.repeat(np.arange(len(log)), counts)
    rank = np.arange(ends[-1]) - ends[:-1][owner]
    names = log.blocks[log.starts[:-1][owner] + (rank + 1) * step - 1].tolist()
    return [tuple(names[a:b]) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def salts(log: Log) -> list[str]:
    """Return each request's tenant: the log's `salt` column, empty strings without one."""
    column = log.extra.get("salt")
    return [""] * len(log) if column is None else [str(salt) for salt in column.tolist()]
