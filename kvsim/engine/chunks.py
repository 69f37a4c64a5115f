"""The chunks of a log's prompts, as the core names them."""

from itertools import pairwise

from kvsim.errors import UsageError
from kvtraces import Log


def chunk_chains(log: Log, chunk_tokens: int) -> list[tuple[int, ...]]:
    """Return each request's full chunks, head first; a chunk of k blocks is named by its last block.

    Raises:
        UsageError: The log has lengths alone, or a chunk is no whole number of its blocks.
    """
    try:
        starts, names = log.chunks(chunk_tokens)
    except ValueError as error:
        raise UsageError(str(error)) from None
    flat = names.tolist()
    return [tuple(flat[a:b]) for a, b in pairwise(starts.tolist())]


def output_chains(log: Log, chunk_tokens: int) -> list[tuple[int, ...]]:
    """Return the full chunks that follow each prompt's once its output is appended; none where they are not recorded.

    Raises:
        UsageError: As `chunk_chains`.
    """
    coarse = log.coarsen(chunk_tokens)
    if coarse.output_starts is None or coarse.output_blocks is None:
        return [()] * len(log)
    flat = coarse.output_blocks.tolist()
    return [tuple(flat[a:b]) for a, b in pairwise(coarse.output_starts.tolist())]


def salts(log: Log) -> list[str]:
    """Return each request's tenant: the log's `salt` column, empty strings without one."""
    column = log.extra.get("salt")
    return [""] * len(log) if column is None else [str(salt) for salt in column.tolist()]
