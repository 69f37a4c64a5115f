"""`kvsim validate` on a log that a simulation recorded: its errors are known."""

import dataclasses
import json
import re

import numpy as np
import pytest

import kvsim
from kvcore.policy import Core, CoreConfig, InstanceRegistered, TierConfig
from kvtraces import Chat, Poisson, generate, write
from kvtraces.journal import Head, JournalWriter

COSTS = ("--model", "qwen3-8b", "--gpu", "h100")
SERVER = ("--chunk-tokens", 64, "--l0-gb", 6, "--l1-size-gb", 30)


@pytest.fixture(scope="module")
def recorded():
    """A log as a server of these settings would have recorded it, and that log without times."""
    log = generate(Chat(requests=400, seed=21, block_tokens=16, arrivals=Poisson(sessions_per_s=0.8)))
    profile = kvsim.costs(model="qwen3-8b", gpu="h100").run_profile
    settings = kvsim.RunSettings(profile=profile, chunk_tokens=64, l0_gb=6.0, l1_gb=30.0)
    columns = kvsim.run(log, settings, baseline=False).columns
    extra = {
        "ttft_ms": 1e3 * columns["ttft_s"],
        "queue_ms": 1e3 * (columns["handling_s"] + columns["queue_s"]),
        **{f"{part}_ms": 1e3 * columns[f"{part}_s"] for part in ("load", "prefill")},
        **{name: columns[name].astype(np.float64) for name in ("l0_tokens", "matched_l1", "loaded_tokens")},
    }
    return dataclasses.replace(log, extra={**log.extra, **extra}), log


@pytest.fixture
def trace(recorded, tmp_path):
    path = tmp_path / "prod.jsonl"
    write(recorded[0], path)
    return path


@pytest.fixture
def command(trace):
    return ("validate", "--trace", trace, *COSTS, *SERVER)


def test_a_simulation_validates_itself(kvsim_command, command):
    found = kvsim_command.json(*command)
    assert found["requests"] == 400
    for name in ("l0", "l1", "loaded"):
        assert found["hits"][name]["equal_requests"] == 1
        assert found["hits"][name]["recorded"] > 0
    for name in ("p50", "p90", "p95", "p99"):
        assert found["ttft"][name]["error"] == pytest.approx(0, abs=1e-6)
        assert {"low", "high", "baseline_error"} <= set(found["ttft"][name])
    assert found["beats_baseline"]
    assert found["settings"]["l0_block_tokens"] == 16
    assert found["notes"] == ["the log does not record matched_l2: those hits are not compared"]


def test_an_error_is_reported_and_does_not_fail(kvsim_command, command):
    found = kvsim_command.json(*command, "--l1-size-gb", 0.5)
    assert found["hits"]["l1"]["error"] < -0.1
    shown = kvsim_command.shown(*command, "--l1-size-gb", 0.5)
    assert "It is worst for prompts of" in " ".join(shown.replace("│", " ").split())
    assert max(map(len, shown.splitlines())) <= 100


def test_for_a_person(kvsim_command, command):
    shown = kvsim_command.shown(*command)
    for word in ("TTFT p50 is predicted as recorded", "95% interval", "by length", "equal requests", "100.0%"):
        assert word in shown


def test_the_report_has_the_plot_and_the_data(kvsim_command, command, tmp_path):
    pytest.importorskip("plotly")
    path = tmp_path / "out.html"
    found = kvsim_command.json(*command, "--report", path)
    page = path.read_text()
    assert '<div class="plot" id="ttft_cdf">' in page
    figures = json.loads(re.search(r"<script>const figures = (.*?);\nfor ", page, flags=re.DOTALL).group(1))
    assert [line["name"] for line in figures["ttft_cdf"]["data"]] == ["recorded", "predicted", "mean by prompt length"]
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, flags=re.DOTALL).group(1))
    assert data["ttft"] == found["ttft"]
    assert "Where the error lies" in page


def test_columns_that_are_missing_are_named(kvsim_command, command, recorded, trace):
    log = recorded[0]
    trace.unlink()
    write(dataclasses.replace(log, extra={"ttft_ms": log.extra["ttft_ms"]}), trace)
    notes = kvsim_command.json(*command)["notes"]
    assert "l0_tokens, matched_l1, matched_l2, loaded_tokens" in notes[0]
    assert "queue_ms, load_ms, prefill_ms" in notes[1]
    assert "does not record queue_ms" in " ".join(kvsim_command.shown(*command).split())


def test_a_log_without_ttft_is_refused(kvsim_command, command, recorded, trace):
    trace.unlink()
    write(recorded[1], trace)
    assert "no ttft_ms column" in kvsim_command.refused(*command)


def test_bad_settings(kvsim_command, command, tmp_path):
    for arguments, word in (
        ((*command, "--chunk-tokens", 24), "24 is no multiple of the log's block of 16"),
        ((*command, "--fit-share", 1), "--fit-share 1"),
        ((*command, "--fit-share", 0.99), "a comparison needs"),
        ((*command, "--report", tmp_path / "no" / "r.html"), "no folder"),
        ((*command, "--journal", tmp_path), "no journal in"),
        ((*command, "--l0-block-tokens", 0), "--l0-block-tokens is 0"),
    ):
        assert word in kvsim_command.refused(*arguments), arguments


def test_the_journal_is_decided_again_beside(kvsim_command, command, tmp_path):
    config = CoreConfig(tiers=(TierConfig(name="l1", pages=3),))
    core, writer = Core(config), JournalWriter(tmp_path / "journal", Head(config=config, meta={}))
    event = InstanceRegistered(now_ns=0, instance="i", chunk_pages=1)
    writer.step(event, core.handle(event))
    writer.close()
    found = kvsim_command.json(*command, "--journal", tmp_path / "journal")
    assert found["journal"] == {"equal": True, "segments": 1, "steps": 1}
