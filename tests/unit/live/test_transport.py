"""The transport by itself: what it spares the request loop."""

from types import SimpleNamespace

import numpy as np
import pytest

from kvcore.live.book import Book
from kvcore.live.stores.pool import StorePool
from kvcore.live.transport import LiveTransport
from kvcore.policy import Demote, StoreAborted

CHUNKS = tuple(bytes([at]) * 32 for at in range(5))


class Memory:
    """A store that takes everything."""

    corrupt = 0

    def put(self, chunk, parts):
        pass

    def close(self):
        pass


@pytest.mark.parametrize("fitting", [0, 2, 5])
def test_what_the_queue_to_l2_has_no_room_for_is_not_copied(monkeypatch, fitting):
    copied, events = [], []
    monkeypatch.setattr("kvcore.live.transport.views", lambda *_: copied.append(1) or [memoryview(bytes(4096))])
    pool = StorePool(Memory(), queue_bytes=4096 * 5)
    monkeypatch.setattr(pool._putting, "leave", lambda size: None)
    pool._putting.used = 4096 * (5 - fitting)
    allocator = SimpleNamespace(give=lambda ids: None)
    transport = LiveTransport(
        None, allocator, Book(), clock=SimpleNamespace(now_ns=lambda: 1), shape_of=None, pool=pool
    )
    transport.handle = events.append
    ids = np.arange(5, dtype="<u4").tobytes()
    transport.book.resident.update(
        zip(CHUNKS, transport.book.place("r", CHUNKS, ids, bytes(40), 4096, fetched=False), strict=True)
    )
    transport.demote(Demote(tier=0, chunks=CHUNKS))
    assert len(copied) == fitting
    lost = CHUNKS[fitting:]
    assert events == ([StoreAborted(now_ns=1, request="", tier=1, chunks=lost)] if lost else [])
    pool.close()
