"""What the policies share: queues of chunks with their pages, from which the first eligible chunk is taken."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TypeAlias

from kvcore.policy.types import Chunk

Queue: TypeAlias = OrderedDict[Chunk, int]
"""The pages of each chunk; the chunk that would leave first comes first."""


def take_first(queue: Queue, pages: int, eligible: Callable[[Chunk], bool]) -> list[Chunk] | None:
    """Remove and return the first eligible chunks that free `pages` pages; None, with no change, where too few do."""
    taken: list[Chunk] = []
    freed = 0
    if freed < pages:
        for chunk, size in queue.items():
            if eligible(chunk):
                taken.append(chunk)
                freed += size
                if freed >= pages:
                    break
        else:
            return None
    for chunk in taken:
        del queue[chunk]
    return taken


def frees_enough(queues: Iterable[Queue], pages: int, eligible: Callable[[Chunk], bool]) -> bool:
    """Tell whether the eligible chunks of `queues` free `pages` pages; stops at the chunk that settles it.

    For policies that change their state while they look for victims, and must not where there are too few.
    """
    if pages <= 0:
        return True
    for queue in queues:
        for chunk, size in queue.items():
            if eligible(chunk):
                pages -= size
                if pages <= 0:
                    return True
    return False


def peek_eligible(queue: Queue, passed: Queue, eligible: Callable[[Chunk], bool]) -> Chunk | None:
    """Return the first eligible chunk and leave it where it is; those before it go from `queue` to `passed`.

    Setting them aside means that one ask for many victims looks at each of them once.
    """
    while queue:
        chunk = next(iter(queue))
        if eligible(chunk):
            return chunk
        passed[chunk] = queue.pop(chunk)
    return None


def pop_eligible(queue: Queue, passed: Queue, eligible: Callable[[Chunk], bool]) -> tuple[Chunk, int] | None:
    """Do as `peek_eligible`, remove the chunk too, and return it with its pages."""
    while queue:
        item = queue.popitem(last=False)
        if eligible(item[0]):
            return item
        passed[item[0]] = item[1]
    return None


def put_back(queue: Queue, passed: Queue) -> None:
    """Return what was set aside to the front of `queue`, in the order it had."""
    while passed:
        chunk, pages = passed.popitem()
        queue[chunk] = pages
        queue.move_to_end(chunk, last=False)
