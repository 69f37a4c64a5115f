"""Copies that several ranks share: what each has acknowledged, and when all of them have."""

from collections.abc import Iterable

from kvcore.policy import Chunk


class _Waiting:
    """A request's chunks under copy: by chunk, the ranks (bits) that have still to speak."""

    __slots__ = ("failed", "missing", "one_rank")

    def __init__(self) -> None:
        self.one_rank = True
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
        waiting = self._waiting.setdefault(request, _Waiting())
        waiting.missing.update(dict.fromkeys(chunks, (1 << ranks) - 1))
        waiting.one_rank &= ranks == 1

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
        if waiting.one_rank or rank < 0:  # nobody else is to be heard
            named = tuple(missing) if chunks is None else chunks
            settled = [chunk for chunk in named if missing.pop(chunk, None) is not None]
            return self._settled(request, waiting, settled if copied else [], [] if copied else settled)
        bit = 1 << rank
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
        return self._settled(request, waiting, done, [])

    def _settled(
        self, request: str, waiting: _Waiting, copied: list[Chunk], failed: list[Chunk]
    ) -> tuple[list[Chunk], list[Chunk]]:
        if waiting.failed:
            lost = [chunk for chunk in copied if chunk in waiting.failed]
            waiting.failed.difference_update(copied, failed)
            if lost:
                gone = set(lost)
                failed = failed + lost
                copied = [chunk for chunk in copied if chunk not in gone]
        if not waiting.missing:
            del self._waiting[request]
        return copied, failed

    def of(self, prefix: str) -> list[str]:
        """Return the requests waited for whose names begin with `prefix`."""
        return [request for request in self._waiting if request.startswith(prefix)]

    def forget(self, request: str) -> None:
        """Wait for nothing more of a request."""
        self._waiting.pop(request, None)
