"""The recorder: a trace row for every request that an engine reports, written by a thread of its own.

What is dropped, because the disk cannot keep up or fails, is counted and shown.
"""

import logging
import queue
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvcore.live.wire import Record
from kvtraces.schema import Row
from kvtraces.writer import Writer, next_seq

_LOG = logging.getLogger("kvcore.recorder")
_QUEUE_ROWS = 20_000
_REMEMBERED = 200_000
"""Requests whose lookup is remembered until their record comes."""
_SAID_AGAIN_S = 60.0
_REST_S = 1.0
"""How long a disk that failed is left alone; rows wait in the queue meanwhile."""


@dataclass(slots=True)
class Seen:
    """What the server knows of a request."""

    seq: int
    timestamp_ms: float
    instance: str
    model: str
    salt: str
    chunk_tokens: int
    hits: tuple[int, ...]
    loaded_tokens: int = 0


class Recorder:
    """Joins what the server saw of each request with what its engine reports at its end.

    Raises ValueError or OSError where `path` cannot be written.
    """

    def __init__(self, path: str | Path, *, max_bytes: int) -> None:
        self.path = Path(path)
        self._writer = Writer(self.path, max_bytes=max_bytes, mode=0o600)
        self._writer.check()
        self._next_seq = next_seq(self.path)
        self._dropped = 0
        self._said_s = -_SAID_AGAIN_S
        self._stop = threading.Event()
        self._seen: OrderedDict[str, Seen] = OrderedDict()
        self._queue: queue.Queue[Row | None] = queue.Queue(_QUEUE_ROWS)
        self._thread = threading.Thread(target=self._run, name="kvcore-recorder", daemon=True)
        self._thread.start()

    @property
    def rows(self) -> int:
        """Rows handed to the operating system."""
        return self._writer.rows

    @property
    def dropped(self) -> int:
        """Rows lost."""
        return self._dropped + self._writer.lost

    def looked_up(self, name: str, seen: Seen, *, resumed: bool = False) -> None:
        """Remember a request's lookup, and give it its place in the order.

        One that was preempted and is `resumed` has its place already. Another request of a name that is known has its
        own: the earlier one was cancelled, and nothing more comes of it.
        """
        if name in self._seen:
            if resumed:
                return
            del self._seen[name]
            self._dropped += 1
        seen.seq = self._next_seq
        self._next_seq += 1
        self._seen[name] = seen
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
            self._dropped += 1

    def loaded(self, name: str, tokens: int) -> None:
        """Note what a request's engine has loaded."""
        seen = self._seen.get(name)
        if seen is not None:
            seen.loaded_tokens += tokens

    def take(self, name: str, record: Record) -> None:
        """Queue a row. Never blocks: where the queue is full the row is dropped, and counted."""
        seen = self._seen.pop(name, None)
        if seen is None:
            self._dropped += 1
            return
        try:
            self._queue.put_nowait(_row(seen, record))
        except queue.Full:
            self._drop("the disk cannot keep up")
        except ValueError as error:
            self._drop(f"{name}: {error}")

    def close(self) -> None:
        """Write what is queued and end the file."""
        self._stop.set()
        self._queue.put(None)
        self._thread.join()

    def _drop(self, why: str) -> None:
        self._dropped += 1
        self._complain(why)

    def _complain(self, why: str) -> None:
        """Say that rows are lost: at once, then once a minute."""
        now = time.monotonic()
        if now - self._said_s >= _SAID_AGAIN_S:
            self._said_s = now
            _LOG.error("%s: rows are lost, %d so far: %s", self.path, self.dropped, why)

    def _run(self) -> None:
        while (row := self._queue.get()) is not None:
            try:
                self._writer.write(row)
                if self._queue.empty():
                    self._writer.flush()
            except OSError as error:
                self._complain(str(error))
                self._stop.wait(_REST_S)
        try:
            self._writer.close()
        except OSError as error:
            self._complain(str(error))


def _row(seen: Seen, record: Record) -> Row:
    """Raise ValueError for block ids that are no array of int64."""
    matched = [hits * seen.chunk_tokens for hits in (*seen.hits, 0)]
    return Row(
        timestamp=seen.timestamp_ms,
        input_length=record.input_length,
        output_length=record.output_length,
        hash_ids=_ids(record.hash_ids),
        block_size=record.block_size or None,
        seq=seen.seq,
        request_id=record.request,
        session_id=record.session_id,
        instance=seen.instance,
        model=seen.model or None,
        salt=seen.salt or None,
        status=record.status,
        l0_tokens=record.l0_tokens,
        matched_l1=matched[0],
        matched_l2=matched[1] if len(seen.hits) > 1 else None,
        loaded_tokens=seen.loaded_tokens,
        queue_ms=record.queue_ms,
        load_ms=record.load_ms,
        prefill_ms=record.prefill_ms,
        ttft_ms=record.ttft_ms,
        output_hash_ids=_ids(record.output_hash_ids) if record.output_hash_ids else None,
    )


def _ids(data: bytes) -> list[int]:
    ids = np.frombuffer(data, "<i8")
    if ids.size and int(ids.min()) < 0:
        raise ValueError("a block id below zero")
    found: list[int] = ids.tolist()
    return found
