"""Servers killed and stopped, engines killed and stopped: nothing wrong is served, nothing is lost for good."""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from live_fakes import SyncEngine, chain, clients, environment, settings_in, wait_for

from kvcore.live import wire
from kvcore.live.client import MISS, NOT_YET, Client, Register, RemoteError, SchedulerClient, WorkerClient
from kvcore.live.server import Server, StartError
from kvsim.recorded_settings import served
from kvtraces.journal import Equal, verify

PROMPTS = [chain(f"p{at}", 5) for at in range(6)]


def fill(engine):
    for at, prompt in enumerate(PROMPTS):
        engine.serve(f"fill-{at}", prompt)


# The server's end


def test_committed_chunks_survive_a_kill_with_a_journal(start, folder):
    server = start("--journal", str(folder / "journal"))
    with SyncEngine(server.endpoint) as engine:
        fill(engine)
        engine.lookup("reader", PROMPTS[0])  # pinned in the middle of a load
        engine.lookup("writer", chain("half", 3))
        engine.ask("writer", chain("half", 3))  # granted, never written
        before = engine.registered
        server.kill()
    server.start()
    with SyncEngine(server.endpoint) as engine:
        assert engine.registered.epoch > before.epoch
        for at, prompt in enumerate(PROMPTS):
            found, _ = engine.serve(f"again-{at}", prompt)  # reads the bytes and compares
            assert found.hits == (5,)
        assert engine.serve("half", chain("half", 3))[0].hits == (0,)
        with pytest.raises(RemoteError, match="register again"):
            engine.client.call(wire.End(before.member, "reader"))
    assert server.status()["arena"]["taken_over"]
    assert server.stop() == 0
    result = verify(folder / "journal")
    assert isinstance(result, Equal), str(result)


def test_a_second_kill_is_survived_too(start, folder):
    server = start("--journal", str(folder / "journal"), "--journal-segment-mb", "1")
    with SyncEngine(server.endpoint) as engine:
        fill(engine)
    for life in range(3):
        server.kill()
        server.start()
        with SyncEngine(server.endpoint) as engine:
            assert engine.serve(f"{life}", PROMPTS[life] + chain("more", 1))[0].hits[0] >= 5
    server.stop()
    assert isinstance(verify(folder / "journal"), Equal)


def test_a_journal_has_one_server(start, folder):
    server = start("--journal", str(folder / "journal"))
    with SyncEngine(server.endpoint) as engine:
        fill(engine)
        segments = sorted((folder / "journal").glob("*.kvj"))
        other = ["--name", "other", "--bind", f"ipc://{folder}/other.ipc"]
        command = [*server.command[: server.command.index("--bind")], *server.command[server.command.index("--http") :]]
        refused = subprocess.run(
            [*command, *other, "--arena-dir", str(folder)],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment(),
            check=False,
        )
        assert refused.returncode == 2
        assert refused.stderr == f"kvcore: --journal {folder}/journal: another server uses this journal\n"
        assert sorted((folder / "journal").glob("*.kvj")) == segments
        server.kill()
        server.start()
    with SyncEngine(server.endpoint) as engine:
        assert engine.serve("again", PROMPTS[0])[0].hits == (5,)


def test_a_start_that_fails_after_a_kill_leaves_l1_to_the_next(start, folder):
    server = start("--journal", str(folder / "journal"))
    with SyncEngine(server.endpoint) as engine, socket.socket() as taken:
        fill(engine)
        server.kill()
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [*server.command, "--http", f"127.0.0.1:{taken.getsockname()[1]}"]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), check=False)
        assert refused.returncode == 2
        assert "--http" in refused.stderr
    server.start()
    with SyncEngine(server.endpoint) as engine:
        assert engine.serve("again", PROMPTS[0])[0].hits == (5,)
    server.stop()
    assert isinstance(verify(folder / "journal"), Equal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_every_signal_that_ends_a_server_leaves_nothing(start, folder, number):
    server = start()
    server.process.send_signal(number)
    assert server.process.wait(20) == 0
    assert [path.name for path in folder.iterdir()] == ["server.log"]


def test_a_server_takes_the_descriptors_that_it_may_have(start):
    server = start()
    server.kill()
    server.command = ["sh", "-c", 'ulimit -Sn 100; exec "$@"', "sh", *server.command]
    server.start()
    soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    assert soft == hard != 100


def test_connections_without_a_word_take_few_descriptors(start, folder):
    server = start()
    with ExitStack() as stack, Client(server.endpoint) as client:
        client.ping()
        used = len(os.listdir(f"/proc/{server.process.pid}/fd"))
        for _ in range(120):
            peer = stack.enter_context(socket.socket(socket.AF_UNIX))
            peer.connect(f"{folder}/kvcore-t.sock")
        wait_for(lambda: "have not said whose they are" in (folder / "server.log").read_text())
        assert len(os.listdir(f"/proc/{server.process.pid}/fd")) <= used + 70
    with SyncEngine(server.endpoint) as engine:
        assert engine.serve("r", PROMPTS[0])[1].chunks == (0, 1, 2, 3, 4)


def test_connections_without_a_word_do_not_end_a_server_that_has_no_descriptors_left(start, folder):
    server = start()
    with ExitStack() as stack, Client(server.endpoint) as client:
        client.ping()
        used = len(os.listdir(f"/proc/{server.process.pid}/fd"))
        _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (used + 8, hard))
        for _ in range(40):
            peer = stack.enter_context(socket.socket(socket.AF_UNIX))
            peer.connect(f"{folder}/kvcore-t.sock")
        wait_for(lambda: "workers' connections are not taken" in (folder / "server.log").read_text())
        for _ in range(20):
            client.ping()
            time.sleep(0.05)
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (hard, hard))
        with SyncEngine(server.endpoint) as engine:  # it waits for less than a second
            assert engine.serve("r", PROMPTS[0])[1].chunks == (0, 1, 2, 3, 4)
            wait_for(lambda: len(os.listdir(f"/proc/{server.process.pid}/fd")) < used + 8)
            engine.renew()


@pytest.mark.parametrize("journal", [True, False])
def test_a_fault_in_the_loop_leaves_l1_to_the_next_server_as_a_kill_does(folder, monkeypatch, journal):
    endpoint = f"ipc://{folder}/s.ipc"
    settings = settings_in(folder, name="t", journal=str(folder / "journal") if journal else "")
    server = Server(settings)
    server.open()
    with ThreadPoolExecutor() as threads:
        running = threads.submit(server.run)
        engine = SyncEngine(endpoint)
        fill(engine)
        monkeypatch.setattr(server, "_time_turn", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            running.result(10)
    server.close()
    engine.close()
    assert (folder / "kvcore-t.arena").exists() == journal
    assert not (folder / "kvcore-t.sock").exists()
    with Server(settings), SyncEngine(endpoint) as engine:
        assert engine.serve("again", PROMPTS[0])[0].hits == ((5,) if journal else (0,))
    assert not (folder / "kvcore-t.arena").exists()
    if journal:
        assert isinstance(verify(folder / "journal"), Equal)


def test_without_a_journal_the_same_pages_start_empty(start):
    server = start()
    with SyncEngine(server.endpoint) as engine:
        fill(engine)
        inode = os.stat(engine.registered.arena_path).st_ino
        server.kill()
        server.start()
        with SyncEngine(server.endpoint) as again:
            assert os.stat(again.registered.arena_path).st_ino == inode
            assert again.serve("r", PROMPTS[0])[0].hits == (0,)
    assert server.status()["arena"]["taken_over"]


def test_a_clean_stop_leaves_nothing(start, folder):
    server = start("--journal", str(folder / "journal"))
    with SyncEngine(server.endpoint) as engine:
        fill(engine)
        assert server.stop() == 0
    assert sorted(path.name for path in folder.iterdir()) == ["journal", "server.log"]
    server.start()
    with SyncEngine(server.endpoint) as engine:
        assert engine.serve("r", PROMPTS[0])[0].hits == (0,), "the arena is another, whatever the journal says"


@pytest.mark.parametrize("journal", [True, False])
def test_pages_of_a_worker_that_still_writes_are_not_handed_out_by_the_next_server(start, folder, journal):
    server = start(*(["--journal", str(folder / "journal")] if journal else []), l1_pages=16)
    with SyncEngine(server.endpoint, "writer") as writer:
        half = chain("half", 6)
        writer.lookup("r", half)
        granted = writer.ask("r", half)
        held = set(np.frombuffer(granted.pages, "<u4").tolist())
        assert len(held) == 6
        server.kill()
        server.start()
        assert server.status()["arena"]["quarantined_pages"] == 6
        with SyncEngine(server.endpoint, "other") as other:
            for at in range(20):
                found, given = other.serve(f"{at}", chain(f"{at}", 4))
                assert found.hits == (0,)
                assert given.chunks == (0, 1, 2, 3)
                assert held.isdisjoint(np.frombuffer(given.pages, "<u4").tolist())
            other.lookup("all", chain("all", 16))
            given = other.ask("all", chain("all", 16))
            assert (len(given.chunks), given.refused) == (10, {"room": 6})
            other.aborted("all", chain("all", 16)[:10])
            other.end("all")
            with SyncEngine(server.endpoint, "writer", drained=writer.registered.epoch):
                wait_for(lambda: server.status()["arena"]["quarantined_pages"] == 0)
            _, given = other.serve("whole", chain("whole", 16))
            assert len(given.chunks) == 16
    if journal:
        server.stop()
        assert isinstance(verify(folder / "journal"), Equal)


def test_a_full_journal_goes_on_in_bounded_segments(start, folder):
    server = start("--journal", str(folder / "journal"), "--journal-segment-mb", "1", "--journal-segments", "2")
    with SyncEngine(server.endpoint, facts={"l0_blocks": 9}) as engine:
        for at in range(1500):
            engine.serve(f"{at}", chain(f"{at % 30}", 20), real=False)
        names = wait_for(  # the oldest goes when the disk has taken the newest
            lambda: len(there := sorted(path.name for path in (folder / "journal").glob("*.kvj"))) == 2 and there
        )
        assert names[-1] > "00000003.kvj"
        server.kill()
    result = verify(folder / "journal")
    assert isinstance(result, Equal), str(result)
    assert result.steps > 1000
    assert served(folder / "journal").engine == {"l0_blocks": 9}, "the first segment is gone, and the last tells it"
    server.start()
    with SyncEngine(server.endpoint) as engine:
        assert engine.serve("r", chain("29", 20), real=False)[0].hits == (20,)


@pytest.mark.parametrize("l2", [False, True])
def test_a_journal_that_cannot_be_written_is_given_up_and_not_believed(start, folder, l2):
    journal = folder / "journal"
    server = start("--journal", str(journal), *(["--l2", f"files:{folder}/l2"] if l2 else []), l1_pages=64)
    with SyncEngine(server.endpoint) as engine:
        fill(engine)
        fill(engine)
        wait_for(lambda: not l2 or server.status()["tiers"][1]["idle_pages"] == 30)
        assert server.status()["journal"]["failed"] is None
        assert server.counters()["kvcore_journal_failed"] == 0
        full = (journal / "00000001.kvj").stat().st_size + 100
        assert full > 5000, "chunks' files are smaller"
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (full, full))
        for at in range(3):
            assert sum(engine.serve(f"on-{at}", PROMPTS[at])[0].hits) == 5
            assert engine.serve(f"new-{at}", chain(f"new-{at}", 3))[1].chunks == (0, 1, 2)
        assert "File too large" in server.status()["journal"]["failed"]
        assert server.counters()["kvcore_journal_failed"] == 1
        command = [sys.executable, "-m", "kvcore", "status", "--server", server.endpoint]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), check=True)
        assert "given up" in shown.stdout
        server.kill()
        assert (folder / "server.log").read_text().count("going on without the journal") == 1
        server.start()
    assert server.status()["arena"]["taken_over"]
    assert server.status()["journal"]["failed"] is None
    with SyncEngine(server.endpoint) as engine:
        assert engine.serve("again", PROMPTS[0])[0].hits == ((0, 5) if l2 else (0,))
        server.kill()
        server.start()
    with SyncEngine(server.endpoint) as engine:
        assert engine.serve("again", PROMPTS[0])[0].hits[0] == 5, "the next journal is believed"
    server.stop()
    result = verify(journal)
    assert isinstance(result, Equal), str(result)


def test_a_start_on_a_full_disk_says_what_to_do_and_loses_nothing(folder, monkeypatch):
    settings = settings_in(folder, name="t", journal=str(folder / "journal"), l2=f"files:{folder}/l2")
    with Server(settings) as server, SyncEngine(settings.bind[0]) as engine:
        fill(engine)
        wait_for(lambda: len(server.service.parts.state.core.tiers[1].resident) == 30)
    write = os.write

    def full(fd, data):
        if os.readlink(f"/proc/self/fd/{fd}").startswith(settings.journal):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StartError, match="journal: No space left on device: make room there, and L1 and L2 are as"):
            Server(settings).open()
    with Server(settings), SyncEngine(settings.bind[0]) as engine:
        assert engine.serve("again", PROMPTS[0])[0].hits == (0, 5)


def test_a_journal_whose_next_segment_cannot_be_made_is_given_up(start, folder):
    journal = folder / "journal"
    server = start("--journal", str(journal), "--journal-segment-mb", "1")
    with SyncEngine(server.endpoint) as engine:
        fill(engine)
        moved = journal.rename(folder / "moved")
        at = 0
        while server.status()["journal"]["failed"] is None:
            for _ in range(100):
                at += 1
                engine.serve(f"{at}", chain(f"{at % 30}", 20), real=False)
            assert at < 3000, "a segment was begun in a folder that is not there"
        assert engine.serve("r", chain("new", 3))[1].chunks == (0, 1, 2)
    assert server.stop() == 0
    assert isinstance(verify(moved), Equal)


def test_a_disk_that_takes_its_time_with_a_segment_holds_up_nobody_and_its_failure_costs_the_journal(
    folder, monkeypatch
):
    ready, asked, told = threading.Event(), threading.Event(), threading.Event()
    sync = os.fsync

    def fsync(fd):
        if not ready.is_set():
            return sync(fd)
        asked.set()
        told.wait(20)
        raise OSError(5, "a broken disk")

    monkeypatch.setattr(os, "fsync", fsync)
    settings = settings_in(folder, name="t", journal=str(folder / "journal"), journal_segment_mb=1)
    with Server(settings) as server, SyncEngine(settings.bind[0]) as engine:
        ready.set()
        at = 0
        while not asked.is_set():
            at += 1
            engine.serve(f"{at}", chain(f"{at % 30}", 20), real=False)
            assert at < 3000
        for at in range(600):  # more than another segment, which has to wait
            engine.serve(f"meanwhile-{at}", chain(f"{at % 30}", 20), real=False)
        assert server.service.journal_failure == ""
        assert len(list((folder / "journal").glob("*.kvj"))) == 2
        told.set()
        wait_for(lambda: server.service.journal_failure)
        assert "a broken disk" in server.service.journal_failure
        assert engine.serve("r", chain("new", 3))[1].chunks == (0, 1, 2)


# Clients, when the server is away


def lookup(scheduler, request, prompt):
    """As vLLM does: ask again every step. Returns what was found, and the longest and all of the time waited."""
    longest = total = 0.0
    while True:
        start_s = time.perf_counter()
        found = scheduler.lookup(request, prompt)
        took = time.perf_counter() - start_s
        longest, total = max(longest, took), total + took
        if found is not NOT_YET:
            return found, longest, total
        time.sleep(0.001)


def store(scheduler, worker, request, prompt):
    lookup(scheduler, request, prompt)
    scheduler.ask(request, prompt)
    ((_, granted),) = wait_for(scheduler.granted)
    worker.committed(request, [prompt[at] for at in granted.chunks], epoch=granted.epoch)
    assert worker.flush()
    scheduler.end(request)


def test_a_kill_with_100_requests_queued_costs_misses_and_a_return_brings_hits_back(start, folder):
    server = start("--journal", str(folder / "journal"))
    prompt = PROMPTS[0]
    with clients(server) as (scheduler, worker):
        store(scheduler, worker, "1", prompt)
        assert lookup(scheduler, "2", prompt)[0].hits == (5,)
        server.process.send_signal(signal.SIGSTOP)
        for at in range(100):
            assert scheduler.lookup(f"queued-{at}", prompt) is NOT_YET
        server.kill()
        start_s = time.monotonic()
        waited = 0.0
        for at in range(100):
            found, longest, total = lookup(scheduler, f"queued-{at}", prompt)
            assert found is MISS
            assert longest < 0.1, "the scheduler never blocks"
            waited += total
            scheduler.ask(f"queued-{at}", prompt)
            worker.committed(f"queued-{at}", prompt)
            scheduler.end(f"queued-{at}")
        assert time.monotonic() - start_s < 2
        assert waited < 1
        assert scheduler.away
        server.start()
        wait_for(lambda: not scheduler.away and not worker.away)
        wait_for(lambda: lookup(scheduler, f"back-{time.monotonic()}", prompt)[0].hits == (5,))


def test_a_stopped_server_is_away_and_comes_back(start):
    server = start()
    prompt = PROMPTS[0]
    with clients(server) as (scheduler, worker):
        store(scheduler, worker, "1", prompt)
        server.process.send_signal(signal.SIGSTOP)
        found, longest, total = lookup(scheduler, "2", prompt)
        assert found is MISS
        assert longest < 0.1
        assert total < 1
        time.sleep(3)
        assert lookup(scheduler, "3", prompt)[0] is MISS
        server.process.send_signal(signal.SIGCONT)
        wait_for(lambda: lookup(scheduler, f"back-{time.monotonic()}", prompt)[0].hits == (5,))
    wait_for(lambda: server.status()["requests"] == 0)


def test_a_server_away_at_the_start_is_a_warning(folder, start, caplog):
    scheduler = SchedulerClient(f"ipc://{folder}/s.ipc", Register("e", "scheduler", 16, 256))
    worker = WorkerClient(f"ipc://{folder}/s.ipc", Register("e", "worker", 16, 256))
    try:
        assert scheduler.register(timeout_s=0.3) is None
        assert worker.register(timeout_s=0.3) is None
        assert "away" in caplog.text
        assert scheduler.lookup("1", PROMPTS[0]) is MISS
        start()
        wait_for(lambda: scheduler.registered is not None and worker.registered is not None)
        assert lookup(scheduler, "2", PROMPTS[0])[0].hits == (0,)
    finally:
        worker.leave()
        scheduler.leave()


def test_a_server_that_comes_back_otherwise_refuses_and_the_client_stays_away(start, caplog):
    server = start()
    with clients(server) as (scheduler, worker):
        store(scheduler, worker, "1", PROMPTS[0])
        server.kill()
        server.command += ["--chunk-size", "24"]  # no multiple of the engine's block
        server.start()
        wait_for(lambda: caplog.text.count("no multiple") == 2)
        assert scheduler.away
        assert lookup(scheduler, "2", PROMPTS[0])[0] is MISS
        time.sleep(1.5)
        assert caplog.text.count("no multiple") == 2, "said once by each member, not at every try"
        server.kill()
        server.command[-1] = "512"
        server.start()
        wait_for(lambda: scheduler.registered is not None and worker.registered is not None)
        assert scheduler.registered.chunk_tokens == 512


def test_a_server_stopped_for_longer_than_the_leases_believes_the_living(start):
    server = start("--lease-s", "0.6")
    with SyncEngine(server.endpoint) as engine, heartbeat(engine):
        engine.serve("1", PROMPTS[0])
        engine.lookup("2", PROMPTS[0])
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(2)
        server.process.send_signal(signal.SIGCONT)
        time.sleep(1)
        assert server.counters()["kvcore_requests_at_work"] == 1, "its lease was renewed while nobody could listen"


def test_a_worker_drains_before_it_registers_again(start):
    server = start()
    draining, drained, seen = threading.Event(), threading.Event(), []

    def drain():
        draining.set()
        drained.wait(10)

    register = Register("e", "worker", 16, 256)
    worker = WorkerClient(server.endpoint, register, drain=drain, back=lambda: seen.append(worker.registered))
    first = worker.register()
    try:
        server.kill()
        assert draining.wait(10)
        server.start()
        time.sleep(0.5)
        assert worker.away
        assert not seen
        drained.set()
        wait_for(lambda: seen)
        assert seen == [worker.registered]  # it is registered when it is told so
        assert seen[0].epoch > first.epoch
    finally:
        worker.leave()


# Engines that stop or die in the middle of a copy


@contextmanager
def child(server, what, name="child"):
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "fault_child.py"), server.endpoint, what, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=environment(),
    )
    try:
        told = process.stdout.readline().split()
        assert told, "the child failed"
        yield process, {int(page) for page in told[1:]}
    finally:
        process.kill()
        process.wait(10)
        process.stdin.close()
        process.stdout.close()


def tell(process, word):
    process.stdin.write(word + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@contextmanager
def heartbeat(engine):
    """Renew an engine's lease in the background, as clients do; over a connection of its own."""
    over = threading.Event()

    def beat():
        with Client(engine.client._connection.endpoint) as client:
            while not over.wait(0.1):
                for member in (engine.scheduler, *engine.workers):
                    client.call(wire.Renew(member.member), 5)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def churn(engine, pages, rounds=10):
    """Fill L1 with other chunks, several times over; return every page that was handed out."""
    given = set()
    for at in range(rounds):
        prompt = chain(f"churn-{time.monotonic()}-{at}", pages)
        _, granted = engine.serve(f"churn-{time.monotonic()}", prompt)
        given.update(np.frombuffer(granted.pages, "<u4").tolist())
    return given


def test_a_writer_stopped_past_its_lease_keeps_its_pages_and_is_not_believed(start, folder):
    server = start("--lease-s", "0.5", "--journal", str(folder / "journal"), l1_pages=16)
    with (
        SyncEngine(server.endpoint, "parent") as parent,
        heartbeat(parent),
        child(server, "store") as (process, held),
    ):
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: server.counters()["kvcore_requests_at_work"] == 0)
        given = churn(parent, 12)
        assert held.isdisjoint(given)
        assert server.status()["tiers"][0]["pages"] == 16
        process.send_signal(signal.SIGCONT)
        assert tell(process, "write") == "wrote"
        assert tell(process, "commit") == "committed"
        prompt = chain("child-prompt", 4)
        assert parent.client.call(wire.Where(prompt)).tiers == (-1,) * 4, "what was written too late is not matched"
        assert server.counters()["kvcore_refused_chunks", "lease"] == 4
        assert churn(parent, 16, rounds=2) >= held, "the pages are back"
    server.stop()
    assert isinstance(verify(folder / "journal"), Equal)


def test_a_reader_stopped_past_its_lease_learns_that_its_pages_are_others_now(start):
    server = start("--lease-s", "0.5", l1_pages=16)
    with (
        SyncEngine(server.endpoint, "parent") as parent,
        heartbeat(parent),
        child(server, "load") as (process, held),
    ):
        assert tell(process, "read") == "read"
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: server.counters()["kvcore_requests_at_work"] == 0)
        assert churn(parent, 16) >= held, "its pins are gone"
        process.send_signal(signal.SIGCONT)
        assert tell(process, "read") == "stale"


def test_a_writer_that_is_killed_gives_its_pages_back_at_once(start):
    server = start("--lease-s", "30", l1_pages=16)
    with SyncEngine(server.endpoint, "parent") as parent, child(server, "store") as (process, held):
        assert server.status()["tiers"][0]["pages"] == 4
        process.kill()
        wait_for(lambda: server.status()["tiers"][0]["pages"] == 0)
        wait_for(lambda: [one["name"] for one in server.status()["instances"]] == ["parent"])
        assert churn(parent, 16, rounds=1) >= held
        assert parent.client.call(wire.Where(chain("child-prompt", 4))).tiers == (-1,) * 4


def test_a_dead_rank_does_not_free_what_another_rank_writes(start):
    server = start(l1_pages=16)
    prompt = chain("a", 4)
    with SyncEngine(server.endpoint, "pair", world=2) as pair:
        pair.lookup("r", prompt)
        pair.ask("r", prompt)
        pair.committed("r", prompt[:1], 0)
        pair.sockets[1].close()  # rank 0 dies
        wait_for(lambda: server.counters()["kvcore_requests_at_work"] == 0)
        assert server.status()["tiers"][0]["pages"] == 4, "rank 1 may still be writing"
        assert pair.lookup("r2", prompt).hits == (0,), "the instance is not whole"
        pair.committed("r", prompt, 1)
        assert server.status()["tiers"][0]["pages"] == 0
        assert pair.client.call(wire.Where(prompt)).tiers == (-1,) * 4


def test_a_worker_drains_before_a_server_that_lives_takes_it_for_gone(start):
    server = start()
    draining, drained = threading.Event(), threading.Event()

    def drain():
        draining.set()
        drained.wait(10)

    worker = WorkerClient(server.endpoint, Register("e", "worker", 16, 256), drain=drain)
    worker.register()
    session = worker._presence.session
    try:
        worker._presence.lost(session, "no reply within 0.5 s")
        assert draining.wait(10)
        assert session.liveness.fileno() != -1, "closed: what it writes to is given to others"
    finally:
        drained.set()
        worker.leave()


def test_what_was_granted_to_a_scheduler_that_lost_the_answer_is_given_back(start):
    """It comes back without knowing of the pages, and its workers were never told of them."""
    server = start()
    with clients(server) as (scheduler, worker):
        pages = server.status()["arena"]["pages"]
        lookup(scheduler, "1", PROMPTS[0])
        scheduler.ask("1", PROMPTS[0])
        wait_for(lambda: server.status()["arena"]["free_pages"] < pages)
        before = worker.registered
        scheduler._lose("a test")
        wait_for(lambda: scheduler.registered)
        assert scheduler.granted() == []
        assert server.status()["arena"]["free_pages"] < pages
        worker.register_again()
        wait_for(lambda: server.status()["arena"]["free_pages"] == pages)
        assert wait_for(lambda: worker.registered) is not before
