"""What becomes of connections that nobody closes."""

import gc
import weakref

import pytest
import zmq

from kvcore.live.connection import Connection
from kvcore.live.wire import Ping


@pytest.mark.parametrize("shared", [False, True])
def test_one_that_is_collected_within_a_cycle_is_closed(tmp_path, shared):
    """Left to itself the context would wait for ever for the socket, which is collected behind it."""
    given = zmq.Context() if shared else None
    one = Connection(f"ipc://{tmp_path}/nobody.ipc", context=given)
    one.send(Ping())
    socket, gone = one._socket, weakref.ref(one)
    own = None if shared else socket.context
    one.itself = one
    del one
    gc.collect()
    assert gone() is None
    assert socket.closed
    assert own is None or own.closed
    if given is not None:
        assert not given.closed
        given.term()


def test_one_that_is_closed_may_be_closed_again(tmp_path):
    one = Connection(f"ipc://{tmp_path}/nobody.ipc")
    one.close()
    one.close()
    assert one._socket.closed
