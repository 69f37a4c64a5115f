"""What the policies share: queues of chunks with their pages, from which the first eligible chunk is taken."""

from collections.abc import Callable, Iterable

from kvcore.policy.eviction.lanes import Queue, lane_of
from kvcore.policy.types import Chunk

__all__ = ["Queue", "frees_enough", "lane_of", "peek_eligible", "pop_eligible", "put_back", "take_first"]


def take_first(queue: Queue, pages: int, eligible: Callable[[Chunk], bool], tenant: str | None) -> list[Chunk] | None:
    """Remove and return the first eligible chunks that free `pages` pages; None, with no change, where too few do."""
    taken: list[Chunk] = []
    freed = 0
    if freed < pages:
        for chunk, size in lane_of(queue, tenant).items():
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


def frees_enough(queues: Iterable[Queue], pages: int, eligible: Callable[[Chunk], bool], tenant: str | None) -> bool:
    """Tell whether the eligible chunks of `queues` free `pages` pages; stops at the chunk that settles it.

    For policies that change their state while they look for victims, and must not where there are too few.
    """
    if pages <= 0:
        return True
    for queue in queues:
        for chunk, size in lane_of(queue, tenant).items():
            if eligible(chunk):
                pages -= size
                if pages <= 0:
                    return True
    return False


def peek_eligible(lane: Queue, passed: Queue, eligible: Callable[[Chunk], bool]) -> Chunk | None:
    """Return the first eligible chunk and leave it where it is; those before it go from `lane` to `passed`.

    Setting them aside means that one ask for many victims looks at each of them once. `lane` is where an ask looks
    (`lane_of`): a queue, or a lane of it, and then they keep their place in the queue meanwhile.
    """
    while lane:
        chunk = next(iter(lane))
        if eligible(chunk):
            return chunk
        passed[chunk] = lane.pop(chunk)
    return None


def pop_eligible(
    queue: Queue, lane: Queue, passed: Queue, eligible: Callable[[Chunk], bool]
) -> tuple[Chunk, int] | None:
    """Do as `peek_eligible`, remove the chunk too, also from the lane's `queue`, and return it with its pages."""
    while lane:
        item = lane.popitem(last=False)
        if eligible(item[0]):
            if lane is not queue:
                del queue[item[0]]
            return item
        passed[item[0]] = item[1]
    return None


def put_back(lane: Queue, passed: Queue) -> None:
    """Return what was set aside to the front of `lane`, in the order it had."""
    while passed:
        chunk, pages = passed.popitem()
        lane[chunk] = pages
        lane.move_to_end(chunk, last=False)
