"""`kvsim tune` with the flags of the simulation."""

import json
import re

import pytest

from kvtraces import read

COSTS = ("--model", "qwen3-8b", "--gpu", "h100")


@pytest.fixture
def command(chat_trace):
    return ("tune", "--trace", chat_trace, *COSTS, "--policies", "lru", "--chunk-sizes", "128", "--l1-points", 4)


def test_the_settings_are_those_of_run_alone(kvsim_command, command, chat_trace):
    found = kvsim_command.json(*command, "--simulate", 2, "--rate-scale", 3, "--l0-gb", 8, "--max-model-len", 6000)
    simulated = found["simulated"]
    assert [one["l1_size_gb"] for one in simulated["no_cache"]] == [0]
    assert len(simulated["settings"]) == 2
    assert simulated["max_model_len"] == 6000
    for one in simulated["settings"]:
        given = ("--chunk-tokens", 128, "--l1-size-gb", one["l1_size_gb"], "--l0-gb", 8, "--max-model-len", 6000)
        alone = kvsim_command.json("run", "--trace", chat_trace, *COSTS, *given, "--rate-scale", 3)
        assert alone["ttft_s"] == one["ttft_s"]
        assert alone["ttft_no_cache_s"] == simulated["no_cache"][0]["ttft_s"]
        assert alone["refused_requests"] == one["refused_requests"] > 0
    chosen = simulated["chosen"]
    assert found["recommendation"]["l1_size_gb"] == chosen["l1_size_gb"]
    assert found["recommendation"]["ttft_p95_s"] == round(chosen["ttft_s"]["p95"], 9)


@pytest.mark.parametrize(
    "flags",
    [
        ("--engines", "2"),
        ("--rate-scale", 1),
        ("--slo-ttft-p95", 5),
        ("--l2-sizes-gb", "0,20"),
        ("--price-gpu-hour", 2),
        ("--max-num-seqs", 64),
        ("--max-num-seqs", 256),  # the default, but said
        ("--l0-gb", 3),
    ],
)
def test_any_of_the_flags_asks_for_it(kvsim_command, command, flags):
    assert kvsim_command.json(*command, "--l1-points", 2, *flags)["simulated"]["settings"]


def test_none_of_them_asks_for_nothing(kvsim_command, command):
    plain = kvsim_command.json(*command)
    assert "simulated" not in plain
    assert plain == kvsim_command.json(*command, "--simulate", 0)


def test_for_a_person(kvsim_command, command):
    priced = ("--price-gpu-hour", 2, "--price-ram-gb-hour", 0.01, "--l2-sizes-gb", "0,50", "--engines", "1,2")
    shown = kvsim_command.shown(*command, "--simulate", 2, *priced, "--slo-ttft-p95", 0.5)
    for word in ("Simulated under load", "eng.", "L2 GiB", "cost", "met", "none"):
        assert word in shown
    assert "A million prompt tokens cost" in " ".join(shown.split())


@pytest.mark.parametrize("terminal", [False, True])
def test_no_figure_is_cut(kvsim_command, command, terminal, request):
    """Into a pipe every column is told, whatever its width is; on a terminal of 80 those that fit."""
    if terminal:
        request.getfixturevalue("narrow")
    priced = ("--price-gpu-hour", 2, "--l2-sizes-gb", "0,500", "--engines", "1,2,3", "--policies", "w-tinylfu")
    shown = kvsim_command.shown(*command, "--simulate", 2, *priced, "--slo-ttft-p95", 5, "--max-model-len", 6000)
    assert "…" not in shown
    lines = shown.splitlines()
    (heading,) = [line for line in lines if "eng." in line]
    rows = lines[lines.index(heading) + 2 :][: 3 + 2 * 2 * 3]
    assert "cost" in heading
    assert all((column in heading) == (not terminal) for column in ("TTFT p50", "queue p95", "GPU", "refused"))
    assert all(re.search(r" (met for \d+|missed|-) +[\d.-]+ *$", row) for row in rows)
    assert max(map(len, lines)) <= (80 if terminal else 160)


def test_progress_is_shown(kvsim_command, command):
    assert "simulating" in kvsim_command(*command, "--simulate", 2, "--json", "--progress")[2]


def test_the_report_has_them(kvsim_command, command, tmp_path):
    pytest.importorskip("plotly")
    path = tmp_path / "r.html"
    found = kvsim_command.json(*command, "--simulate", 2, "--report", path)
    data = json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), flags=re.DOTALL).group(1))
    assert data["simulated"] == found["simulated"]


@pytest.mark.parametrize("limit", [("--max-model-len", 2000), ("--l0-gb", 2000.5 * 147_456 / 2**30)])
def test_refused_requests_are_told_and_a_target_is_not_called_met_for_them(kvsim_command, command, chat_trace, limit):
    log = read(chat_trace)
    count = int((log.input_tokens + log.output_tokens > 2000).sum())
    assert 0 < count < len(log)
    given = (*command, "--simulate", 1, *limit, "--slo-ttft-p95", 5, "--rate-scale", 0.01)
    found = kvsim_command.json(*given)["recommendation"]
    assert found["refused_requests"] == count
    assert any(f"{count} of 400 requests refused" in note for note in found["notes"])
    assert found["meets_slo"]
    assert f"not counting {count} of 400 requests" in found["reason"]
    shown = " ".join(kvsim_command.shown(*given).replace("│", " ").split())
    assert f"met for {400 - count}" in shown
    assert f"but for {count} requests refused" in shown
    panel = shown[shown.index("Recommendation") :]
    assert panel.index(f"{count} of 400 requests refused by the engine") < panel.index("Simulated under")


def test_what_the_simulations_refuse_is_not_in_the_sweep_either(kvsim_command, command):
    limit = ("--max-model-len", 2000)
    simulated, plain = (kvsim_command.json(*command, *limit, "--simulate", count) for count in (1, 0))
    assert simulated["sweep"] == plain["sweep"]
    assert simulated["simulated"]["refused_requests"] == simulated["log"]["refused_requests"] > 0
    assert simulated["log"] == plain["log"]


def test_a_log_of_which_nothing_can_be_simulated_is_refused(kvsim_command, command):
    for flag in (("--rate-scale", 1), ("--slo-ttft-p95", 2), ("--simulate", 0)):
        assert "every request is refused, all 400: longer" in kvsim_command.refused(
            *command, *flag, "--max-model-len", 10
        )


def test_bad_settings(kvsim_command, command):
    for arguments, word in (
        (("--simulate", -1), "--simulate -1: at least 1"),
        (("--l2-sizes-gb", 1e300), "--l2-sizes-gb"),
        (("--price-gpu-hour", 1e300), "--price-gpu-hour 1e+300"),
        (("--simulate", 0, "--rate-scale", 2), "--simulate 0"),
        (("--engines", "two"), "whole numbers"),
        (("--engines", "1,0"), "engines is 0"),
        (("--rate-scale", -1), "--rate-scale is -1"),
        (("--slo-ttft-p95", 0), "--slo-ttft-p95 0"),
        (("--l2-sizes-gb", "-5"), "--l2-sizes-gb"),
        (("--price-disk-gb-hour", -1), "--price-disk-gb-hour -1"),
        (("--routing", "recorded", "--simulate", 1), "no instance column"),
    ):
        assert word in kvsim_command.refused(*command, *arguments), arguments
