import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtraces import Log
from kvtraces.log import IntArray, offsets


def make_log(chains: list[list[int]], outputs: list[list[int]] | None = None, block_tokens: int = 16) -> Log:
    n = len(chains)
    flat = [one for chain in chains for one in chain]
    output_flat = [one for chain in outputs or [] for one in chain]
    return Log(
        block_tokens=block_tokens,
        timestamp_ms=np.arange(n, dtype=np.float64),
        input_tokens=np.array([len(chain) * block_tokens + 3 for chain in chains], np.int64),
        output_tokens=np.array([len(chain) * block_tokens for chain in outputs or [[]] * n], np.int64),
        starts=offsets(np.array([len(chain) for chain in chains], np.int64)),
        blocks=np.array(flat, np.int64),
        output_starts=offsets(np.array([len(chain) for chain in outputs], np.int64)) if outputs is not None else None,
        output_blocks=np.array(output_flat, np.int64) if outputs is not None else None,
        extra={"ttft_ms": np.arange(n, dtype=np.float64) + 0.5},
    )


def runs(starts: IntArray, values: IntArray) -> list[list[int]]:
    return [values[a:b].tolist() for a, b in itertools.pairwise(starts)]


chains = st.lists(st.lists(st.integers(0, 2**63 - 1), max_size=12), min_size=1, max_size=8)


@given(chains, st.integers(1, 6))
def test_a_chunk_is_named_by_its_last_block(prompts: list[list[int]], k: int) -> None:
    starts, names = make_log(prompts).chunks(16 * k)
    assert runs(starts, names) == [chain[k - 1 :: k] for chain in prompts]


@given(st.data(), chains, st.integers(1, 6))
def test_coarsen_takes_the_output_along(data: st.DataObject, prompts: list[list[int]], k: int) -> None:
    outputs = [data.draw(st.lists(st.integers(0, 99), max_size=9)) for _ in prompts]
    coarse = make_log(prompts, outputs).coarsen(16 * k)
    assert coarse.output_starts is not None
    assert coarse.output_blocks is not None
    assert coarse.block_tokens == 16 * k
    assert runs(coarse.starts, coarse.blocks) == [chain[k - 1 :: k] for chain in prompts]
    whole = [(p + o)[k - 1 :: k][len(p) // k :] for p, o in zip(prompts, outputs, strict=True)]
    assert runs(coarse.output_starts, coarse.output_blocks) == whole


def test_coarsening_twice_is_coarsening_once() -> None:
    log = make_log([list(range(25)), list(range(100, 111))])
    twice, once = log.coarsen(32).coarsen(96), log.coarsen(96)
    assert runs(twice.starts, twice.blocks) == runs(once.starts, once.blocks) == [[5, 11, 17, 23], [105]]


@pytest.mark.parametrize("chunk_tokens", [8, 24, 0, -16])
def test_a_chunk_that_is_no_multiple_of_the_block(chunk_tokens: int) -> None:
    message = f"^a chunk of {chunk_tokens} tokens is no multiple of the log's block of 16 tokens$"
    with pytest.raises(ValueError, match=message):
        make_log([[1]]).chunks(chunk_tokens)


@given(st.data(), chains)
def test_select(data: st.DataObject, prompts: list[list[int]]) -> None:
    log = make_log(prompts, prompts)
    rows = data.draw(st.lists(st.integers(0, len(prompts) - 1), max_size=10))
    picked = log.select(np.array(rows, np.int64))
    assert picked.output_starts is not None
    assert picked.output_blocks is not None
    assert runs(picked.starts, picked.blocks) == [prompts[i] for i in rows]
    assert runs(picked.output_starts, picked.output_blocks) == [prompts[i] for i in rows]
    assert picked.timestamp_ms.tolist() == rows
    assert picked.extra["ttft_ms"].tolist() == [i + 0.5 for i in rows]


def test_head_and_masks() -> None:
    log = make_log([[1, 2], [], [3], [4, 5]])
    assert runs(log.head(2).starts, log.head(2).blocks) == [[1, 2], []]
    assert len(log.head(99)) == 4
    odd = log.select(np.array([False, True, False, True]))
    assert runs(odd.starts, odd.blocks) == [[], [4, 5]]


def test_concatenate_is_the_inverse_of_slicing() -> None:
    log = make_log([[1, 2], [], [3], [4, 5]], [[7], [8, 9], [], []])
    joined = Log.concatenate([log.select(slice(0, 1)), log.select(slice(1, 4))])
    assert joined.output_starts is not None
    assert joined.output_blocks is not None
    assert runs(joined.starts, joined.blocks) == [[1, 2], [], [3], [4, 5]]
    assert runs(joined.output_starts, joined.output_blocks) == [[7], [8, 9], [], []]
    assert joined.extra["ttft_ms"].tolist() == [0.5, 1.5, 2.5, 3.5]


def test_concatenate_fills_what_some_lack() -> None:
    with_text, without = make_log([[1]], [[2]]), make_log([[3], [4]])
    with_text.extra["salt"] = np.array(["a"], np.dtypes.StringDType())
    del without.extra["ttft_ms"]
    joined = Log.concatenate([without, with_text])
    assert joined.extra["salt"].tolist() == ["", "", "a"]
    assert np.isnan(joined.extra["ttft_ms"]).tolist() == [True, True, False]
    assert joined.output_starts is not None
    assert joined.output_starts.tolist() == [0, 0, 0, 1]


def test_concatenate_refuses_what_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match="different block sizes"):
        Log.concatenate([make_log([[1]]), make_log([[1]], block_tokens=32)])
    with pytest.raises(ValueError, match="no logs"):
        Log.concatenate([])
