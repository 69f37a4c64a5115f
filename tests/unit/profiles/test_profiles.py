import json
import math
from pathlib import Path

import numpy as np
import pytest

import kvsim
from kvsim.profiles import Grid, PrefillFit, ProfileError, TransferCurve, available, load, lookup
from kvsim.profiles.load import to_json
from kvtraces import read

CHAT = Path(__file__).resolve().parents[3] / "traces" / "data" / "chat.jsonl.gz"


def grid() -> Grid:
    return Grid((1, 10, 100), (0, 99, 999), ((1.0, 2.0, 4.0), (10.0, 20.0, 40.0), (100.0, 200.0, 400.0)))


def test_a_grid_is_exact_at_its_points_and_linear_between_them():
    g = grid()
    for i, x in enumerate(g.x):
        for j, y in enumerate(g.y):
            assert g.at(x, y) == pytest.approx(g.seconds[i][j], rel=1e-12)
    assert g.at(37, 0) == pytest.approx(37, rel=1e-12)
    assert g.at(1, 33) == pytest.approx(1 + 33 / 99, rel=1e-12)
    assert g.at(55, 549) == pytest.approx(55 * 3, rel=1e-12)


def test_costs_that_are_linear_in_each_count_are_exact_everywhere():
    def cost(x, y):
        return 6.0 + 0.02 * x + 0.003 * x * y

    g = Grid((1, 4, 64), (16, 2048, 8192), tuple(tuple(cost(x, y) for y in (16, 2048, 8192)) for x in (1, 4, 64)))
    for x, y in ((2, 100), (17, 4000), (64, 8192), (200, 3000), (3, 50_000), (300, 50_000)):
        assert g.at(x, y) == pytest.approx(cost(x, y), rel=1e-12)


def test_beyond_a_disturbed_grid_no_step_is_faster_than_its_last_points():
    g = Grid((1, 2), (0, 10), ((1.0, 0.9), (3.0, 2.5)))
    assert g.at(1, 1000) == pytest.approx(0.9)
    assert g.at_array(1, 1000) == pytest.approx(0.9)


def test_a_grid_goes_on_with_its_slope_above_and_stays_below():
    g = grid()
    assert g.at(1000, 0) == pytest.approx(1000)
    assert g.at(0.5, 0) == pytest.approx(1.0)
    assert g.at(0, 0) == pytest.approx(1.0)
    assert not g.beyond(100, 999)
    assert g.beyond(101, 0)
    assert g.beyond(1, 1000)


def test_the_array_form_agrees_with_the_scalar_form():
    rng = np.random.default_rng(1)
    profile = lookup("qwen3-8b", "h100")
    new, cached = rng.integers(0, 60_000, 300), rng.integers(0, 200_000, 300)
    cached[:50] = 0
    one_by_one = [profile.prefill_s(int(n), int(c)) for n, c in zip(new, cached, strict=True)]
    np.testing.assert_allclose(profile.prefill_s_array(new, cached), one_by_one, rtol=1e-12)
    grid_of_profile = profile.prefill
    assert [
        grid_of_profile.row(n)(c) for n, c in zip(new.tolist(), cached.tolist(), strict=True) if n
    ] == pytest.approx([one for n, one in zip(new.tolist(), one_by_one, strict=True) if n], rel=1e-12)
    assert profile.prefill_s_array(np.ones((2, 3)), 5).shape == (2, 3)
    curve = profile.transfers["h2d"]
    np.testing.assert_allclose(curve.at_array(new), [curve.at(int(n)) for n in new])


@pytest.mark.parametrize(
    ("x", "y", "seconds"),
    [
        ((1,), (0, 1), ((1.0, 1.0),)),
        ((2, 1), (0, 1), ((1.0, 1.0), (1.0, 1.0))),
        ((0, 1), (0, 1), ((1.0, 1.0), (1.0, 1.0))),
        ((1, 2), (0, 1), ((1.0, 1.0),)),
        ((1, 2), (0, 1), ((1.0, 0.0), (1.0, 1.0))),
        ((1, 2), (0, 1), ((1.0, math.inf), (1.0, 1.0))),
    ],
)
def test_a_grid_that_cannot_be_interpolated_is_refused(x, y, seconds):
    with pytest.raises(ValueError, match="grid"):
        Grid(x, y, seconds)


def test_the_fit_has_a_floor_and_an_attention_term():
    fit = PrefillFit(floor_s=1.0, base_s=0.5, linear_s=0.1, quadratic_s=0.01)
    assert fit.at(1, 0) == 1.0
    assert fit.at(10, 20) == pytest.approx(0.5 + 1 + 0.01 * 10 * 50)
    np.testing.assert_allclose(fit.at_array([1, 10], [0, 20]), [1.0, 6.5])


def test_a_transfer_takes_its_measured_time_and_then_the_last_rate():
    curve = TransferCurve(sizes=(100, 1000), bytes_per_s=(50.0, 100.0), latency_s=1.0)
    assert curve.at(0) == 0
    assert curve.at(100) == pytest.approx(2)
    assert curve.at(1000) == pytest.approx(10)
    assert curve.at(550) == pytest.approx(6)
    assert curve.at(2000) == pytest.approx(20)
    with pytest.raises(ValueError, match="less time"):
        TransferCurve(sizes=(100, 200), bytes_per_s=(1.0, 100.0))


def test_every_shipped_profile_says_where_it_comes_from_and_is_monotone():
    profiles = available()
    assert {(p.model, p.gpu, p.tensor_parallel) for p in profiles} >= {
        ("qwen3-8b", "h100", 1),
        ("qwen3-1.7b", "h100", 1),
        ("qwen3-8b", "h200", 1),
        ("qwen3-32b", "h100", 2),
        ("llama-3.1-8b", "h100", 1),
    }
    for p in profiles:
        assert set(p.provenance) >= {"prefill", "prefill_fit", "decode", "pcie", "disk", "network", "handling"}
        assert all(part.source and part.error and part.kind for part in p.provenance.values())
        assert p.prefill is not None
        for costs in (p.prefill, p.decode):
            table = np.array(costs.seconds)
            assert (np.diff(table, axis=1) >= 0).all()
        assert (np.diff(np.array(p.prefill.seconds), axis=0) >= 0).all()


def test_the_h100_profile_agrees_with_the_ttfts_measured_there():
    profile = lookup("Qwen3-8B", "H100")

    def ttft(new: int, cached: int) -> float:
        done = took = 0
        while done < new:
            step = min(8192, new - done)
            took += profile.prefill_s(step, cached + done)
            done += step
        return took + profile.handling_s(new + cached)

    for new, cached, measured, within in (
        (2_048, 0, 0.053, 0.12),  # eager
        (8_192, 0, 0.222, 0.12),
        (32_000, 0, 1.247, 0.12),
        (8_192, 0, 0.2185, 0.05),  # vLLM alone in benchmarks/results/ttft-graphs-earlier-h100.json, of another day
        (32_000, 0, 1.2233, 0.05),
        (16, 8_176, 0.0202, 0.2),  # 19% short: its handling is an engine's in process, not a server's
        (16, 31_984, 0.0345, 0.12),
    ):
        assert ttft(new, cached) == pytest.approx(measured, rel=within)
    assert profile.kv_bytes(256) == 36 * 2**20
    assert float(profile.transfer_s(2**30, "h2d")) == pytest.approx(2**30 / 54.9e9)


def test_an_unknown_model_or_gpu_lists_what_there_is():
    with pytest.raises(ProfileError, match=r"no profile of qwen3-8b on b200.*qwen3-8b on h200") as caught:
        lookup("qwen3-8b", "b200")
    assert "\n" not in str(caught.value)


def test_extrapolation_is_told_with_the_range():
    profile = lookup("llama-3.1-8b", "h100")
    assert profile.extrapolation(8192, 1000) is None
    assert "0 to 131,072 cached" in str(profile.extrapolation(8192, 200_000))


def test_a_profile_survives_its_file(tmp_path):
    for profile in available():
        path = tmp_path / "p.json"
        path.write_text(to_json(profile))
        assert load(path) == profile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode": None}, "p.json"),
        ({"format": 9}, "format"),
        ({"duplex": 0}, "duplex"),
        ({"sustained": 0.99}, "sustained"),
        ({"sustained": math.inf}, "sustained"),
        ({"speed": 3}, "speed"),
        ({"transfers": {}}, "h2d and d2h"),
    ],
)
def test_a_broken_profile_is_one_line_that_names_the_file(tmp_path, change, message):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(json.loads(to_json(available()[0])) | change))
    with pytest.raises(ProfileError, match=message) as caught:
        load(path)
    assert "p.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_field_a_missing_file_and_no_json_are_errors(tmp_path):
    path = tmp_path / "p.json"
    data = json.loads(to_json(available()[0]))
    del data["layers"], data["prefill"]
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match="prefill"):
        load(path)
    path.write_text("{")
    with pytest.raises(ProfileError, match="not JSON"):
        load(path)
    with pytest.raises(ProfileError, match="nowhere"):
        load(tmp_path / "nowhere.json")


def test_a_profile_of_a_busy_machine_warns_wherever_times_are_told():
    """The shipped one of the small model is one, whose steps are launching mostly."""
    log = read(CHAT)
    for model, doubted in (("qwen3-1.7b", True), ("qwen3-8b", False)):
        costs = kvsim.costs(model=model, gpu="h100")
        settings = kvsim.RunSettings(profile=costs.run_profile, l1_gb=1.0, chunk_tokens=256)
        ran = kvsim.run(log, settings, baseline=False)
        tuned = kvsim.tune(log, costs, chunk_sizes=[256], l1_sizes_gb=[1.0])
        for told in (ran.warnings, tuned.notes):
            assert any("measure again" in one for one in told) == doubted


def test_the_load_cost_of_the_core_is_the_fit():
    profile = lookup("qwen3-8b", "h100")
    cost = profile.load_cost(256, ("disk",))
    assert cost.prefill_ns(8192, 1000) == pytest.approx(1e9 * profile.prefill_fit.at(8192, 1000))
    assert cost.bytes_per_s == (54.9e9, 1.5e9)
