"""L2 behind a real server: what left L1 comes back with its own bytes, and a bad value is a miss."""

import subprocess
import sys
import threading
import time

import pytest
from live_fakes import SyncEngine, chain, environment, settings_in, wait_for

from kvcore.live import server as server_module
from kvcore.live import wire
from kvcore.live.client import RemoteError
from kvcore.live.metrics import render
from kvcore.live.server import Server
from kvcore.live.stores.base import StoreError
from kvcore.live.stores.files import FileStore
from kvcore.live.tools import report
from kvtraces.journal import Equal, JournalWriter, segments, verify

PROMPTS = [chain(f"p{at}", 4) for at in range(8)]


def flags(folder, *more):
    return ("--l2", f"files:{folder}/l2", "--l2-size-gb", "0.01", *more)


def files(folder):
    return [path for path in (folder / "l2").glob("??/*") if path.is_file()]


def file_of(folder, chunk):
    (path,) = [path for path in files(folder) if path.name == chunk.hex()]
    return path


def damage(folder, chunk):
    path = file_of(folder, chunk)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def fill(server, engine):
    for at, prompt in enumerate(PROMPTS):
        # What is still on its way to L2 keeps its pages, and room that is not there is refused.
        wait_for(lambda: idle(server))
        engine.serve(f"fill-{at}", prompt)
    wait_for(lambda: server.counters().get("kvcore_l2_chunks", 0) and settled(server))


def settled(server):
    """Whether nothing is on its way to L2: the count stands still, and nothing is pinned for a copy."""
    before = server.counters()["kvcore_l2_chunks"]
    time.sleep(0.05)
    return idle(server) and server.counters()["kvcore_l2_chunks"] == before


def idle(server):
    """Whether nothing is pinned, at any tier."""
    return all(tier["idle_pages"] == tier["pages"] for tier in server.status()["tiers"])


@pytest.mark.parametrize("placement", ["write-through", "write-back"])
def test_what_left_l1_comes_back_from_l2(start, folder, placement):
    server = start(*flags(folder, "--placement", placement), l1_pages=12)
    with SyncEngine(server.endpoint) as engine:
        fill(server, engine)
        assert server.status()["tiers"][0]["chunks"] <= 12
        for at, prompt in enumerate(PROMPTS[:5]):
            found, _ = engine.serve(f"again-{at}", prompt)  # reads the bytes and compares
            assert sum(found.hits) == 4
            assert found.hits[1] >= 3
            assert found.load_chunks == 4
        counters = server.counters()
        assert counters["kvcore_loaded_tokens", "l2"] >= 15 * 256
        assert counters["kvcore_l2_chunks", "get"] >= 15
    assert len(files(folder)) >= 20


def test_a_chunk_that_only_passes_through_l1(start, folder):
    server = start(*flags(folder, "--no-promote-on-hit"), l1_pages=12)
    with SyncEngine(server.endpoint) as engine:
        fill(server, engine)
        for life in range(3):
            found, _ = engine.serve(f"{life}", PROMPTS[0])
            assert found.hits == (0, 4)
        assert engine.client.call(wire.Where(PROMPTS[0])).tiers == (1,) * 4


def test_a_damaged_file_is_a_miss_and_is_stored_anew(start, folder):
    server = start(*flags(folder), l1_pages=12)
    with SyncEngine(server.endpoint) as engine:
        fill(server, engine)
        damage(folder, PROMPTS[0][2])
        found = engine.lookup("r", PROMPTS[0])
        assert found.hits == (0, 4)
        assert (found.load_start, found.load_chunks) == (0, 2), "the run ends before it"
        assert engine.read(found, PROMPTS[0]) == PROMPTS[0][:2]
        engine.loaded("r", PROMPTS[0][:2])
        granted = engine.ask("r", PROMPTS[0][2:])
        engine.committed("r", engine.write(granted, PROMPTS[0][2:]))
        engine.end("r")
        assert sum(engine.serve("again", PROMPTS[0])[0].hits) == 4
    assert server.counters()["kvcore_evicted_chunks", "l2"] >= 1


def test_broken_chunks_are_counted_and_missing_ones_are_not_among_them(start, folder):
    server = start(*flags(folder), l1_pages=12)
    with SyncEngine(server.endpoint) as engine:
        fill(server, engine)
        assert server.status()["l2_corrupt_chunks"] == server.counters()["kvcore_l2_corrupt_chunks"] == 0
        damage(folder, PROMPTS[0][2])
        file_of(folder, PROMPTS[1][1]).unlink()
        assert [engine.serve(f"{at}", PROMPTS[at])[0].load_chunks for at in range(2)] == [2, 1]
    assert server.status()["l2_corrupt_chunks"] == 1
    assert b"\nkvcore_l2_corrupt_chunks_total 1.0\n" in render(report(server.endpoint, wire.GetMetrics(), 5))
    command = [sys.executable, "-m", "kvcore", "status", "--server", server.endpoint]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True).stdout
    assert "works; chunks found broken: 1" in shown


def test_requests_that_want_the_same_chunks_fetch_them_once(start, folder):
    server = start(*flags(folder), l1_pages=12)
    with SyncEngine(server.endpoint, "a") as one, SyncEngine(server.endpoint, "b") as two:
        fill(server, one)
        gets = server.counters().get(("kvcore_l2_chunks", "get"), 0)
        results = []
        threads = [
            threading.Thread(target=lambda e=engine, n=name: results.append(e.serve(n, PROMPTS[0])[0]))
            for engine, name in ((one, "x"), (two, "y"))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [sum(found.hits) for found in results] == [4, 4]
        assert server.counters()["kvcore_l2_chunks", "get"] - gets == 4


def test_a_server_that_starts_empty_deletes_what_an_earlier_one_left(start, folder):
    server = start(*flags(folder), l1_pages=12)
    with SyncEngine(server.endpoint) as engine:
        fill(server, engine)
    assert len(files(folder)) == 32
    server.stop()
    server.start()
    with SyncEngine(server.endpoint) as engine:
        assert [engine.serve(f"{at}", prompt)[0].hits for at, prompt in enumerate(PROMPTS)] == [(0, 0)] * 8
    server.stop()
    server.start()
    wait_for(lambda: not files(folder))
    with SyncEngine(server.endpoint) as engine:
        fill(server, engine)
        assert sum(engine.serve("r", PROMPTS[0])[0].hits) == 4


def served(engine, name):
    """Serve every prompt; return how many chunks of each were found in L1 and in L2, their bytes compared."""
    found = [engine.serve(f"{name}-{at}", prompt)[0] for at, prompt in enumerate(PROMPTS)]
    assert [one.load_chunks for one in found] == [sum(one.hits) for one in found]
    return [one.hits for one in found]


@pytest.mark.parametrize(
    "change",
    [
        (),
        ("--l1-size-gb", repr(20 * 65536 / 2**30)),
        ("--eviction-policy", "arc"),
        ("--ttl-s", "1000", "--quota", "somebody=1", "--admission", "second-use"),
        ("--l2-size-gb", "0.02", "--l2-eviction-policy", "s3fifo", "--placement", "write-back"),
    ],
)
def test_l2_outlives_a_clean_stop_with_a_journal(start, folder, change):
    server = start(*flags(folder, "--journal", str(folder / "journal")), l1_pages=64)
    with SyncEngine(server.endpoint) as engine:
        fill(server, engine)
        engine.lookup("reader", PROMPTS[0])  # at work when the server stops
        engine.lookup("writer", chain("half", 3))
        engine.ask("writer", chain("half", 3))
        assert server.stop() == 0
        assert not server.arena.exists()
        server.command += change
        server.start()
        assert not server.status()["arena"]["taken_over"]
        assert [(tier["chunks"], tier["pages"]) for tier in server.status()["tiers"]] == [(0, 0), (32, 32)]
        with pytest.raises(RemoteError, match="register again"):
            engine.end("reader")
    with SyncEngine(server.endpoint) as engine:
        time.sleep(0.5)  # the scan for strays has been through
        assert engine.serve("half", chain("half", 3))[0].hits == (0, 0)
        assert served(engine, "second life") == [(0, 4)] * 8
    assert server.stop() == 0
    server.start()
    with SyncEngine(server.endpoint) as engine:
        assert served(engine, "third life") == [(0, 4)] * 8, "one clean stop after the other"
        server.kill()
        server.start()
    with SyncEngine(server.endpoint) as engine:
        assert set(engine.client.call(wire.Where(sum(PROMPTS, ()))).tiers) >= {0}, "L1 too"
        assert [sum(hits) for hits in served(engine, "after a kill")] == [4] * 8
    server.stop()
    result = verify(folder / "journal")
    assert isinstance(result, Equal), str(result)


def test_an_l2_that_is_smaller_now_evicts_what_it_has_no_room_for(start, folder):
    server = start(*flags(folder, "--journal", str(folder / "journal")), l1_pages=12)
    with SyncEngine(server.endpoint) as engine:
        fill(server, engine)
    server.stop()
    server.command += ["--l2-size-gb", repr(20 * 65536 / 2**30)]
    server.start()
    assert server.status()["tiers"][1]["chunks"] == 20
    wait_for(lambda: len(files(folder)) == 20)
    with SyncEngine(server.endpoint) as engine:
        assert engine.serve("r", PROMPTS[-1])[0].hits == (0, 4), "the last that was stored"
    server.stop()
    assert isinstance(verify(folder / "journal"), Equal)


def test_a_start_that_would_lose_l2_is_refused_and_loses_nothing(start, folder):
    server = start(*flags(folder, "--journal", str(folder / "journal")), l1_pages=64)
    with SyncEngine(server.endpoint) as engine:
        fill(server, engine)
        server.kill()
        for change in (["--chunk-size", "512"], ["--l2", f"files:{folder}/other"], ["--l2", ""]):
            command = [*server.command, *change]
            refused = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
            assert refused.returncode == 2
            assert refused.stderr.count("\n") == 1
            assert "tells what lies in" in refused.stderr
            assert change[0] in refused.stderr
        server.start()
    with SyncEngine(server.endpoint) as engine:
        assert served(engine, "again") == [(4, 0)] * 8, "L1, too, is as it was"
    assert len(files(folder)) == 32


def test_a_journal_damaged_throughout_is_told_in_a_line_and_costs_l2_nothing(start, folder):
    server = start(*flags(folder, "--journal", str(folder / "journal")), l1_pages=64)
    with SyncEngine(server.endpoint) as engine:
        fill(server, engine)
    server.stop()
    kept = {path: path.read_bytes() for path in segments(folder / "journal")}
    for path in kept:
        path.write_bytes(b"")
    refused = subprocess.run(server.command, capture_output=True, text=True, env=environment(), check=False)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1, refused.stderr
    assert "remove the folder" in refused.stderr
    assert len(files(folder)) == 32
    first = next(iter(kept))
    first.write_bytes(kept[first])
    server.start()
    wait_for(lambda: server.status()["tiers"][1]["chunks"] == 32)


def test_what_was_demoted_outlives_a_clean_stop(start, folder):
    server = start(*flags(folder, "--placement", "write-back", "--journal", str(folder / "journal")), l1_pages=12)
    with SyncEngine(server.endpoint) as engine:
        fill(server, engine)
        below = [tier == 1 for tier in engine.client.call(wire.Where(sum(PROMPTS, ()))).tiers]
        assert sum(below) >= 20
        assert server.stop() == 0
        server.start()
    with SyncEngine(server.endpoint) as engine:
        where = engine.client.call(wire.Where(sum(PROMPTS, ()))).tiers
        assert where == tuple(1 if was else -1 for was in below)
        assert engine.serve("r", PROMPTS[0])[0].hits == (0, 4)
    server.stop()
    assert isinstance(verify(folder / "journal"), Equal)


class SlowStore(FileStore):
    def put(self, chunk, parts):
        time.sleep(0.02)
        super().put(chunk, parts)


@pytest.mark.parametrize("patience_s", [5, 0])
def test_a_clean_stop_waits_for_what_is_on_its_way_to_l2(folder, monkeypatch, patience_s):
    monkeypatch.setattr(server_module, "open_store", lambda url, size_bytes: SlowStore(folder / "l2"))
    monkeypatch.setattr(server_module, "_LAST_COPIES_S", patience_s)
    endpoint = f"ipc://{folder}/s.ipc"
    settings = settings_in(folder, l2=f"files:{folder}/l2", journal=str(folder / "journal"))
    with server_module.Server(settings), SyncEngine(endpoint) as engine:
        for at, prompt in enumerate(PROMPTS):
            engine.serve(f"{at}", prompt)
    with server_module.Server(settings), SyncEngine(endpoint) as engine:
        where = engine.client.call(wire.Where(sum(PROMPTS, ()))).tiers
    if patience_s:
        assert where == (1,) * 32
    else:
        assert where.count(-1) > 8
    assert isinstance(verify(folder / "journal"), Equal)


def test_what_is_lost_from_l2_while_no_server_runs_is_a_miss(start, folder):
    server = start(*flags(folder, "--journal", str(folder / "journal")), l1_pages=12)
    with SyncEngine(server.endpoint) as engine:
        fill(server, engine)
    server.stop()
    names = {path.name: path for path in files(folder)}
    names[PROMPTS[0][2].hex()].unlink()
    damaged = names[PROMPTS[1][1].hex()]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    server.start()
    with SyncEngine(server.endpoint) as engine:
        for at, left in ((0, 2), (1, 1)):
            found = engine.lookup(f"r{at}", PROMPTS[at])
            assert (found.hits, found.load_start, found.load_chunks) == ((0, 4), 0, left), "the run ends before it"
            assert engine.read(found, PROMPTS[at]) == PROMPTS[at][:left]
            engine.loaded(f"r{at}", PROMPTS[at][:left])
            engine.end(f"r{at}")
            assert engine.client.call(wire.Where(PROMPTS[at])).tiers[left] == -1
        assert engine.serve("whole", PROMPTS[2])[0].hits == (0, 4)
    server.stop()
    assert isinstance(verify(folder / "journal"), Equal)


def test_l2_is_taken_over_with_l1(start, folder):
    server = start(*flags(folder, "--journal", str(folder / "journal")), l1_pages=12)
    with SyncEngine(server.endpoint) as engine:
        fill(server, engine)
        engine.lookup("reader", PROMPTS[0])
        server.kill()
        server.start()
    with SyncEngine(server.endpoint) as engine:
        time.sleep(0.5)  # the scan for strays has been through
        assert [sum(engine.serve(f"{at}", prompt)[0].hits) for at, prompt in enumerate(PROMPTS)] == [4] * 8


def test_a_store_that_is_away_for_a_while_keeps_what_it_has(start, folder):
    server = start(*flags(folder, "--journal", str(folder / "journal")), l1_pages=12)
    with SyncEngine(server.endpoint) as engine:
        fill(server, engine)
        (folder / "l2").rename(folder / "unmounted")
        found = engine.lookup("r", PROMPTS[0])
        assert (found.hits, found.load_chunks) == ((0, 4), 0)
        engine.end("r")
        (folder / "unmounted").rename(folder / "l2")
        assert engine.client.call(wire.Where(PROMPTS[0])).tiers == (1,) * 4
        time.sleep(1.1)  # it is left alone for a second
        assert engine.serve("again", PROMPTS[0])[0].load_chunks == 4
    server.stop()
    assert isinstance(verify(folder / "journal"), Equal)


def test_a_store_that_begins_to_fail_is_told(start, folder):
    server = start(*flags(folder), l1_pages=12)
    with SyncEngine(server.endpoint) as engine:
        fill(server, engine)
        assert server.status()["l2_failing"] == {}
        (folder / "l2").rename(folder / "unmounted")
        engine.lookup("r", PROMPTS[0])
        engine.end("r")
        assert "No such file" in server.status()["l2_failing"]["get"]
        (folder / "unmounted").rename(folder / "l2")
        time.sleep(1.1)  # it is left alone for a second
        assert engine.serve("again", PROMPTS[0])[0].load_chunks == 4
        assert "get" not in server.status()["l2_failing"]
    log = (folder / "server.log").read_text()
    assert log.count("L2 fails: get: files:") == log.count("L2 works again: get") == 1


def test_a_store_that_fails_costs_misses_only(start, folder):
    server = start(*flags(folder), l1_pages=12)
    with SyncEngine(server.endpoint) as engine:
        fill(server, engine)
        for path in files(folder):
            path.unlink()
        for at, prompt in enumerate(PROMPTS[:4]):
            assert engine.serve(f"r{at}", prompt)[0].load_chunks == 0
            _, granted = engine.serve(f"anew-{at}", prompt)
            assert granted.chunks == (0, 1, 2, 3), "the core knows that they are gone"
        assert engine.serve("again", PROMPTS[3])[0].load_chunks == 4


def test_what_l2_would_not_delete_is_deleted_when_it_does(folder, monkeypatch):
    """The room counts as free; a chunk that has been stored again meanwhile stays."""
    remove, stuck = FileStore._remove, threading.Event()

    def removing(self, chunk):
        if stuck.is_set():
            raise StoreError("stuck")
        remove(self, chunk)

    monkeypatch.setattr(FileStore, "_remove", removing)
    monkeypatch.setattr("kvcore.live.service._DELETES_REST_NS", 3 * 10**8)
    with Server(in_process(folder)) as server, SyncEngine(server.settings.bind[0]) as engine:
        engine.serve("r", PROMPTS[0])
        engine.serve("s", PROMPTS[1])
        wait_for(lambda: len(files(folder)) == 8)
        ended, collect = [], server.service.transport.collect
        monkeypatch.setattr(server.service.transport, "collect", lambda: ended.extend(now := collect()) or now)
        stuck.set()
        engine.client.call(wire.Clear(None))
        wait_for(lambda: server.service.metrics.counts["kvcore_l2_chunks", "delete", "failed"] >= 24)  # of 8, thrice
        engine.serve("again", PROMPTS[1])
        assert len(files(folder)) == 8
        stuck.clear()
        wait_for(lambda: len(files(folder)) == 4)
        assert {path.name for path in files(folder)} == {chunk.hex() for chunk in PROMPTS[1]}
    failed = sum(len(one.left) for one in ended if one.operation == "delete")
    assert server.service.metrics.counts["kvcore_l2_chunks", "delete", "failed"] == failed


def test_what_a_put_that_failed_has_left_in_l2_is_deleted(folder, monkeypatch):
    put, late = FileStore.put, threading.Event()

    def putting(self, chunk, parts):
        put(self, chunk, parts)
        if late.is_set():
            raise StoreError("stored, and the answer came too late")

    monkeypatch.setattr(FileStore, "put", putting)
    monkeypatch.setattr("kvcore.live.service._DELETES_REST_NS", 3 * 10**8)
    with Server(in_process(folder)) as server, SyncEngine(server.settings.bind[0]) as engine:
        engine.serve("r", PROMPTS[0])
        wait_for(lambda: len(files(folder)) == 4)
        late.set()
        engine.serve("s", PROMPTS[1])
        wait_for(lambda: server.service.metrics.counts["kvcore_l2_chunks", "put", "failed"] == 4)
        late.clear()
        wait_for(lambda: {path.name for path in files(folder)} == {chunk.hex() for chunk in PROMPTS[0]})


def test_a_store_that_does_not_answer_holds_up_neither_the_end_nor_the_journal(folder, monkeypatch):
    waits, closed = threading.Event(), []

    def closing(self):
        closed.append("journal")
        close_journal(self)

    def never(self, chunk, parts):
        waits.wait(60)
        closed.append("put")
        raise StoreError("late")

    close_journal = JournalWriter.close
    monkeypatch.setattr(JournalWriter, "close", closing)
    monkeypatch.setattr(FileStore, "put", never)
    for name in ("server._LAST_COPIES_S", "stores.pool._LAST_WAIT_S"):
        monkeypatch.setattr(f"kvcore.live.{name}", 0.2)
    server = Server(in_process(folder, journal=str(folder / "journal")))
    with server, SyncEngine(server.settings.bind[0]) as engine:
        engine.serve("r", PROMPTS[0])
    assert closed == ["journal"], "and the server has ended"
    waits.set()
    wait_for(lambda: "put" in closed)


def in_process(folder, **more):
    return settings_in(folder, name="t", l1_size_gb=0.01, l2=f"files:{folder}/l2", **more)
