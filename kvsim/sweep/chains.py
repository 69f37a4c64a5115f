"""The chunk chains of a log's requests, compressed for the sweep."""

from collections.abc import Iterable
from dataclasses import dataclass

from kvsim.sweep.paths import Paths
from kvtraces import Log


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chains:
    """The full chunks of every prompt of a log, for one chunk size."""

    chunk_tokens: int
    requests: int
    """Requests of the log, those without a full chunk included."""
    input_tokens: int
    """Prompt tokens of the log, those outside full chunks included."""
    paths: Paths

    @property
    def accesses(self) -> int:
        """Return the chunks of all requests together."""
        return self.paths.accesses

    @property
    def unique(self) -> int:
        """Return the different chunks; a cache of as many never evicts."""
        return self.paths.unique


def chains(log: Log, chunk_tokens: int) -> Chains:
    """Return the chains of `log` for chunks of `chunk_tokens` tokens.

    Raises ValueError where the log has no blocks, where `chunk_tokens` is no positive multiple of its block size, and
    where a request names a chunk twice.
    """
    return chains_of_sizes(log, [chunk_tokens])[chunk_tokens]


def chains_of_sizes(log: Log, sizes: Iterable[int]) -> dict[int, Chains]:
    """Return the chains for every chunk size of `sizes`; one pass over the blocks serves all. Raises as `chains`."""
    from kvsim.sweep import build  # noqa: PLC0415 - loads numba, which not every user of this module runs

    strides = {size: _stride(log, size) for size in sizes}
    paths = build.paths_of_strides(log, list(strides.values()))
    input_tokens = int(log.input_tokens.sum())
    return {
        size: Chains(chunk_tokens=size, requests=len(log), input_tokens=input_tokens, paths=paths[stride])
        for size, stride in strides.items()
    }


def _stride(log: Log, chunk_tokens: int) -> int:
    """Return the blocks in a chunk."""
    if log.block_tokens is None:
        raise ValueError("the log holds lengths alone: it has no blocks and hence no hit ratio")
    if chunk_tokens < 1 or chunk_tokens % log.block_tokens:
        raise ValueError(f"chunk size {chunk_tokens} is no multiple of the log's block of {log.block_tokens} tokens")
    return chunk_tokens // log.block_tokens
