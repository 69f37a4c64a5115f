"""A rank of the small engine of `engine_machine.py`: what its blocks hold, and its copies."""

from collections import deque

from machine_parts import BAD, BLOCKS, PAGE

from kvcore.live import wire


class Worker:
    """Copies for one rank as `WorkerSide` does, to the bytes of its shards; some copies fail, for no reason."""

    def __init__(self, engine, rank):
        self.engine, self.rank = engine, rank
        self.registered, self.epoch = None, 0
        self.holds = [None] * BLOCKS
        self.said = deque()
        """What it has told the server, on its way."""
        self.copying = []
        """Asynchronous loads under way, and whether they are to fail."""
        self.failed = 0
        """Steps with a load that failed."""

    def register(self):
        """Come, or come back: what was said before is lost, and copies have ended."""
        self.said.clear()
        self.copying = [(copy, True) for copy, _ in self.copying]
        self.registered = self.engine.enter("worker", self.rank, self.epoch)
        self.epoch = self.registered.epoch

    def begin(self, plan):
        """Take up a step's loads; return the blocks that were to be there before it computes, and are not."""
        if plan.grants_lost and self.registered is not None:
            self.register()
        invalid = set()
        for copy in plan.loads:
            if copy.asynchronous:
                self.copying.append((copy, False))
            elif bad := self.load(copy):
                invalid |= bad
                self.failed += 1
        return invalid

    def arrive(self):
        """End some of the asynchronous loads; return the blocks that are not loaded, and whose loads are over."""
        invalid, received = set(), []
        copying, self.copying = self.copying, []
        for copy, fails in copying:
            if fails or self.engine.rng.random() < 0.4:
                invalid |= self.load(copy, fails)
                received.append(copy.request)
            else:
                self.copying.append((copy, False))
        return invalid, received

    def here(self, copy):
        """Which chunks' pages are still those that the server told of; none where it is away."""
        known = self.registered is not None and copy.epoch == self.epoch
        theirs = self.engine.arena.generations[copy.pages]
        return (theirs == copy.generations).all(axis=1) & known & (self.engine.rng.random() > 0.1)

    def bytes_of(self, page):
        """The first bytes of its shard of a page, which stand for all: those of a chunk hold its name."""
        start = page * PAGE + self.rank * PAGE // self.engine.world
        return memoryview(self.engine.arena.data)[start : start + 32]

    def load(self, copy, fails=False):
        """Copy from the arena, or fail; return the blocks that were not loaded."""
        same = self.here(copy) & (not fails)
        bad = set()
        for chunk, pages, blocks, good in zip(
            copy.chunks, copy.pages.tolist(), copy.blocks.tolist(), same, strict=True
        ):
            assert not good or self.bytes_of(pages[0]) == chunk, "another chunk's bytes"
            for block, name in zip(blocks, self.engine.wanted[chunk], strict=True):
                if block >= 0:
                    self.holds[block] = name if good else BAD
                    bad |= set() if good else {block}
        self.tell(copy, same, wire.Loaded, wire.LoadFailed)
        self.engine.seen["loaded"] += int(same.sum())
        self.engine.seen["from l2"] += len(copy.tiers) == 2 and copy.tiers[1] > 0
        self.engine.seen["load failed"] += int((~same).sum())
        return bad

    def store(self, copy, failures_seen):
        """Copy to the arena, where that may be; return which chunks are."""
        good = self.here(copy) & (failures_seen >= self.failed)
        for chunk, pages, kept in zip(copy.chunks, copy.pages.tolist(), good, strict=True):
            if kept:
                self.bytes_of(pages[0])[:] = chunk
        self.tell(copy, good, wire.Committed, wire.Aborted)
        return good

    def tell(self, copy, good, well, badly):
        """Acknowledge a copy, to the server that told of it."""
        if self.registered is None or copy.epoch != self.epoch:
            return
        for kind, which in ((well, good), (badly, ~good)):
            if which.any():
                chunks = tuple(chunk for chunk, one in zip(copy.chunks, which, strict=True) if one)
                self.said.append(kind(self.registered.member, copy.name, self.rank, chunks))
