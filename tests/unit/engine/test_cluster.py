"""Simulations on a Ray cluster, which is one of this machine here."""

import subprocess
import sys

import numpy as np
import pytest

from kvsim import RunSettings, costs, run_many
from kvsim.engine.settings import SettingsError
from kvtraces import Chat, generate, write

ray = pytest.importorskip("ray")
PROFILE = costs(model="qwen3-8b", gpu="h100").run_profile
LOG = generate(Chat(requests=60, seed=3, block_tokens=16))


def settings(**chosen):
    return RunSettings(profile=PROFILE, chunk_tokens=64, l0_gb=6.0, l1_gb=4.0, **chosen)


def tune(log, *flags):
    """`kvsim tune` in a process that belongs to no cluster."""
    command = [sys.executable, "-m", "kvsim", "tune", "--trace", str(log), "--json", "--simulate", "1"]
    command += ["--model", "qwen3-8b", "--gpu", "h100", "--chunk-sizes", "64", "--l1-sizes-gb", "4", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


def test_clusters_of_this_machine(tmp_path):
    # In one test, one after the other: whoever looks for a cluster finds that of another test, too.
    log = tmp_path / "log.jsonl"
    write(LOG, log)
    assert_there_is_none(tune(log, "--ray", "auto"))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:  # this process belongs to one, as a notebook may
        assert_results_are_those_of_this_process()
        with pytest.raises(SettingsError, match="nonsense"):
            run_many(LOG, [settings(), settings(policy="nonsense")], cluster="auto")
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    there, here = tune(log, "--ray", "local"), tune(log)  # one is started for it
    assert (there.returncode, there.stderr) == (0, "")
    assert there.stdout == here.stdout
    assert_there_is_none(tune(log, "--ray", "auto"))  # and was ended


def assert_there_is_none(ended):
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("kvsim: error: no Ray cluster at 'auto': ")
    assert ended.stderr.count("\n") == 1


def assert_results_are_those_of_this_process():
    chosen = [settings(policy=policy, rate_scale=scale) for policy in ("lru", "fifo") for scale in (1.0, 2.0)]
    calls = []
    there = run_many(LOG, chosen, cluster="auto", progress=lambda done, total: calls.append((done, total)))
    here = run_many(LOG, chosen, workers=1)
    assert calls == [(done, 4) for done in range(5)]
    for one, other in zip(there, here, strict=True):
        assert one.settings == other.settings
        for name, values in other.columns.items():
            assert np.array_equal(one.columns[name], values, equal_nan=values.dtype.kind == "f"), name
