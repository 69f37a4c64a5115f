"""Whatever arrives, the server answers and serves on."""

import itertools
import struct
import threading
import time
from contextlib import ExitStack

import msgspec
import pytest
import zmq
from live_fakes import SyncEngine, chain, clients, settings_in, wait_for

from kvcore.live import wire
from kvcore.live.client import Client, Register, RegistrationRefused, RemoteError, SchedulerClient
from kvcore.live.presence import connect_liveness
from kvcore.live.server import Server
from kvcore.live.settings import load
from kvcore.live.writers import MEMBER_SLOTS

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
    "too many chunks": ([HEADER, msgspec.msgpack.encode(["where", [b"c"] * (wire.MAX_CHUNKS + 1)])], "bad_message", 7),
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


def settings_of(folder):
    return load({"bind": (f"ipc://{folder}/s.ipc",), "arena_dir": str(folder), "http": "off", "l1_size_gb": 0.01}, {})


def test_a_reply_that_cannot_be_encoded_costs_one_request(folder, monkeypatch, caplog):
    settings = settings_of(folder)
    with Server(settings) as server, Client(settings.endpoints[0]) as client:
        monkeypatch.setitem(server.service._handlers, wire.GetMetrics, lambda _: wire.Report({"count": 2**64}))
        for _ in range(2):
            with pytest.raises(RemoteError, match="OverflowError") as raised:
                client.call(wire.GetMetrics())
            assert raised.value.kind == "internal"
            client.ping()
    assert [record.message for record in caplog.records].count("a reply cannot be encoded") == 1


def test_chunks_named_at_any_length_are_chunks(start):
    server = start()
    chunks = (b"\7", b"\x08", b"\x09", b"\0\0\0\0")
    with SyncEngine(server.endpoint) as engine:
        assert engine.serve("1", chunks)[1].chunks == (0, 1, 2, 3)
        assert engine.serve("2", chunks)[0].hits == (4,)
        engine.client.call(wire.Clear())
        engine.lookup("3", chunks)
        engine.ask("3", chunks)  # its engine goes in the middle of that
    wait_for(lambda: not server.status()["instances"])
    assert server.status()["arena"]["free_pages"] == 64


@pytest.mark.parametrize("fails", ["liveness", "sweep"])
def test_a_fault_beside_requests_is_logged_and_the_server_goes_on(folder, monkeypatch, caplog, fails):
    settings = settings_of(folder)
    with Server(settings) as server, Client(settings.endpoints[0]) as client:
        with SyncEngine(settings.endpoints[0]) as engine:
            engine.lookup("1", chain("p", 3))
            assert engine.ask("1", chain("p", 3)).chunks == (0, 1, 2)
            broken, name = (server.service, "sweep") if fails == "sweep" else (server.service, "_acknowledge_all")

            def fail(*_):
                raise ZeroDivisionError("a fault")

            monkeypatch.setattr(broken, name, fail)
        wait_for(lambda: "the request loop met a fault" in caplog.text)
        assert "ZeroDivisionError: a fault" in caplog.text
        client.ping()
        wait_for(lambda: not client.call(wire.Status()).data["instances"])
        report = client.call(wire.Status()).data
        assert report["arena"]["free_pages"] == report["arena"]["pages"], "what the dead held is free"


def test_a_worker_beyond_the_arenas_table_is_refused(start):
    server = start()
    with Client(server.endpoint) as client, ExitStack() as stack:
        for at in range(MEMBER_SLOTS):
            registered = client.call(wire.Register(f"e{at}", "worker", 16, 256))
            stack.enter_context(connect_liveness(registered, 5))
        with pytest.raises(RemoteError, match="table of workers is full: 1024") as raised:
            client.call(wire.Register("one-more", "worker", 16, 256))
        assert raised.value.kind == "refused"
        client.ping()
        client.call(wire.Leave(registered.member))
        client.call(wire.Register("one-more", "worker", 16, 256))
        with pytest.raises(RemoteError, match="table of workers is full"):  # that one is on its way
            client.call(wire.Register("two-more", "worker", 16, 256))


def test_room_is_for_chunks_of_the_prompt(start):
    server = start(l1_pages=64)
    prompt, others = chain("p", 3), chain("x", 45)
    with SyncEngine(server.endpoint) as engine:
        engine.lookup("r", prompt)
        granted = engine.ask("r", others)
        assert (granted.chunks, granted.refused) == ((), {"unknown": 45})
        granted = engine.ask("r", (prompt[0], *others, prompt[2]))
        assert (granted.chunks, granted.refused) == ((0, 46), {"unknown": 45})
        assert engine.write(granted, (prompt[0], *others, prompt[2])) == [prompt[0], prompt[2]]
        engine.committed("r", (prompt[0], prompt[2]))
        engine.end("r")
        for at in range(12):
            assert len(engine.serve(f"{at}", chain(f"{at}", 10))[1].chunks) == 10


def test_a_raising_handler_costs_one_request(folder, monkeypatch, caplog):
    settings = settings_of(folder)
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


def flood(endpoint, count):
    """Return a socket that has sent so many pings at once."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(endpoint)
    for at in range(count):
        socket.send_multipart(wire.encode(wire.Ping(), at))
    return socket


def test_a_turn_ends_after_a_while_and_leases_end_though_every_turn_is_long(folder, monkeypatch):
    """With turns of a second a lease of half a second would never be looked at."""
    settings = settings_in(folder, lease_s=0.5)
    monkeypatch.setattr("kvcore.live.server._TURN_MESSAGES", 8)
    monkeypatch.setattr("kvcore.live.server._TURN_S", 0.06)
    with Server(settings) as server, SyncEngine(settings.bind[0]) as engine:
        engine.lookup("r", chain("p", 3))
        taken, sweeps, ping = [], [], server.service._handlers[wire.Ping]

        def slow(message):
            taken.append(message)
            time.sleep(0.04)
            return ping(message)

        sweep, turn = server.service.sweep, server._turn
        turns = []
        monkeypatch.setitem(server.service._handlers, wire.Ping, slow)
        monkeypatch.setattr(server, "_turn", lambda ready: (turns.append(len(taken)), turn(ready)))
        monkeypatch.setattr(server.service, "sweep", lambda: (sweeps.append(len(taken)), sweep()))
        socket = flood(settings.bind[0], 80)
        wait_for(lambda: len(taken) == 80, 20)
        socket.close()
        most = max(after - before for before, after in itertools.pairwise(turns))
        assert most == 2, "the second ends after more than is given to a turn"
        assert len([at for at in sweeps if 0 < at < 80]) >= 3
        assert not server.service.works, "its lease has run out"


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


def test_a_place_is_nobody_elses_while_its_process_is_here_whatever_id_is_claimed(start):
    server = start(l1_pages=8)
    with SyncEngine(server.endpoint, "e") as engine, Client(server.endpoint) as other:
        prompt = chain("p", 8)
        engine.lookup("r", prompt)
        granted = engine.ask("r", prompt)
        shown = server.status()["instances"][0]["members"]
        for member in shown:
            request = wire.Register("e", member["role"], 16, 256, member["rank"], pid=member["pid"])
            with pytest.raises(RemoteError, match="which is still here: end that one, or take another name") as raised:
                other.call(request)
            assert raised.value.kind == "refused"
        assert engine.write(granted, prompt) == list(prompt), "nobody else was given these pages"
        engine.committed("r", prompt)
        engine.end("r")
        for peer in engine.sockets:
            peer.close()
        for role in ("scheduler", "worker"):  # at once: the loop takes in the end of the connection first
            other.call(wire.Register("e", role, 16, 256, pid=engine.workers[0].member % 1000))


def test_a_registration_that_is_refused_is_tried_once_more(start):
    server = start()
    register = Register("e", "scheduler", 16, 256)
    first = SchedulerClient(server.endpoint, register)
    second = SchedulerClient(server.endpoint, register)
    try:
        assert first.register() is not None
        with pytest.raises(RegistrationRefused, match="still here"):
            second.register()
        timer = threading.Timer(0.05, first.leave)
        timer.start()
        assert second.register() is not None
        timer.join()
    finally:
        first.leave()
        second.leave()


def test_a_client_that_lost_a_server_which_lives_is_back_without_a_refusal(start, caplog):
    server = start()
    with clients(server) as (_, worker):
        for _ in range(10):
            before = worker.registered
            worker.register_again()
            wait_for(lambda before=before: worker.registered not in (None, before))
    assert "refuses" not in caplog.text


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
