"""L0 over runs of blocks against a model that keeps every block, as vLLM's block pool does."""

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.engine.gpu_cache import GpuCache, Holding

# A tree of six nodes, some of several blocks: node -> (parent, blocks).
TREE = {0: (None, 2), 1: (0, 3), 2: (0, 1), 3: (1, 1), 4: (None, 4), 5: (4, 2)}
LENGTHS = [TREE[node][1] for node in sorted(TREE)]


def path_to(node):
    path = []
    while node is not None:
        path.append(node)
        node = TREE[node][0]
    return tuple(reversed(path))


class BlockPool:
    """One object a block: an ordered free list, reference counts, a map from names to blocks."""

    def __init__(self, capacity):
        self.free = OrderedDict((block, None) for block in range(capacity))
        self.refs = dict.fromkeys(range(capacity), 0)
        self.name = {}
        self.block = {}

    def peek(self, names):
        hit = 0
        for name in names:
            if name not in self.block:
                break
            hit += 1
        return hit

    def touch(self, name):
        block = self.block[name]
        self.refs[block] += 1
        self.free.pop(block, None)
        return block

    def take(self):
        block, _ = self.free.popitem(last=False)
        if block in self.name:
            del self.block[self.name.pop(block)]
        self.refs[block] = 1
        return block

    def publish(self, block, name):
        if name not in self.block:
            self.block[name] = block
            self.name[block] = name

    def release(self, blocks, full):
        for place, block in reversed(list(enumerate(blocks))):
            self.refs[block] -= 1
            if not self.refs[block]:
                self.free[block] = None
                if place >= full:
                    self.free.move_to_end(block, last=False)


class Both:
    """Drives the runs and the model with the same requests."""

    def __init__(self, capacity):
        self.cache = GpuCache(capacity, LENGTHS)
        self.pool = BlockPool(capacity)
        self.held = []

    def names(self, path):
        return [(node, i) for node in path for i in range(LENGTHS[node])]

    def admit(self, node, extra, blank):
        path = path_to(node)
        names = self.names(path)
        hit = self.cache.peek(path)
        assert hit == self.pool.peek(names)
        total = len(names) + extra
        idle = sum(1 for name in names[:hit] if not self.pool.refs[self.pool.block[name]])
        fits = self.cache.fits(path, total, hit)
        assert fits == (total - hit + idle <= len(self.pool.free))
        if not fits:
            return
        holding = Holding()
        self.cache.hit(holding, path, hit)
        blocks = [self.pool.touch(name) for name in names[:hit]]
        assert self.cache.grow(holding, path, total, len(names))
        blocks += [self.pool.take() for _ in range(total - hit)]
        for block, name in zip(blocks, names, strict=False):
            self.pool.publish(block, name)
        self.held.append((holding, path, blocks, total - min(blank, extra)))
        self.check()

    def release(self, which):
        if self.held:
            holding, path, blocks, full = self.held.pop(which % len(self.held))
            self.cache.release(holding, path, full)
            self.pool.release(blocks, full)
        self.check()

    def check(self):
        assert self.cache.free == len(self.pool.free)
        for node in TREE:
            assert self.cache.peek(path_to(node)) == self.pool.peek(self.names(path_to(node)))


steps = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.integers(0, 5), st.integers(0, 3), st.integers(0, 2)),
        st.tuples(st.just("release"), st.integers(0, 9), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=300)
@given(st.integers(1, 24), steps)
def test_runs_hit_and_evict_as_blocks_do(capacity, todo):
    both = Both(capacity)
    for what, a, b, c in todo:
        if what == "admit":
            both.admit(a, b, c)
        else:
            both.release(a)
    while both.held:
        both.release(0)
    assert both.cache.held == 0


class Computing(Both):
    """The same, with requests that compute their blocks bit by bit, and nothing evicted."""

    def start(self, node, extra):
        path = path_to(node)
        names = self.names(path)
        total = len(names) + extra
        hit = min(self.cache.peek(path), total - 1)  # a token is computed in any case
        idle = sum(1 for name in names[:hit] if not self.pool.refs[self.pool.block[name]])
        most = len(self.pool.free) - idle + hit
        assert self.cache.fits(path, most, hit)
        assert not self.cache.fits(path, most + 1, hit)
        holding = Holding()
        self.cache.hit(holding, path, hit)
        blocks = [self.pool.touch(name) for name in names[:hit]]
        assert self.cache.grow(holding, path, total, 0)
        blocks += [self.pool.take() for _ in range(total - hit)]
        self.held.append((holding, path, blocks, hit))
        self.check()

    def compute(self, which, more):
        if self.held:
            holding, path, blocks, computed = self.held.pop(which % len(self.held))
            names = self.names(path)
            upto = min(len(blocks), computed + more)
            assert self.cache.grow(holding, path, len(blocks), min(upto, len(names)))
            for place, (node, i) in enumerate(names[:upto]):
                if not i or self.pool.block.get((node, i - 1)) == blocks[place - 1]:  # else it adds to a second copy
                    self.pool.publish(blocks[place], (node, i))
            self.held.append((holding, path, blocks, upto))
        self.check()

    def check(self):
        super().check()
        assert self.cache.held == len({block for _, _, blocks, _ in self.held for block in blocks})


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("start"), st.integers(0, 5), st.integers(0, 2)),
            st.tuples(st.just("compute"), st.integers(0, 9), st.integers(1, 6)),
            st.tuples(st.just("release"), st.integers(0, 9)),
        ),
        max_size=40,
    )
)
def test_what_is_held_is_what_requests_refer_to(todo):
    computing = Computing(600)
    for what, *numbers in todo:
        getattr(computing, what)(*numbers)
    while computing.held:
        computing.release(0)
    assert computing.cache.held == 0


def test_a_prompt_that_is_cached_whole_takes_its_own_room_and_no_more():
    cache = GpuCache(5, [4])
    one, two = Holding(), Holding()
    assert cache.grow(one, (0,), 4, 4)
    cache.release(one, (0,), 4)
    assert cache.fits((0,), 5, 3)
    cache.hit(two, (0,), 3)  # its last block is computed anew
    assert cache.grow(two, (0,), 4, 4)
    assert cache.held == 4
    assert cache.grow(two, (0,), 5, 4)


def test_second_copies_do_not_hold_the_first_ones():
    cache = GpuCache(16, [4])
    first, second = Holding(), Holding()
    assert cache.grow(first, (0,), 4, 4)
    assert cache.grow(second, (0,), 4, 4)
    assert cache.held == 8
    cache.release(first, (0,), 4)
    assert cache.held == 4
    assert cache.peek((0,)) == 4


def test_a_head_outlives_its_tail():
    cache = GpuCache(10, [4, 4])
    holding = Holding()
    assert cache.grow(holding, (0, 1), 8, 8)
    cache.release(holding, (0, 1), 8)
    assert cache.peek((0, 1)) == 8
    cache.take(5)  # two that were never used, and then from the tail
    assert cache.peek((0, 1)) == 5


def test_two_that_compute_the_same_blocks_hold_them_twice():
    cache = GpuCache(16, [4])
    first, second = Holding(), Holding()
    assert cache.grow(first, (0,), 4, 2)
    assert cache.grow(second, (0,), 4, 4)
    assert cache.grow(first, (0,), 4, 4)
    assert cache.held == 8
    cache.release(first, (0,), 4)
    cache.release(second, (0,), 4)
    assert cache.held == 0
    assert cache.peek((0,)) == 4


def test_what_does_not_fit_changes_nothing():
    cache = GpuCache(4, [4])
    holding = Holding()
    assert cache.grow(holding, (0,), 3, 3)
    assert not cache.grow(holding, (0,), 5, 4)
    assert (cache.held, holding.blocks) == (3, 3)


def test_without_reuse_nothing_is_hit():
    cache = GpuCache(8, [4], reuse=False)
    holding = Holding()
    assert cache.grow(holding, (0,), 4, 4)
    cache.release(holding, (0,), 4)
    assert cache.peek((0,)) == 0
    assert cache.held == 0


@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_output_blocks_take_their_place_in_the_free_list(blocks):
    cache = GpuCache(16, [4, 4])
    one, two = Holding(), Holding()
    assert cache.grow(one, (0,), 4, 4)
    cache.take(blocks)
    cache.release(one, (0,), 4 + blocks, blocks)
    assert cache.held == 0
    assert cache.grow(two, (1,), 4, 4)
    cache.take(16 - 4 - 4)  # all but node 0's head: outputs go first
    assert cache.peek((0,)) == 4


def test_blocks_that_were_not_filled_are_handed_out_first():
    cache = GpuCache(6, [4, 1])
    one, two = Holding(), Holding()
    assert cache.grow(one, (0,), 6, 4)
    cache.release(one, (0,), 4)
    assert cache.grow(two, (1,), 2, 1)
    assert cache.peek((0,)) == 4
    assert cache.free == 4
