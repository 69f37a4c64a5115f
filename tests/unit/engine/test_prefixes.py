from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvsim.engine.prefixes import prefixes
from kvtraces import Log


def log_of(chains):
    return Log(
        block_tokens=16,
        timestamp_ms=np.zeros(len(chains)),
        input_tokens=np.array([16 * len(chain) for chain in chains], dtype=np.int64),
        output_tokens=np.ones(len(chains), dtype=np.int64),
        starts=np.cumsum([0, *map(len, chains)]).astype(np.int64),
        blocks=np.array([name for chain in chains for name in chain], dtype=np.int64),
    )


def name(path):
    """A chained name: equal for equal paths only."""
    value = 0
    for step in path:
        value = value * 4 + step + 1
    return value


trees = st.lists(st.lists(st.integers(0, 2), max_size=8), min_size=1, max_size=12)


def chained(paths):
    return [[name(path[: i + 1]) for i in range(len(path))] for path in paths]


@given(trees)
def test_paths_spell_the_prompts(paths):
    chains = chained(paths)
    tree = prefixes(log_of(chains))
    spelled = {}
    for chain, path in zip(chains, tree.paths, strict=True):
        at = 0
        for node in path:
            blocks = tuple(chain[at : at + tree.lengths[node]])
            assert len(blocks) == tree.lengths[node]  # no prompt ends inside a node
            assert spelled.setdefault(node, blocks) == blocks  # a node is the same blocks wherever it occurs
            at += len(blocks)
        assert at == len(chain)
    flat = [block for blocks in spelled.values() for block in blocks]
    assert len(flat) == len(set(flat))  # and no block is in two nodes


@given(trees)
def test_nodes_are_as_long_as_they_can_be(paths):
    chains = chained(paths)
    tree = prefixes(log_of(chains))
    follow, ends = {}, set()
    for path in tree.paths:
        for a, b in pairwise(path):
            follow.setdefault(a, set()).add(b)
        ends.update(path[-1:])
    assert all(len(after) > 1 or node in ends for node, after in follow.items())


@given(st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=8))
def test_names_that_are_no_chain_still_spell_the_prompts(chains):
    tree = prefixes(log_of(chains))
    spelled = {}
    for chain, path in zip(chains, tree.paths, strict=True):
        assert sum(tree.lengths[node] for node in path) == len(chain)
        at = 0
        for node in path:
            blocks = tuple(chain[at : at + tree.lengths[node]])
            assert spelled.setdefault(node, blocks) == blocks
            at += len(blocks)
