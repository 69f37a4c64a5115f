"""Copies that several ranks share: what each has acknowledged, and when all of them have."""

from collections.abc import Iterable

from kvcore.policy import Chunk


class _Waiting:
    """A request's chunks under copy: by chunk, the ranks (bits) that have still to speak."""

    __slots__ = ("failed", "missing")

    def __init__(self) -> None:
        self.missing: dict[Chunk, int] = {}
        self.failed: set[Chunk] = set()


class Acknowledgements:
    """Waits, chunk by chunk, until every rank has spoken; one rank's failure fails the chunk, once all have spoken.

    A chunk fails only then, since the others may still be copying. What was not expected (said twice, of a request
    that is over) is ignored.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, _Waiting] = {}

    def expect(self, request: str, chunks: Iterable[Chunk], ranks: int) -> None:
        """Wait for `ranks` ranks, 0 to ranks - 1, to copy `chunks`."""
        everyone = (1 << ranks) - 1
        self._waiting.setdefault(request, _Waiting()).missing.update(dict.fromkeys(chunks, everyone))

    def waits(self, request: str) -> bool:
        """Return whether anything of the request's is outstanding."""
        return request in self._waiting

    def take(
        self, request: str, rank: int, chunks: Iterable[Chunk] | None, *, copied: bool
    ) -> tuple[list[Chunk], list[Chunk]]:
        """Note what a rank says of `chunks` (all outstanding: None); return those that are (copied, failed) in all.

        A negative rank speaks for all of them.
        """
        waiting = self._waiting.get(request)
        if waiting is None:
            return [], []
        missing, failed = waiting.missing, waiting.failed
        bit = 1 << rank if rank >= 0 else -1
        done: list[Chunk] = []
        for chunk in tuple(missing) if chunks is None else chunks:
            left = missing.get(chunk)
            if left is None or not left & bit:
                continue
            if not copied:
                failed.add(chunk)
            left &= ~bit
            if left:
                missing[chunk] = left
            else:
                del missing[chunk]
                done.append(chunk)
        if not missing:
            del self._waiting[request]
        if not failed:
            return done, []
        lost = [chunk for chunk in done if chunk in failed]
        failed.difference_update(lost)
        gone = set(lost)
        return [chunk for chunk in done if chunk not in gone], lost

    def of(self, prefix: str) -> list[str]:
        """Return the requests waited for whose names begin with `prefix`."""
        return [request for request in self._waiting if request.startswith(prefix)]

    def forget(self, request: str) -> None:
        """Wait for nothing more of a request."""
        self._waiting.pop(request, None)
