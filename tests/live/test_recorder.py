"""The recorder: every request once, in the order of lookup, over rotated files."""

import os
import resource
import stat
import time

import numpy as np
from live_fakes import SyncEngine, chain, wait_for

from kvcore.live import recorder as recorder_module
from kvcore.live import wire
from kvcore.policy.hashing import trace_ids
from kvtraces import read, read_rows


def record(engine, request, prompt, blocks, **fields):
    message = wire.Record(
        engine.scheduler.member,
        request,
        len(prompt) * 256 + 3,
        7,
        16,
        blocks.astype("<i8").tobytes(),
        **fields,
    )
    engine.client.call(message, 5)


def test_every_request_is_recorded_once_with_what_the_server_saw(start, folder):
    server = start("--record", str(folder / "log.jsonl"))
    prompt = chain("a", 3)
    blocks = trace_ids(chain("blocks", 48))
    with SyncEngine(server.endpoint) as engine:
        assert engine.registered.record
        for at in range(3):
            engine.serve(f"{at}", prompt, salt="bob")
        for at in (2, 0, 1):  # they finish in another order than they came
            record(engine, f"{at}", prompt, blocks, status="finished", l0_tokens=16, ttft_ms=1.5, session_id="s")
        record(engine, "never looked up", prompt, blocks)
    assert wait_for(lambda: server.status()["recorder"]["rows"] == 3)
    assert server.status()["recorder"]["dropped"] == 1
    server.stop()
    rows = sorted(read_rows(folder / "log.jsonl"), key=lambda row: row.seq)
    assert [(row.seq, row.request_id, row.matched_l1, row.loaded_tokens) for row in rows] == [
        (0, "0", 0, 0),
        (1, "1", 768, 768),
        (2, "2", 768, 768),
    ]
    assert rows[0].hash_ids == blocks.tolist()
    assert {(r.salt, r.model, r.instance, r.status, r.l0_tokens, r.ttft_ms, r.block_size) for r in rows} == {
        ("bob", "fake", "engine", "finished", 16, 1.5, 16)
    }
    assert rows[0].input_length == 771


def test_a_row_is_of_the_time_when_its_request_arrived_not_when_its_turn_came(start, folder):
    server = start("--record", str(folder / "log.jsonl"))
    blocks = trace_ids(chain("blocks", 16))
    with SyncEngine(server.endpoint) as engine:
        for name, waited_ms in (("at once", 0.0), ("queued", 60_000.0)):
            engine.serve(name, chain(name, 1), waited_ms=waited_ms)
            record(engine, name, chain(name, 1), blocks)
    assert wait_for(lambda: server.status()["recorder"]["rows"] == 2)
    server.stop()
    log = read(folder / "log.jsonl")
    assert log.extra["request_id"].tolist() == ["at once", "queued"]
    assert 50_000 < log.timestamp_ms[0] - log.timestamp_ms[1] <= 60_000


def test_a_recording_rotates_without_loss_and_goes_on_after_a_restart(start, folder):
    path = folder / "log.jsonl.zst"
    server = start("--record", str(path), "--record-max-mb", "1", l1_pages=512, page_bytes=4096)
    requests = 1200
    blocks = np.random.default_rng(0).integers(0, 2**62, (requests, 128))
    for life in range(2):
        with SyncEngine(server.endpoint) as engine:
            for at in range(requests // 2):
                number = life * requests // 2 + at
                engine.serve(f"{number}", chain(number % 50, 8), real=False)
                record(engine, f"{number}", chain(number % 50, 8), blocks[number])
        wait_for(lambda: server.status()["recorder"]["rows"] == requests // 2)
        assert server.status()["recorder"]["dropped"] == 0
        server.stop()
        server.start()
    files = sorted(name for name in os.listdir(folder) if "log" in name and "server" not in name)
    assert len(files) >= 4
    log = read(path)
    assert len(log) == requests
    assert log.extra["seq"].tolist() == list(range(requests))
    assert log.extra["request_id"].tolist() == [f"{number}" for number in range(requests)]
    assert log.blocks.tolist() == blocks.ravel().tolist()
    assert int(log.extra["matched_l1"].sum()) == (requests - 100) * 2048  # each life sees each of 50 prompts anew once


def test_a_row_that_cannot_be_written_is_counted(start, folder):
    server = start("--record", str(folder / "log.jsonl"))
    with SyncEngine(server.endpoint) as engine:
        engine.serve("1", chain("a", 1))
        record(engine, "1", chain("a", 1), np.array([-1]))
    time.sleep(0.1)
    recorder = server.status()["recorder"]
    assert (recorder["rows"], recorder["dropped"]) == (0, 1)


def test_a_name_that_comes_back_is_another_request_but_where_it_was_preempted(start, folder):
    server = start("--record", str(folder / "log.jsonl"))
    blocks = trace_ids(chain("blocks", 16))
    one, prompt = chain("one", 1), chain("a", 3)
    with SyncEngine(server.endpoint) as engine:
        engine.serve("same", one)  # cancelled: there is no record of it
        engine.serve("fill", prompt)
        engine.serve("same", prompt)
        record(engine, "same", prompt, blocks)
        engine.serve("preempted", chain("b", 1))
        engine.serve("preempted", chain("b", 1), resumed=True)
        record(engine, "preempted", chain("b", 1), blocks)
    assert wait_for(lambda: server.status()["recorder"]["rows"] == 2)
    assert server.status()["recorder"]["dropped"] == 1
    server.stop()
    rows = {row.request_id: row for row in read_rows(folder / "log.jsonl")}
    assert (rows["same"].matched_l1, rows["same"].loaded_tokens, rows["same"].seq) == (768, 768, 2)
    assert (rows["preempted"].matched_l1, rows["preempted"].loaded_tokens, rows["preempted"].seq) == (0, 256, 3)
    assert stat.S_IMODE((folder / "log.jsonl").stat().st_mode) == 0o600


def test_a_full_disk_is_said_once_and_what_it_costs_is_counted(folder, caplog, monkeypatch):
    monkeypatch.setattr(recorder_module, "_REST_S", 0.0)
    recorder = recorder_module.Recorder(folder / "log.jsonl", max_bytes=1 << 20)

    def finish(name):
        recorder.looked_up(name, recorder_module.Seen(0, 0.0, "e", "m", "", 256, (0,)))
        recorder.take(name, wire.Record(0, name, 3, 7, 16))
        wait_for(lambda: recorder.rows + recorder.dropped == int(name) + 1)

    finish("0")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9, limits[1]))
    try:
        for at in range(1, 8):
            finish(f"{at}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    finish("8")
    recorder.close()
    assert (recorder.rows, recorder.dropped) == (2, 7)
    assert read(recorder.path).extra["request_id"].tolist() == ["0", "8"]
    assert [entry.getMessage().partition(": ")[2] for entry in caplog.records] == [
        "rows are lost, 1 so far: [Errno 27] File too large"
    ]
