import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtraces import Chat, Lengths, Log, describe, generate
from kvtraces._seen import first_seen
from kvtraces.describe import leading_hits
from kvtraces.log import offsets


def make_log(prompts: list[list[int]], block_tokens: int | None = 10) -> Log:
    n = len(prompts)
    return Log(
        block_tokens=block_tokens,
        timestamp_ms=1000.0 * np.arange(n),
        input_tokens=np.array([10 * len(prompt) + 5 for prompt in prompts], np.int64),
        output_tokens=np.full(n, 7, np.int64),
        starts=offsets(np.array([len(prompt) for prompt in prompts], np.int64)),
        blocks=np.array([one for prompt in prompts for one in prompt], np.int64),
    )


@settings(deadline=None)  # the kernel may be compiled
@given(st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 20), max_size=60))
def test_first_seen(names: list[int]) -> None:
    seen: set[int] = set()
    expected = [not (name in seen or seen.add(name)) for name in names]
    assert first_seen(np.array(names, np.int64)).tolist() == expected


def test_first_seen_in_a_table_that_grows() -> None:
    names = np.random.default_rng(1).integers(0, 60_000, 200_000) << 40
    expected = np.zeros(len(names), bool)
    expected[np.unique(names, return_index=True)[1]] = True
    assert np.array_equal(first_seen(names), expected)


@settings(deadline=None)  # the kernel may be compiled
@given(st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=12))
def test_leading_hits_of_an_unbounded_cache(words: list[list[int]]) -> None:
    # A chain's names stand for all before them, as in a real log.
    prompts = [[hash(tuple(word[: i + 1])) % 2**62 for i in range(len(word))] for word in words]
    cache: set[int] = set()
    expected = []
    for prompt in prompts:
        hits = next((i for i, name in enumerate(prompt) if name not in cache), len(prompt))
        expected.append(hits)
        cache.update(prompt)
    log = make_log(prompts)
    assert leading_hits(log, first_seen(log.blocks)).tolist() == expected


def test_describe() -> None:
    summary = describe(make_log([[1, 2, 3], [1, 2, 4], [1, 9], [], [1, 2, 3]]))
    assert (summary.requests, summary.duration_s, summary.requests_per_s) == (5, 4.0, 1.25)
    assert (summary.input_tokens, summary.output_tokens) == (135, 35)
    assert summary.input_lengths == Lengths(p50=35, p95=35, max=35)
    assert (summary.block_tokens, summary.unique_blocks) == (10, 5)
    assert summary.unbounded_token_hit_ratio == pytest.approx((20 + 10 + 30) / 135)


def test_describe_lengths_alone() -> None:
    summary = describe(make_log([[], []], block_tokens=None))
    assert (summary.block_tokens, summary.unique_blocks, summary.unbounded_token_hit_ratio) == (None, None, None)


def test_describe_all_at_once() -> None:
    summary = describe(make_log([[1]]))
    assert (summary.duration_s, summary.requests_per_s, summary.unbounded_token_hit_ratio) == (0, 0, 0)
    with pytest.raises(ValueError, match="without requests"):
        describe(generate(Chat(requests=5)).head(0))
