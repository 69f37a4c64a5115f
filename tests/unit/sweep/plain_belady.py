"""Belady's offline bound, plainly: what the compiled sweep is tested against.

Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
"""

from collections.abc import Hashable, Sequence


def belady_hits(chains: Sequence[Sequence[Hashable]], capacity: int | None) -> list[int]:
    """Return the hits of each request under a cache of `capacity` chunks (None: unbounded) that knows the future.

    `chains` holds the chunks of each request, head first; a hit is a leading chunk that is resident. After each
    request the cache keeps, of the resident chunks and the request's, the `capacity` whose next use comes first in
    the stream of all chunk accesses; chunks never used again are dropped.

    Deviations: the paper replaces one page a fault, and must keep the page at hand; this keeps none that is not worth
    its place. It sorts the cache at every request.
    """
    never = sum(len(chain) for chain in chains)
    next_uses = _next_uses(chains, never)
    resident: dict[Hashable, int] = {}
    hits: list[int] = []
    for chain, uses in zip(chains, next_uses, strict=True):
        leading = 0
        while leading < len(chain) and chain[leading] in resident:
            leading += 1
        hits.append(leading)
        resident.update(zip(chain, uses, strict=True))
        kept = sorted((use, chunk) for chunk, use in resident.items() if use < never)
        resident = {chunk: use for use, chunk in kept[:capacity]}
    return hits


def _next_uses(chains: Sequence[Sequence[Hashable]], never: int) -> list[list[int]]:
    """Return, for each access, the position in the stream of the same chunk's next access, `never` where none."""
    later: dict[Hashable, int] = {}
    position = never
    uses: list[list[int]] = []
    for chain in reversed(chains):
        position -= len(chain)
        uses.append([later.get(chunk, never) for chunk in chain])
        later.update((chunk, position + place) for place, chunk in enumerate(chain))
    uses.reverse()
    return uses
