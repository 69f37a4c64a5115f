"""MLA with tensor parallelism: every rank holds the KV, and one stores it; sweep and engine model count it alike."""

import dataclasses

import numpy as np
import pytest

from kvsim.calibration.facts import gather
from kvsim.engine.settings import GIB
from kvsim.engine.simulation import prepare, simulate
from kvsim.profiles import TransferCurve, lookup
from kvsim.profiles.load import ProfileError, from_json, to_json
from kvsim.report.run_words import setting_facts
from kvsim.runner import run
from kvsim.tuner import costs
from kvsim.tuner.pricing import kv_size

RANKS = 8
HIT, PROMPT = 32_768, 33_000
LINKS = TransferCurve(sizes=(8 << 20, 8 << 30), bytes_per_s=(2e11, 4e11), latency_s=1e-5)


def profile(**changes):
    facts = gather("deepseek-v3", "h200", max_model_len=65_536, tensor_parallel=RANKS, weight_gb=640)
    wanted = {
        "name": "mla",
        "model": "deepseek-v3",
        "gpu": "h200",
        "tensor_parallel": RANKS,
        "layers": facts.layers,
        "kv_bytes_per_token": facts.kv_bytes_per_token,
        "weight_bytes": facts.weight_bytes,
        "gpu_memory_bytes": facts.gpu_memory_bytes,
        "max_model_len": facts.max_model_len,
        "transfers": {**facts.transfers, "h2d": LINKS, "d2h": LINKS},
        "kv_copies": facts.kv_copies,
    }
    return dataclasses.replace(lookup("qwen3-8b", "h100"), **(wanted | changes))


@pytest.fixture(params=["model", "profile", "older"])
def priced(request, tmp_path):
    """The costs with the model named, or of a profile that says it, or of one from before profiles did."""
    path = tmp_path / "mla.json"
    text = to_json(profile())
    if request.param == "older":
        text = text.replace('"kv_copies": 8', '"kv_copies": 1')
    path.write_text(text)
    return costs(profile=path, model="deepseek-v3" if request.param == "model" else None)


def test_the_sweep_and_the_engine_count_the_same_copies(priced, make_log, make_settings):
    stored = kv_size("deepseek-v3").stored_bytes_per_token
    assert priced.kv.stored_bytes_per_token == stored
    assert priced.kv.moved_bytes_per_token == RANKS * stored
    shared = list(range(HIT // 256))
    log = make_log([0, 100], [PROMPT, PROMPT], chains=[shared, shared], block=256)
    settings = make_settings(priced.run_profile, l1_gb=100.0, chunk_tokens=256, l0_prefix_caching=False, load="sync")
    result = run(log, settings)
    assert result.columns["loaded_tokens"].tolist() == [0, HIT]
    swept = priced.profile.transfer_s(np.array([HIT * priced.kv.moved_bytes_per_token]), "h2d")
    assert result.columns["load_s"][1] == pytest.approx(float(swept[0]), rel=1e-9)
    ttft = priced.load_s(np.array([PROMPT]), np.array([HIT]))
    assert result.columns["ttft_s"][1] == pytest.approx(float(ttft[0]), rel=1e-6)
    # Every rank is sent the hit; one of them writes what is stored, once.
    assert result.copied_bytes["pcie_h2d"] == RANKS * HIT * stored
    assert result.copied_bytes["pcie_d2h"] == HIT * stored


def test_a_store_takes_one_ranks_link(priced, make_log, make_settings):
    log = make_log([0], [PROMPT], chains=[range(HIT // 256)], block=256)
    finished = simulate(prepare(log, 256), make_settings(priced.run_profile, l1_gb=100.0, chunk_tokens=256))
    size = HIT * priced.kv.stored_bytes_per_token
    (engine,) = finished.engines
    assert engine.link.bytes[1] == size
    assert engine.link.busy_s[1] == pytest.approx(
        LINKS.at(RANKS * size)
    )  # as long as all ranks' links take for as much


def test_the_gpu_holds_what_every_rank_can_hold(priced, make_settings):
    settings = make_settings(priced.run_profile, l1_gb=1.0)
    free = 0.9 * settings.profile.gpu_memory_bytes - settings.profile.weight_bytes - 2 * GIB
    latent = kv_size("deepseek-v3").stored_bytes_per_token
    assert settings.l0_blocks == int(free / RANKS / latent // 16)
    assert dict(setting_facts(settings, 256))["L0"].startswith(f"{free / GIB:.0f} GiB")


def test_load_or_recompute_counts_what_a_load_brings_to_every_rank(priced):
    cost = priced.run_profile.load_cost(256, ("disk",))
    stored = HIT * priced.kv.stored_bytes_per_token
    assert cost.load_ns((stored,), stored) == pytest.approx(1e9 * (1e-5 + 2 * RANKS * stored / LINKS.peak_bytes_per_s))
    assert cost.bytes_per_s[1] == priced.profile.transfers["disk_read"].peak_bytes_per_s


def test_a_profile_says_how_many_ranks_hold_the_same():
    assert from_json(to_json(profile()), "mla") == profile()
    assert gather("qwen3-8b", "h100", max_model_len=1000).kv_copies == 1
    with pytest.raises(ProfileError, match="kv_copies is 1, or that of all 8 ranks"):
        from_json(to_json(profile()).replace('"kv_copies": 8', '"kv_copies": 3'), "mla")
