"""L0: the engine's own prefix cache, with vLLM's semantics, over runs of blocks."""

from collections import OrderedDict
from collections.abc import Sequence


class Holding:
    """What one request occupies: the nodes that it refers to, and blocks that nobody else can find."""

    __slots__ = ("blocks", "claimed", "nodes", "private")

    def __init__(self) -> None:
        self.blocks = 0
        """Blocks of its tokens so far, in nodes or private."""
        self.nodes: list[int] = []
        """Of each leading node of its path, to how many of its blocks it refers: those from the node's head on up to
        where its own are second copies."""
        self.claimed = 0
        """Blocks of its path up to which it has come."""
        self.private = 0


class GpuCache:
    """Blocks of one engine: a free list in the order of release, prefix hits, reference counts.

    As in vLLM's block pool: a request's blocks are released tail first, so its head lives longest; a free block keeps
    its content until it is handed out again, from the front of the list; a hit takes a block off the list. Blocks that
    were not computed to their end go to the front, where blocks that were never used are. Blocks can be hit from the
    step that computes them on. A node (`Prefixes`) stands for its blocks: they are released together and, since they
    leave from the tail, what is left of a node is always its head. Blocks of outputs and second copies of a block hold
    no prefix that a log could name, but take their place in the list. So requests may refer to more or less of a node:
    one whose whole prompt is cached computes its last block anew, and two that compute a node at the same time have a
    copy each. Of a node is held what the request refers to that refers to most of it.

    Args:
        capacity: Blocks.
        node_blocks: Blocks of each node.
        reuse: Whether there are prefix hits at all.
    """

    def __init__(self, capacity: int, node_blocks: Sequence[int], *, reuse: bool = True) -> None:
        self.capacity = capacity
        self.held = 0
        """Blocks that requests refer to."""
        self._fresh = capacity
        """Free blocks without content."""
        self._length = node_blocks
        self._resident = [0] * len(node_blocks)
        self._users: dict[int, dict[int, int]] = {}
        """Of each node that is referred to: by the number of its blocks that requests refer to, how many they are."""
        self._free: OrderedDict[int, int] = OrderedDict()
        """Blocks by node, or by a negative number where nothing can be found in them."""
        self._anonymous = -1
        self._reuse = reuse

    @property
    def free(self) -> int:
        """Blocks that can be handed out, cached content included."""
        return self.capacity - self.held

    def peek(self, path: Sequence[int]) -> int:
        """Return the leading blocks of a prompt that are cached."""
        if not self._reuse:
            return 0
        hit = 0
        resident, length = self._resident, self._length
        for node in path:
            blocks = resident[node]
            hit += blocks
            if blocks < length[node]:
                break
        return hit

    def fits(self, path: Sequence[int], blocks: int, hit: int) -> bool:
        """Return whether a prompt of `blocks` blocks, `hit` of them cached, can be held beside what is held."""
        idle, left = 0, hit
        for node in path:
            if not left:
                break
            found = min(left, self._length[node])
            idle += max(0, found - self._used(node))
            left -= found
        return blocks - hit + idle <= self.free

    def _used(self, node: int) -> int:
        """Return how many blocks of a node are held: its leading ones."""
        return max(self._users.get(node, ()), default=0)

    def hit(self, holding: Holding, path: Sequence[int], blocks: int) -> None:
        """Refer to the first `blocks` blocks of a prompt, all of them cached."""
        holding.blocks = holding.claimed = blocks
        for node in path:
            if not blocks:
                break
            found = min(blocks, self._length[node])
            idle = found - self._used(node)
            if idle > 0:
                self._free[node] -= idle
                if not self._free[node]:
                    del self._free[node]
                self.held += idle
            self._refer(node, found)
            holding.nodes.append(found)
            blocks -= found

    def _refer(self, node: int, blocks: int) -> None:
        users = self._users.setdefault(node, {})
        users[blocks] = users.get(blocks, 0) + 1

    def _let_go(self, node: int, blocks: int) -> None:
        users = self._users[node]
        users[blocks] -= 1
        if not users[blocks]:
            del users[blocks]
            if not users:
                del self._users[node]

    def grow(self, holding: Holding, path: Sequence[int], blocks: int, findable: int) -> bool:
        """Give a request room for `blocks` blocks in all; the first `findable` of them can be hit from now on.

        Returns False, with nothing changed, where that many are not free.
        """
        need = blocks - holding.blocks
        if need > 0:
            if need > self.capacity - self.held:
                return False
            self.take(need)
            holding.blocks = blocks
            holding.private += need
        if self._reuse and findable > holding.claimed:
            self._claim(holding, path, findable)
        return True

    def _claim(self, holding: Holding, path: Sequence[int], findable: int) -> None:
        """Hand private blocks over to the nodes that they belong to, unless another request was there first.

        Its own are second copies then, and so is what it computes of that node from there on: whoever adds to a node
        refers to all of it.
        """
        length, resident, nodes = self._length, self._resident, holding.nodes
        at = max(0, len(nodes) - 1)
        start = sum(length[node] for node in path[:at])
        while at < len(path) and start < findable:
            node = path[at]
            if at == len(nodes):
                nodes.append(0)
            covered = min(length[node], findable - start)
            if nodes[at] == resident[node] < covered:
                if nodes[at]:
                    self._let_go(node, nodes[at])
                self._refer(node, covered)
                holding.private -= covered - nodes[at]
                resident[node] = nodes[at] = covered
            start += length[node]
            at += 1
        holding.claimed = findable

    def settle(self, holding: Holding, path: Sequence[int], blocks: int, findable: int) -> None:
        """Count `blocks` blocks that were taken for a request's output as its own; the first `findable` can be hit."""
        holding.blocks += blocks
        holding.private += blocks
        if self._reuse and findable > holding.claimed:
            self._claim(holding, path, findable)

    def take(self, blocks: int) -> None:
        """Hand out free blocks, the longest free first; what was cached in them is gone."""
        self.held += blocks
        fresh = min(blocks, self._fresh)
        self._fresh -= fresh
        blocks -= fresh
        free = self._free
        while blocks:
            node, there = next(iter(free.items()))
            gone = min(there, blocks)
            if node >= 0:
                self._resident[node] -= gone
            if gone == there:
                del free[node]
            else:
                free[node] = there - gone
            blocks -= gone

    def release(self, holding: Holding, path: Sequence[int], full: int, extra: int = 0) -> None:
        """Let go of everything a request holds, tail first.

        Args:
            holding: The request's.
            path: Its prefix nodes.
            full: Leading blocks that were computed to their end.
            extra: Blocks that were taken for its output and are not counted as its own yet.
        """
        private = holding.private + extra
        blank = min(private, holding.blocks + extra - full)
        if blank > 0:
            self._fresh += blank
            self.held -= blank
            private -= blank
        if private:
            self._free[self._anonymous] = private
            self._anonymous -= 1
            self.held -= private
        for node, blocks in zip(reversed(path[: len(holding.nodes)]), reversed(holding.nodes), strict=True):
            if blocks:
                self._let_go(node, blocks)
                idle = blocks - self._used(node)
                if idle > 0:
                    self._free[node] = self._free.pop(node, 0) + idle
                    self.held -= idle
        holding.nodes.clear()
        holding.blocks = holding.claimed = holding.private = 0
