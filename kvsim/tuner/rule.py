"""The rule that turns a sweep into one recommendation.

Every setting is judged by one figure, the mean TTFT it saves against no cache: it counts every request, and times the
requests it is the prefill time that the engine gets back. Then, with `within` (5%) and `near` (1%):

1. Reuse pays if the best setting saves at least `worth` (1%) of the mean TTFT. Otherwise nothing is recommended.
2. L1 is the smallest size at which some setting saves within 5% of the best one anywhere: the knee.
3. At that size the policy is the simplest one within 1% of the best there: lru, then fifo, and so on down `SIMPLEST`.
4. The chunk is the largest one within 1% of the best of that policy there: larger chunks are fewer, larger copies and
   less bookkeeping, which the cost model does not charge for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvsim.errors import UsageError
from kvsim.tuner.points import Point

SIMPLEST = ("lru", "fifo", "sieve", "lfu", "s3fifo", "arc", "gdsf", "w-tinylfu")
"""Eviction policies from the most usual on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The rule's three thresholds, as fractions."""

    within: float = 0.05
    near: float = 0.01
    worth: float = 0.01

    def __post_init__(self) -> None:
        """Refuse a threshold that is no fraction."""
        for name, value in (("within", self.within), ("near", self.near), ("worth", self.worth)):
            if not 0 <= value < 1:
                raise UsageError(f"--{name} {value:g}: a fraction from 0 to below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the rule chose.

    Attributes:
        pays: Whether reuse pays at all.
        point: The recommended setting; where reuse does not pay, the one that saves most.
        frontier: The setting that the rule takes at each L1 size, by ascending size.
    """

    pays: bool
    point: Point
    frontier: tuple[Point, ...]


def choose(points: Sequence[Point], rule: Rule) -> Choice:
    """Apply the rule to a sweep's points, at least one."""
    best = max(points, key=_saved)
    by_size: dict[float, list[Point]] = {}
    for point in points:
        by_size.setdefault(point.l1_size_gb, []).append(point)
    frontier = {size: settle(by_size[size], rule) for size in sorted(by_size)}
    pays = _saved(best) >= rule.worth * best.cold.no_cache.mean_s and _saved(best) > 0
    enough = (1 - rule.within) * _saved(best)
    knee = next(size for size in frontier if max(map(_saved, by_size[size])) >= enough)
    return Choice(
        pays=pays,
        point=frontier[knee] if pays else best,
        frontier=tuple(frontier.values()),
    )


def settle(points: Iterable[Point], rule: Rule) -> Point:
    """Return the setting to take among those of one L1 size: steps 3 and 4 of the rule."""
    points = list(points)
    enough = (1 - rule.near) * max(map(_saved, points))
    policy = min((point for point in points if _saved(point) >= enough), key=_simplicity).policy
    of_policy = [point for point in points if point.policy == policy]
    enough = (1 - rule.near) * max(map(_saved, of_policy))
    return max((point for point in of_policy if _saved(point) >= enough), key=lambda point: point.chunk_tokens)


def _saved(point: Point) -> float:
    return point.cold.saved_mean_s


def _simplicity(point: Point) -> int:
    return SIMPLEST.index(point.policy) if point.policy in SIMPLEST else len(SIMPLEST)
