"""Requests against a real server: hits, ranks, a full L1, quotas, pins, the operator."""

import signal
import time

import numpy as np
from live_fakes import SyncEngine, chain, clients, wait_for

from kvcore.live import wire
from kvcore.live.client import NOT_YET, Register, SchedulerClient, WorkerClient


def test_what_was_stored_is_found_and_read_back(start):
    server = start()
    prompt = chain("a", 5)
    with SyncEngine(server.endpoint) as engine:
        found, granted = engine.serve("1", prompt, input_tokens=5 * 256 + 9)
        assert found.hits == (0,)
        assert granted.chunks == (0, 1, 2, 3, 4)
        found, granted = engine.serve("2", prompt + chain("b", 2), input_tokens=7 * 256)
        assert found.hits == (5,)
        assert (found.load_start, found.load_chunks) == (0, 5)
        assert granted.chunks == (0, 1)
        found = engine.lookup("3", prompt, computed_chunks=2)
        assert (found.load_start, found.load_chunks) == (2, 3)
        engine.read(found, prompt)
    counters = server.counters()
    assert counters["kvcore_matched_tokens", "l1"] == (5 + 5) * 256
    assert counters["kvcore_loaded_tokens", "l1"] == 5 * 256
    assert counters["kvcore_missed_tokens", "tail"] == 9
    assert counters["kvcore_missed_tokens", "cold"] == 7 * 256


def test_a_patient_lookup_waits_for_its_answer(start):
    server = start()
    sizes = {"instance": "i", "role": "scheduler", "block_tokens": 16, "block_bytes": 16}
    client = SchedulerClient(server.endpoint, Register(**sizes), wait_s=0.0)
    assert client.register() is not None
    answers = {
        patient: [client.lookup(f"{patient} {at}", chain("a", 5), patient=patient) for at in range(20)]
        for patient in (False, True)
    }
    assert answers[False].count(NOT_YET) > answers[True].count(NOT_YET)
    client.leave()


def test_a_lookup_that_is_not_waited_for_is_answered_when_it_is_asked_for_again(start):
    server = start()
    prompt = chain("a", 3)
    with clients(server, wait_s=10.0) as (client, _):
        with SyncEngine(server.endpoint) as engine:
            engine.serve("1", prompt)
        server.process.send_signal(signal.SIGSTOP)  # no answer can be here yet
        for _ in range(3):
            began = time.monotonic()
            assert client.lookup("2", prompt, computed_chunks=3, patient=True, wait=False) is NOT_YET
            assert time.monotonic() - began < 1
        server.process.send_signal(signal.SIGCONT)
        found = client.lookup("2", prompt, computed_chunks=3)
        assert (found.hits, found.load_chunks) == ((3,), 0)
        assert server.counters()["kvcore_requests"] == 2


def test_answers_that_come_with_anothers_are_taken(start):
    server = start()
    prompt = chain("a", 3)
    with clients(server, wait_s=0.0) as (client, _):
        for name in "abc":
            client.lookup(name, prompt)
        wait_for(lambda: client.granted() or len(client._pending) == 0)
        assert [client.lookup(name, prompt, wait=False).hits for name in "abc"] == [(0,)] * 3
        assert not client._lookups


def test_an_ask_that_is_refused_as_a_whole_is_answered_too(start):
    """The answers to a request's asks are told apart by their order."""
    server = start()
    prompt = chain("a", 3)
    with clients(server, wait_s=1.0) as (client, _):
        assert client.lookup("1", prompt).hits == (0,)
        client.ask("1", [prompt[0], prompt[0]])
        client.ask("1", prompt)
        answers = []
        wait_for(lambda: answers.extend(client.granted()) or len(answers) == 2)
        assert [(name, granted.chunks) for name, granted in answers] == [("1", ()), ("1", (0, 1, 2))]


def test_whether_a_chunk_is_held_is_told_and_changes_nothing(start):
    server = start()
    prompt = chain("a", 3)
    sizes = {"instance": "i", "role": "scheduler", "block_tokens": 16, "block_bytes": 16}
    client = SchedulerClient(server.endpoint, Register(**sizes), wait_s=0.0)
    assert client.held(prompt[0]) is False, "a server that is away holds nothing"
    assert client.register() is not None
    with SyncEngine(server.endpoint) as engine:
        engine.serve("1", prompt)
        hasty = [client.held(chunk) for chunk in prompt * 20]
        assert hasty.count(NOT_YET) > 0
        assert set(hasty) <= {True, NOT_YET}
        held = [client.held(chunk, patient=True) for chunk in (chain("b", 1)[0], *prompt)]
        assert held == [False, True, True, True], "late answers are taken for nobody's"
    assert server.counters()["kvcore_requests"] == 1
    assert server.status()["requests"] == 0
    client.leave()


def test_who_reads_the_table_need_not_ask_for_what_is_nowhere(start, tmp_path):
    server = start("--journal", str(tmp_path / "journal"))
    prompt, others = chain("a", 3), chain("b", 40)
    sizes = {"instance": "i", "role": "scheduler", "block_tokens": 16, "block_bytes": 16}
    client = SchedulerClient(server.endpoint, Register(**sizes), wait_s=0.05)
    assert client.register() is not None
    with SyncEngine(server.endpoint) as engine:
        engine.serve("1", prompt)
    server.process.send_signal(signal.SIGSTOP)
    assert [client.held(chunk) for chunk in others] == [False] * 40
    assert client._pending == {}, "nobody was asked"
    assert client.held(prompt[0]) is NOT_YET
    server.process.send_signal(signal.SIGCONT)
    assert client.held(prompt[0], patient=True) is True
    server.process.kill()
    server = start("--journal", str(tmp_path / "journal"))
    until = time.monotonic() + 20
    while client.held(prompt[0], patient=True) is not True:
        assert time.monotonic() < until, "the next server's table has what it took over"
        time.sleep(0.05)
    assert client._held is not None
    assert [client.held(chunk) for chunk in others] == [False] * 40
    client._held.close()
    client._held = None  # as of a server on another host
    assert [client.held(chunk, patient=True) for chunk in (others[0], prompt[0])] == [False, True]
    client.leave()


def test_a_lookup_is_idempotent_and_follows_what_the_engine_lost(start):
    server = start()
    prompt = chain("a", 6)
    with SyncEngine(server.endpoint) as engine:
        engine.serve("1", prompt)
        first = engine.lookup("2", prompt, computed_chunks=4)
        assert engine.lookup("2", prompt, computed_chunks=4) == first
        wider = engine.lookup("2", prompt, computed_chunks=1)  # the engine's own cache has evicted three
        assert (wider.load_start, wider.load_chunks) == (1, 5)
        assert engine.read(wider, prompt) == prompt[1:]
    assert server.counters()["kvcore_requests"] == 2


def test_l1_full_refuses_nothing_while_unpinned_chunks_exist(start):
    server = start(l1_pages=256, page_bytes=4096)
    with SyncEngine(server.endpoint) as engine:
        for at in range(64):
            engine.serve(f"fill-{at}", chain(f"fill-{at}", 4), real=False)
        assert server.status()["tiers"][0]["pages"] == 256
        for at in range(2500):  # 10,000 further chunks
            _, granted = engine.serve(f"r{at}", chain(f"p{at}", 4), real=False)
            assert granted.chunks == (0, 1, 2, 3)
            assert not granted.refused
        found, _ = engine.serve("last", chain("p2499", 4), real=False)
        assert found.hits == (4,)
    counters = server.counters()
    assert counters["kvcore_evicted_chunks", "l1"] == 10_000
    assert counters.get("kvcore_refused_chunks", 0) == 0
    assert counters["kvcore_pages", "free"] == 0


def test_pinned_chunks_refuse_what_does_not_fit_and_the_rest_is_served(start):
    server = start(l1_pages=8)
    held, other = chain("held", 6), chain("other", 4)
    with SyncEngine(server.endpoint) as engine:
        engine.serve("1", held)
        engine.lookup("reader", held)  # pins them
        engine.lookup("2", other)
        granted = engine.ask("2", other)
        assert granted.chunks == (0, 1)
        assert granted.refused == {"room": 2}


def test_a_chunk_is_seen_when_every_rank_has_written_it(start):
    server = start()
    prompt = chain("a", 3)
    with SyncEngine(server.endpoint, world=2) as engine:
        engine.lookup("1", prompt)
        engine.ask("1", prompt)
        engine.committed("1", prompt, 0)
        assert engine.client.call(wire.Where(prompt)).tiers == (-1, -1, -1)
        engine.committed("1", prompt[:1], 1)
        engine.aborted("1", prompt[1:2], 1)
        assert engine.client.call(wire.Where(prompt)).tiers == (0, -1, -1)
        assert server.status()["tiers"][0]["pages"] == 2, "the failed chunk's page is free, the third is being written"
        engine.committed("1", prompt[2:], 1)
        engine.end("1")
        assert engine.client.call(wire.Where(prompt)).tiers == (0, -1, 0)


def test_pins_hold_until_every_rank_has_loaded(start):
    server = start(l1_pages=4)
    prompt = chain("a", 4)
    with SyncEngine(server.endpoint, world=2) as engine:
        engine.serve("1", prompt, real=False)
        engine.lookup("2", prompt)
        engine.end("2")
        engine.loaded("2", prompt, 0)
        engine.lookup("3", chain("b", 1))
        assert engine.ask("3", chain("b", 1)).refused == {"room": 1}
        engine.load_failed("2", prompt, 1)
        assert engine.ask("3", chain("b", 1)).chunks == (0,)


def test_mla_is_stored_once_and_loaded_by_every_rank(start):
    server = start()
    prompt = chain("a", 2)
    with SyncEngine(server.endpoint, world=4, shards=1) as engine:
        engine.serve("1", prompt)
        found, _ = engine.serve("2", prompt)
        assert found.hits == (2,)
        assert engine.registered.shard_bytes == 4096
    assert server.counters()["kvcore_stored_tokens"] == 512


def test_mla_is_stored_when_every_rank_has_said_that_its_loads_ended_well(start):
    """The first writes what all of them have computed together, and one may have computed on a load that failed."""
    server = start()
    with SyncEngine(server.endpoint, world=3, shards=1) as engine:
        for name, spoiler in (("good", None), ("spoilt", 2)):
            prompt = chain(name, 2)
            engine.lookup(name, prompt)
            engine.ask(name, prompt)
            for rank in range(3):
                assert engine.lookup(f"{name} before {rank}", prompt).hits in ((), (0,))
                engine.end(f"{name} before {rank}")
                if rank == spoiler:
                    engine.aborted(name, prompt[1:], rank)
                    engine.committed(name, prompt[:1], rank)
                else:
                    engine.committed(name, prompt, rank)
            engine.end(name)
            assert sum(engine.lookup(f"{name} after", prompt).hits) == (2 if spoiler is None else 1)
            engine.end(f"{name} after")


def test_two_instances_of_other_sizes_share_the_arena(start):
    server = start()
    with (
        SyncEngine(server.endpoint, "small", chunk_bytes=4096) as small,
        SyncEngine(server.endpoint, "large", chunk_bytes=3 * 65536) as large,
    ):
        for at in range(30):
            small.serve(f"{at}", chain(f"s{at % 7}", 3))
            large.serve(f"{at}", chain(f"l{at % 5}", 3))
        assert small.serve("x", chain("s1", 3))[0].hits == (3,)
        assert large.serve("x", chain("l4", 3))[0].hits == (3,)


def test_the_operator_clears_pins_and_sets_quotas(start):
    server = start("--quota", f"bob={3 * 65536 / 2**30!r}", l1_pages=8)
    a, b = chain("a", 4), chain("b", 6)
    with SyncEngine(server.endpoint) as engine:
        engine.serve("1", a)
        call = engine.client.call
        call(wire.Pin(a[:2]))
        engine.serve("2", b)
        assert call(wire.Where(a)).tiers == (0, 0, -1, -1)
        call(wire.Unpin(a[:2]))
        call(wire.Clear(b))
        assert call(wire.Where(b)).tiers == (-1,) * 6
        call(wire.Clear())
        assert call(wire.Where(a)).tiers == (-1,) * 4
        _, granted = engine.serve("3", b, salt="bob")
        assert (granted.chunks, granted.refused) == ((0, 1, 2), {"quota": 3})
        call(wire.SetQuota("bob", None))
        assert engine.serve("4", b, salt="bob")[1].chunks == (0, 1, 2)


def test_a_miss_for_want_of_the_same_namespace_is_told_apart(start):
    server = start()
    with SyncEngine(server.endpoint, "one") as one, SyncEngine(server.endpoint, "two") as two:
        one.serve("1", chain("root one", 2), probe=b"the first tokens")
        two.serve("1", chain("root two", 2), probe=b"the first tokens")
        two.serve("2", chain("root three", 2), probe=b"other tokens")
    counters = server.counters()
    assert counters["kvcore_missed_tokens", "namespace"] == 512
    assert counters["kvcore_missed_tokens", "cold"] == 1024


def test_an_evicted_chunk_that_is_missed_is_told_apart(start):
    server = start(l1_pages=4)
    with SyncEngine(server.endpoint) as engine:
        engine.serve("1", chain("a", 4))
        engine.serve("2", chain("b", 4))
        engine.serve("3", chain("a", 4))
    assert server.counters()["kvcore_missed_tokens", "evicted"] == 1024


def test_the_asynchronous_clients_do_the_same(start):
    server = start()
    prompt = chain("a", 40)
    scheduler = SchedulerClient(server.endpoint, Register("e", "scheduler", 16, 256), deadline_s=10)
    worker = WorkerClient(server.endpoint, Register("e", "worker", 16, 256), deadline_s=10)
    registered = scheduler.register()
    assert worker.register().epoch == registered.epoch
    try:

        def found(request):
            return wait_for(lambda: (reply := scheduler.lookup(request, prompt)) is not NOT_YET and reply)

        assert found("1").hits == (0,)
        scheduler.ask("1", prompt)
        ((request, granted),) = wait_for(scheduler.granted)
        assert (request, len(granted.chunks)) == ("1", 40)
        assert len(np.unique(np.frombuffer(granted.pages, "<u4"))) == 40
        worker.committed("1", prompt, tokens=40 * 256, nbytes=40 * 4096, seconds=0.1, epoch=granted.epoch)
        assert worker.flush()
        scheduler.end("1")
        assert found("2").hits == (40,)
        scheduler.drop_load("2", prompt)
        scheduler.end("2")
        worker.committed("1", prompt, epoch=granted.epoch - 1)  # of another server: not said
        assert worker.flush()
        wait_for(lambda: server.status()["requests"] == 0)
    finally:
        worker.leave()
        scheduler.leave()
    assert server.status()["instances"] == []
