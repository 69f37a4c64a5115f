"""A staged transfer written down for a pump at once: the same rows as its steps write, by NumPy.

Step by step a piece takes 50 microseconds of Python in the engine's thread, at once a few. What depends on the number
of chunks alone is kept with the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvkernels.arena import Ints
from kvkernels.compiled import Launch, check_aligned
from kvkernels.cuda_streams import CudaEvent, CudaRuntime, CudaStream, HeldEvents
from kvkernels.pieces import CopyRanges
from kvkernels.pump import BATCH, LAUNCH, NOTHING, ORDER, RECORD, WAIT, Program

__all__ = ["PieceRows", "Turns", "Written"]

_A, _B, _C, _D, _E = range(2, 7)
"""Columns of a row's arguments, behind its kind and program."""
_KINDS = {
    "full": WAIT,
    "behind": ORDER,  # the copies before
    "room": ORDER,  # in the buffer
    "copy": BATCH,
    "copied": RECORD,
    "ready": ORDER,  # the other half of the piece
    "launch": LAUNCH,
    "moved": RECORD,
}
_LOAD = "full", "behind", "room", "copy", "copied", "ready", "launch", "moved"
_STORE = "full", "room", "launch", "moved", "behind", "ready", "copy", "copied"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """What pieces use, one after another, and what must be reached before.

    Attributes:
        after: the engine's work.
        kernels: the stream of their kernels.
        lanes: the stream of each piece's copies.
        last: reached when the copies before theirs are done; None where there are none.
        staging: the address of each piece's buffer.
        emptied: for the first pieces, one a buffer, reached when it may be written; None where it may be now.
    """

    after: CudaEvent
    kernels: CudaStream
    lanes: Sequence[CudaStream]
    last: CudaEvent | None
    staging: Sequence[int]
    emptied: Sequence[CudaEvent | None]


@dataclass(frozen=True, slots=True)
class Written:
    """A transfer's events.

    Attributes:
        begun: in front of its first copy or kernel.
        halfway: behind all of a load's copies, or of a store's kernels.
        done: behind each piece.
    """

    begun: CudaEvent
    halfway: CudaEvent
    done: Sequence[CudaEvent]


class PieceRows:
    """The rows of every transfer over the same pieces.

    Args:
        launches: each piece's kernel.
        timed: which pieces' last events are to tell when they were reached.
        loading: copies, then kernels; or kernels, then copies.
    """

    def __init__(self, launches: Sequence[Launch], timed: Sequence[bool], *, loading: bool) -> None:
        self._loading = loading
        self._timed = timed
        names = _LOAD if loading else _STORE
        self._at = {name: place for place, name in enumerate(names)}
        self._first = self._at["copy" if loading else "launch"]
        """What a piece begins with, but for waiting."""
        self._rows = np.zeros((len(launches), len(names), 8), np.int64)
        self._rows[:, :, 0] = [_KINDS[name] for name in names]
        numbers = [(one.function, one.programs, one.threads, one.shared) for one in launches]
        self._rows[:, self._at["launch"], _A:_E] = numbers
        self._values = np.array([one.values for one in launches], np.int64)
        self._given = launches[0].given

    def write(
        self,
        program: Program,
        runtime: CudaRuntime,
        turns: Turns,
        ranges: CopyRanges,
        full: Callable[[CudaEvent], CudaEvent | None],
        given: Sequence[int],
    ) -> Written:
        """Write a transfer.

        Args:
            program: into this.
            runtime: makes its events.
            turns: see there.
            ranges: the host copies of all pieces, by addresses.
            full: takes the event behind each piece and says what must be reached before the piece is enqueued.
            given: addresses that the kernels take, the staging buffer's left out.
        """
        values = self._parameters(turns.staging, given)  # refused before anybody is told of events to come
        rows, at, loading = self._rows.copy(), self._at, self._loading
        events, held = self._events(program, runtime)
        done, halfway = _handles(events.done), np.array([*held.handles, events.halfway.handle], np.int64)
        moved, copied = (done, halfway) if loading else (halfway, done)
        emptied = np.concatenate((_handles(turns.emptied), done))[: len(rows)]
        kernels, lanes = turns.kernels.handle, np.array([lane.handle for lane in turns.lanes], np.int64)
        before = [full(event) for event in events.done]
        rows[:, at["full"], _A] = _handles(before)
        rows[:, at["behind"], _A], rows[:, at["behind"], _B] = lanes, [_handle(turns.last), *copied[:-1]]
        rows[:, at["room"], _A], rows[:, at["room"], _B] = (lanes if loading else kernels), emptied
        rows[:, at["copied"], _A], rows[:, at["copied"], _B] = copied, lanes
        rows[:, at["ready"], _A] = kernels if loading else lanes
        rows[:, at["ready"], _B] = copied if loading else moved
        rows[:, at["launch"], _E] = kernels
        rows[:, at["moved"], _A], rows[:, at["moved"], _B] = moved, kernels
        columns = self._copies(rows[:, at["copy"]], ranges, lanes)
        for name, column in (("full", _A), ("behind", _B), ("room", _B)):
            rows[rows[:, at[name], column] == 0, at[name], 0] = NOTHING
        everything = self._framed(rows, turns, events.begun)
        program.extend(everything, values, kept=(columns, events, held, turns, before))
        return events

    def _events(self, program: Program, runtime: CudaRuntime) -> tuple[Written, HeldEvents]:
        """Make its events, knowing the rows that will record them; what comes between a piece's halves has no name."""
        first, wide, count = program.pump.written + 2, len(self._at), len(self._rows)
        halfway, done = ("copied", "moved") if self._loading else ("moved", "copied")
        pieces = range(first + 1, first + 1 + wide * count, wide)
        begun = runtime.written(program, first + self._first, timed=True)
        behind = [
            runtime.written(program, at + self._at[done], timed=timed)
            for at, timed in zip(pieces, self._timed, strict=True)
        ]
        last = runtime.written(program, pieces[-1] + self._at[halfway], timed=False)
        return Written(begun, last, behind), runtime.held(count - 1)

    def _copies(self, rows: Ints, ranges: CopyRanges, lanes: Ints) -> Ints:
        """Fill in the copies' rows; return what they point to."""
        target, source = (ranges.staged, ranges.host) if self._loading else (ranges.host, ranges.staged)
        columns = np.array((target, source, ranges.length), np.int64)
        start, stop = ranges.bounds[:-1], ranges.bounds[1:]
        for column, line in ((_A, 0), (_B, 1), (_C, 2)):
            rows[:, column] = int(columns.ctypes.data) + 8 * (line * columns.shape[1] + start)
        rows[:, _D], rows[:, _E] = stop - start, lanes
        return columns

    def _framed(self, rows: Ints, turns: Turns, begun: CudaEvent) -> Ints:
        """The rows of all pieces, behind the engine's work, and with the event in front of the first one's."""
        flat = rows.reshape(-1, 8)
        stream = turns.lanes[0] if self._loading else turns.kernels
        more = np.zeros((2, 8), np.int64)
        more[0, :4] = ORDER, 0, turns.kernels.handle, turns.after.handle
        more[1, :4] = RECORD, 0, begun.handle, stream.handle
        return np.concatenate((more[:1], flat[: self._first], more[1:], flat[self._first :]))

    def _parameters(self, staging: Sequence[int], given: Sequence[int]) -> Ints:
        """The parameters of each piece's kernel."""
        values = self._values.copy()
        places = iter(self._given)
        values[:, next(places)] = given[0]
        values[:, next(places)] = staging
        for place, address in zip(places, given[1:], strict=True):
            values[:, place] = address
        check_aligned(values[:, list(self._given)])
        return values


def _handle(event: CudaEvent | None) -> int:
    return 0 if event is None else event.handle


def _handles(events: Sequence[CudaEvent | None]) -> Ints:
    return np.array([0 if event is None else event.handle for event in events], np.int64)
