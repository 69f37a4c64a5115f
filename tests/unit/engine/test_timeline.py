import gzip
import json

import numpy as np
import pytest

from kvsim.engine.settings import RunSettings, SettingsError
from kvsim.engine.timeline import TimelineError, write_requests, write_trace
from kvsim.profiles import lookup
from kvsim.runner import run, run_many
from kvtraces import Chat, generate

LOG = generate(Chat(requests=60, seed=4, block_tokens=16))


def settings(**changes):
    defaults = {"profile": lookup("qwen3-8b", "h100"), "chunk_tokens": 64, "engines": 2, "l0_gb": 4.0, "l1_gb": 10.0}
    return RunSettings(**(defaults | {"max_model_len": 2500} | changes))


@pytest.fixture(scope="module")
def result():
    return run(LOG, settings(), timeline=True)


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_rows_are_the_columns(result, tmp_path, name):
    path = tmp_path / name
    write_requests(result, path)
    text = gzip.decompress(path.read_bytes()).decode() if name.endswith("gz") else path.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["request"] for row in rows] == list(range(60))
    assert any(row["refused"] for row in rows)
    for row, ttft, refused in zip(rows, result.columns["ttft_s"], result.columns["refused"], strict=True):
        assert row["ttft_s"] == (None if refused else ttft)


def test_parquet_holds_the_same(result, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_requests(result, tmp_path / "t.parquet")
    table = parquet.read_table(tmp_path / "t.parquet")
    np.testing.assert_array_equal(table["ttft_s"].to_numpy(), result.columns["ttft_s"])
    assert set(table.column_names) == {"request", *result.columns}


def test_another_kind_of_file_is_refused(result, tmp_path):
    with pytest.raises(TimelineError, match="parquet"):
        write_requests(result, tmp_path / "t.csv")


def test_the_trace_covers_every_step_and_request(result, tmp_path):
    write_trace(result, tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    steps = [event for event in events if event["ph"] == "X"]
    assert sum(event["dur"] for event in steps) / 1e6 == pytest.approx(
        sum(end - start for engine in result.steps for start, end, *_ in engine)
    )
    assert sum(event["args"]["prompt_tokens"] for event in steps) >= int(
        (result.columns["prompt_tokens"] - result.columns["l0_tokens"] - result.columns["loaded_tokens"])[
            ~result.columns["refused"]
        ].sum()
    )
    begun = [event for event in events if event["ph"] == "b"]
    ended = [event for event in events if event["ph"] == "e"]
    assert sorted((e["id"], e["name"]) for e in begun) == sorted((e["id"], e["name"]) for e in ended)
    served = int((~result.columns["refused"]).sum())
    assert sum(event["name"].startswith("request") for event in begun) == served
    first = {event["id"]: event["ts"] for event in ended if event["name"] == "prefill"}
    for request, ts in first.items():
        assert ts / 1e6 == pytest.approx(result.columns["arrived_s"][request] + result.columns["ttft_s"][request])


def test_the_steps_account_for_every_token(result):
    served = ~result.columns["refused"]
    outputs = int((np.maximum(result.columns["output_tokens"], 1)[served] - 1).sum())
    decoded = sum(decodes * count for engine in result.steps for *_, decodes, count in engine)
    assert result.total("preemptions") == 0
    assert decoded == outputs
    prompts = sum(tokens for engine in result.steps for _, _, tokens, _, _ in engine)
    cached = result.total("l0_tokens") + result.total("loaded_tokens")
    assert prompts == int(result.columns["prompt_tokens"][served].sum()) - cached


def test_many_settings_on_two_cores_are_those_of_one():
    chosen = [settings(l1_gb=size) for size in (0.0, 0.5, 10.0)]
    calls = []
    together = run_many(LOG, chosen, workers=2, progress=lambda done, total: calls.append((done, total)))
    apart = run_many(LOG, chosen, workers=1)
    assert [a.summary() for a in together] == [b.summary() for b in apart]
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_setting_that_fails_is_told_from_a_worker_too():
    with pytest.raises(SettingsError, match="nonsense"):
        run_many(LOG, [settings(), settings(policy="nonsense")], workers=2)
