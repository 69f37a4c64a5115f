"""The plain statement of Belady's bound, which the compiled sweep is held to."""

from hypothesis import given, settings
from hypothesis import strategies as st
from plain_belady import belady_hits


def test_belady_by_hand() -> None:
    # After request 1 the cache of 2 keeps 1 and 2 (next used by requests 2 and 3), not 3 (never again).
    chains = [[1, 2, 3], [1, 4], [1, 2], [1, 4]]
    assert belady_hits(chains, 2) == [0, 1, 2, 1]
    assert belady_hits(chains, 3) == [0, 1, 2, 2]
    assert belady_hits(chains, None) == [0, 1, 2, 2]
    assert belady_hits(chains, 1) == [0, 1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(chunks=st.lists(st.integers(0, 4), max_size=9), capacity=st.integers(1, 3))
def test_belady_is_the_best(chunks: list[int], capacity: int) -> None:
    """Over requests of one chunk no choice of what to keep does better: all choices are tried."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for chunk in chunks:
        reached: dict[frozenset[int], int] = {}
        for cache, hits in best.items():
            now = hits + (chunk in cache)
            for after in {cache} | {frozenset(cache | {chunk}) - {gone} for gone in cache | {chunk, -1}}:
                if len(after) <= capacity:
                    reached[after] = max(now, reached.get(after, 0))
        best = reached
    assert sum(belady_hits([[chunk] for chunk in chunks], capacity)) == max(best.values())
