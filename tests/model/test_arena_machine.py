"""The allocator and its tables against a model that lists every page, through restarts of the server."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from kvcore.live.allocator import OutOfPages, PageAllocator

WRITERS = st.integers(1, 3)


class AllocatorMachine(RuleBasedStateMachine):
    chunks = Bundle("chunks")

    @initialize(pages=st.integers(1, 40))
    def start(self, pages: int) -> None:
        self.generations = np.zeros(pages, np.uint64)
        self.writers = np.zeros(pages, np.uint32)
        self.allocator = PageAllocator(self.generations, self.writers)
        # The model: what each page is ("free", "used", "quarantined"), its generation and its mark.
        self.state = ["free"] * pages
        self.generation = [0] * pages
        self.mark = [0] * pages
        self.epoch = 0
        self.held: dict[int, list[int]] = {}  # chunk's number -> pages, of this epoch
        self.numbers = 0

    def _longest_run(self) -> int:
        longest = length = 0
        for state in self.state:
            length = length + 1 if state == "free" else 0
            longest = max(longest, length)
        return longest

    @rule(target=chunks, count=st.integers(1, 12), writer=st.integers(0, 3))
    def take(self, count: int, writer: int) -> object:
        longest, free = self._longest_run(), self.state.count("free")
        try:
            ids = self.allocator.take(count, writer).tolist()
        except OutOfPages:
            assert free < count
            return multiple()
        assert len(ids) == len(set(ids)) == count
        if longest >= 2 * count:
            assert ids == list(range(ids[0], ids[0] + count)), "a long run was there, the chunk's pages are scattered"
        for page in ids:
            assert self.state[page] == "free"
            self.state[page] = "used"
            self.generation[page] += 1
            self.mark[page] = writer
        self.numbers += 1
        self.held[self.numbers] = ids
        return self.numbers

    @rule(chunk=chunks)
    def settle(self, chunk: int) -> None:
        if chunk in self.held:
            self.allocator.settle(np.array(self.held[chunk], np.uint32))
            for page in self.held[chunk]:
                self.mark[page] = 0

    @rule(chunk=consumes(chunks), order=st.randoms(use_true_random=False))
    def give(self, chunk: int, order: object) -> None:
        ids = self.held.pop(chunk, [])
        order.shuffle(ids)
        self.allocator.give(np.array(ids, np.uint32))
        for page in ids:
            self.back(page)

    def back(self, page: int) -> None:
        self.state[page], self.mark[page] = "free", 0
        self.generation[page] += 1

    @rule(page=st.integers(0, 39))
    def give_what_is_not_held(self, page: int) -> None:
        if page < len(self.state) and self.state[page] == "used":
            return
        try:
            self.allocator.give(np.array([page], np.uint32))
        except ValueError:
            return
        raise AssertionError("a page that is not in use was taken back")

    @rule(survivors=st.sets(st.integers(1, 60)))
    def restart(self, survivors: set[int]) -> None:
        """A new server in the same tables; only the chunks that its journal proves committed are in use."""
        self.held = {number: ids for number, ids in self.held.items() if number in survivors}
        in_use = sorted(page for ids in self.held.values() for page in ids)
        self.allocator = PageAllocator(self.generations, self.writers, in_use=in_use)
        for page in range(len(self.state)):
            if page in in_use:
                self.state[page], self.mark[page] = "used", 0
            else:
                self.state[page] = "quarantined" if self.mark[page] else "free"

    @rule(gone=st.sets(WRITERS))
    def reap(self, gone: set[int]) -> None:
        expected = [p for p, s in enumerate(self.state) if s == "quarantined" and self.mark[p] in gone]
        assert self.allocator.reap(lambda writer: writer not in gone) == len(expected)
        for page in expected:
            self.back(page)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "state"):
            return
        assert self.generations.tolist() == self.generation
        assert self.writers.tolist() == self.mark
        counts = (self.allocator.free, self.allocator.used, self.allocator.quarantined)
        assert counts == tuple(self.state.count(state) for state in ("free", "used", "quarantined"))


AllocatorMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAllocator = AllocatorMachine.TestCase
