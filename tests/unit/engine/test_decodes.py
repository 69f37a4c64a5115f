import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.engine.decodes import Decodes
from kvsim.engine.job import Job


def job(index, target, output):
    made = Job(index, target, output, (), (), 0, "")
    made.produced = 1
    return made


requests = st.lists(st.tuples(st.integers(1, 60), st.integers(2, 40), st.integers(0, 20)), min_size=1, max_size=8)


@given(requests, st.integers(1, 9), st.lists(st.integers(1, 30), max_size=6))
def test_many_steps_at_once_are_as_many_single_ones(rows, block, strides):
    decodes = Decodes(block)
    tokens = {}
    for index, (target, output, late) in enumerate(rows):
        one = job(index, target, output)
        for _ in range(late % 3):
            tokens = {key: value + 1 for key, value in tokens.items()}
            for ended in decodes.advance(1):
                del tokens[ended]
        decodes.join(one)
        tokens[one] = target
    for stride in strides:
        if not tokens:
            break
        steps = min(stride, decodes.fitting(10**9))
        needed = sum(-(-(have + steps) // block) - -(-have // block) for have in tokens.values())
        assert decodes.blocks(steps) == needed
        assert decodes.context * decodes.batch == pytest.approx(sum(tokens.values()), rel=1e-12)
        limit = decodes.fitting(needed)
        assert decodes.blocks(limit) <= needed
        assert limit == decodes.fitting(10**9) or decodes.blocks(limit + 1) > needed
        tokens = {key: value + steps for key, value in tokens.items()}
        for ended in decodes.advance(steps):
            have = tokens.pop(ended)
            assert have == ended.target + ended.output - 1
            assert decodes.grown(ended.target, ended.decoded) == -(-have // block) - -(-ended.target // block)
        assert decodes.batch == len(tokens)
