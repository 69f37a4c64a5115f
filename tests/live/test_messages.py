"""Whatever arrives, the server answers and serves on."""

import struct

import msgspec
import pytest
import zmq
from live_fakes import SyncEngine, chain

from kvcore.live import wire
from kvcore.live.client import Client, Register, RegistrationRefused, RemoteError, SchedulerClient
from kvcore.live.server import Server
from kvcore.live.settings import load

HEADER = struct.pack("<BQ", wire.VERSION, 7)
BAD = {
    "a single frame": ([b"x"], "bad_message", 0),
    "an empty frame": ([b""], "bad_message", 0),
    "three frames": ([HEADER, b"\x90", b""], "bad_message", 0),
    "a short header": ([HEADER[:-1], b"\x90"], "bad_message", 0),
    "another version": ([struct.pack("<BQ", 99, 7), b"\x90"], "bad_message", 7),
    "no msgpack": ([HEADER, b"\xc1\xc1"], "bad_message", 7),
    "nothing": ([HEADER, b""], "bad_message", 7),
    "no array": ([HEADER, msgspec.msgpack.encode({"a": 1})], "bad_message", 7),
    "an unknown operation": ([HEADER, msgspec.msgpack.encode(["steal", 1])], "unknown_operation", 7),
    "a field too few": ([HEADER, msgspec.msgpack.encode(["lookup", 1])], "bad_message", 7),
    "a field of another type": ([HEADER, msgspec.msgpack.encode(["end", "me", "r"])], "bad_message", 7),
    "a number out of range": ([HEADER, msgspec.msgpack.encode(["end", -1, "r"])], "bad_message", 7),
    "text that is no UTF-8": ([HEADER, b"\x93\xa3end\x01\xa1\xff"], "bad_message", 7),
    "a tag that is no UTF-8": ([HEADER, b"\x91\xa1\xff"], "bad_message", 7),
    "arrays without end": ([HEADER, b"\x91" * 100_000], "bad_message", 7),
    "a reply": ([HEADER, msgspec.msgpack.encode(["done"])], "unknown_operation", 7),
    "an unknown member": (wire.encode(wire.End(5, "r"), 7), "unknown_instance", 7),
}


def raw(endpoint, frames):
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    try:
        socket.connect(endpoint)
        socket.send_multipart(frames)
        assert socket.poll(3000), "no reply"
        return wire.decode_reply(socket.recv_multipart())
    finally:
        socket.close()
        context.term()


def test_bad_messages_get_typed_errors_and_the_next_request_is_served(start):
    server = start()
    with Client(server.endpoint) as client:
        for name, (frames, kind, correlation) in BAD.items():
            answered, reply = raw(server.endpoint, frames)
            assert isinstance(reply, wire.Error), name
            assert (reply.kind, answered) == (kind, correlation), name
            assert reply.message
            client.ping()
    counters = server.counters()
    assert counters["kvcore_errors"] == len(BAD)


def test_a_raising_handler_costs_one_request(folder, monkeypatch, caplog):
    settings = load(
        {"bind": (f"ipc://{folder}/s.ipc",), "arena_dir": str(folder), "http": "off", "l1_size_gb": 0.01}, {}
    )
    with Server(settings) as server, Client(settings.endpoints[0]) as client:

        def fail(_):
            raise ZeroDivisionError("a fault")

        monkeypatch.setitem(server.service._handlers, wire.Where, fail)
        for _ in range(2):
            with pytest.raises(RemoteError, match="ZeroDivisionError: a fault") as raised:
                client.call(wire.Where((b"c",)))
            assert raised.value.kind == "internal"
            client.ping()
    assert [record.message for record in caplog.records].count("a request failed") == 1


MIS_SIZED = {
    "a block that does not divide the chunk": ({"block_tokens": 96}, "no multiple"),
    "a chunk beyond L1": ({"block_bytes": 1 << 20}, "L1 has"),
    "shards for half the ranks": ({"world": 4, "shards": 2}, "shards"),
    "a name that another's requests begin with": ({"instance": "a/b"}, "no slash"),
    "a rank too high": ({"rank": 1}, "rank 1 of 1"),
}


@pytest.mark.parametrize("case", MIS_SIZED)
def test_a_registration_that_does_not_fit_is_refused(start, case):
    server = start()
    fields, message = MIS_SIZED[case]
    with Client(server.endpoint) as client:
        for role in ("scheduler", "worker"):
            request = wire.Register(**{"instance": "e", "role": role, "block_tokens": 16, "block_bytes": 256, **fields})
            with pytest.raises(RemoteError, match=message) as raised:
                client.call(request)
            assert raised.value.kind == "refused"
        client.ping()
    with SyncEngine(server.endpoint) as engine:
        assert engine.serve("r", chain(1, 3))[0].hits == (0,)


def test_another_size_under_a_registered_name_is_refused(start):
    server = start()
    with SyncEngine(server.endpoint, "e"):
        other = SchedulerClient(server.endpoint, Register("e", "scheduler", 16, 1024))
        with pytest.raises(RegistrationRefused, match="is registered"):
            other.register()
    # and is fine once the instance is gone
    with SyncEngine(server.endpoint, "e", chunk_bytes=8192) as engine:
        assert engine.registered.shard_bytes == 8192


def test_a_chunk_named_twice_is_refused(start):
    server = start()
    a, b = chain(1, 2)
    with SyncEngine(server.endpoint) as engine:
        for call in (engine.lookup, engine.ask):
            engine.lookup("r", (a, b))
            with pytest.raises(RemoteError, match="named twice"):
                call("r", (a, b, a))


def test_a_worker_speaks_for_its_own_rank_only(start):
    server = start()
    a = chain(1, 1)
    with SyncEngine(server.endpoint, world=2) as engine:
        engine.lookup("r", a)
        engine.ask("r", a)
        with pytest.raises(RemoteError, match="cannot acknowledge"):
            engine.client.call(wire.Committed(engine.workers[0].member, "r", 1, a))
