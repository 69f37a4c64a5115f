"""Which settings a sweep tries: chunk sizes, L1 sizes, policies."""

import math
from collections.abc import Sequence

from kvsim.engine.settings import MOST
from kvsim.errors import UsageError

LARGEST_CHUNK_TOKENS = 16384
SMALLEST_CHUNK_TOKENS = 32
"""The default's ends: smaller chunks are many small copies, larger ones lose most hits to alignment."""
MOST_CHUNK_TOKENS = 1 << 30


def default_chunk_sizes(block_tokens: int) -> list[int]:
    """Return the chunk sizes to try: the block times powers of two, from 32 to 16384 tokens.

    A block above 16384 tokens is tried alone.
    """
    sizes = [block_tokens << i for i in range(25) if block_tokens << i <= LARGEST_CHUNK_TOKENS]
    return [size for size in sizes if size >= SMALLEST_CHUNK_TOKENS] or sizes[-1:] or [block_tokens]


def check_chunk_sizes(sizes: Sequence[int], block_tokens: int) -> list[int]:
    """Return the chunk sizes, sorted, each once. Raises UsageError for one that is no multiple of the log's block."""
    if not sizes:
        raise UsageError("no chunk size to try")
    for size in sizes:
        check_log_chunk(size, block_tokens)
    return sorted(set(sizes))


def check_log_chunk(chunk_tokens: int | None, block_tokens: int | None) -> None:
    """Raise UsageError for a chunk that is no multiple of the log's block; a log of lengths alone has none."""
    if chunk_tokens is None or block_tokens is None:
        return
    if chunk_tokens > MOST_CHUNK_TOKENS:
        raise UsageError(f"chunk size {chunk_tokens}: at most {MOST_CHUNK_TOKENS:,} tokens")
    if chunk_tokens < 1 or chunk_tokens % block_tokens:
        raise UsageError(f"chunk size {chunk_tokens} is no multiple of the log's block of {block_tokens} tokens")


def check_l1_sizes(sizes: Sequence[float]) -> list[float]:
    """Return the L1 sizes in GiB, sorted, each once. Raises UsageError for one that is not above zero, or absurd."""
    if not sizes:
        raise UsageError("no L1 size to try")
    for size in sizes:
        check_l1_size("--l1-sizes-gb", size)
    return sorted(set(map(float, sizes)))


def check_l1_size(option: str, size: float) -> None:
    """Raise UsageError for what is no size of an L1 in GiB."""
    if not 0 < size <= MOST:
        raise UsageError(f"{option} {size:g}: sizes are above zero, and at most {MOST:g}")


def check_policies(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the policies, each once. Raises UsageError for an unknown one, or for belady, which no server can run."""
    if not names:
        raise UsageError("no policy to try")
    for name in names:
        if name == "belady":
            raise UsageError("policy belady knows the future: tune gives it as the ceiling, it cannot be recommended")
        if name not in known:
            raise UsageError(f"unknown policy {name!r}; there are {', '.join(known)}")
    return list(dict.fromkeys(names))


def spread(low: float, high: float, points: int, most: float | None = None) -> list[float]:
    """Return about `points` sizes from `low` to `high`, evenly spread by ratio, rounded up to two or three digits.

    None is above `most`, which then stands for those that would be; a range that would lie above it begins at an eighth
    of it.
    """
    if most is not None and most < high:
        low, high = min(low, most / 8), most
    ratio = (high / low) ** (1 / max(points - 1, 1))
    sizes = [high] if points == 1 else [low * ratio**i for i in range(points)]
    rounded = {_round_up(size) for size in sizes}
    return sorted(rounded if most is None else {min(size, most) for size in rounded})


def smaller(least: float, size: float) -> list[float]:
    """Return the sizes below `size` from `least` on, each four times the one before, rounded as those of `spread`."""
    found = []
    while (rounded := _round_up(least)) < size:
        found.append(rounded)
        least *= 4
    return found


def _round_up(size: float) -> float:
    """Return a size rounded up: to three digits from 100 on, to two below."""
    digits = 3 if size >= 100 else 2
    unit = 10.0 ** (math.floor(math.log10(size)) - digits + 1)
    return round(math.ceil(size / unit - 1e-9) * unit, 6)
