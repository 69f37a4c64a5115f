"""`kvsim calibrate` against an engine over HTTP, and one in a child process."""

import json

import pytest

from kvsim.profiles import load

FACTS = ("--model", "qwen3-8b", "--gpu", "h100")
SMALL = ("--max-num-batched-tokens", 256, "--max-num-seqs", 2, "--repeats", 1)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "mine.json"


@pytest.fixture
def command(served, out):
    return ("calibrate", "--url", served.url, *FACTS, *SMALL, "--out", out)


def test_a_profile_is_written_that_the_others_take(kvsim_command, command, served, out, chat_trace):
    found = kvsim_command.json(*command)
    profile = load(out)
    assert found["profile"] == str(out)
    assert found["sustained"] == profile.sustained == 1
    assert (profile.name, profile.model, profile.gpu) == ("h100-qwen3-8b", "qwen3-8b", "h100")
    assert profile.max_model_len == served.max_model_len
    assert profile.kv_bytes_per_token == 147_456
    assert profile.weight_bytes == 16_381_470_720
    assert {"h2d", "d2h", "disk_read"} <= set(profile.transfers)
    assert 0.001 < profile.decode_step_s(1, 16) < 0.02
    assert list(out.parent.iterdir()) == [out]
    run = kvsim_command.json("run", "--trace", chat_trace, "--profile", out, "--l1-size-gb", 10)
    assert run["settings"]["profile"] == "h100-qwen3-8b"
    assert run["refused_requests"] > 0
    swept = kvsim_command.json("tune", "--trace", chat_trace, "--profile", out, "--policies", "lru", "--l1-points", 2)
    assert swept["profile"]["name"] == "h100-qwen3-8b"


def test_the_link_is_that_of_a_connectors_copies_unless_it_is_given(kvsim_command, command, served, out):
    assert kvsim_command.json(*command)
    assert load(out).provenance["pcie"].kind == "assumed"
    served.metrics = "".join(
        f'vllm:kvcore_{name}_total{{engine="0"}} {value}\n'
        for name, value in (("loaded_bytes", 3e9), ("load_seconds", 0.1), ("stored_bytes", 4e9), ("store_seconds", 0.1))
    )
    kvsim_command.json(*command)
    profile = load(out)
    assert [profile.transfers[way].peak_bytes_per_s for way in ("h2d", "d2h")] == pytest.approx([30e9, 40e9])
    assert profile.provenance["pcie"].kind == "measured"
    kvsim_command.json(*command, "--link-gb-s", 9)
    assert load(out).transfers["h2d"].peak_bytes_per_s == pytest.approx(9e9)


def test_one_that_was_interrupted_goes_on(kvsim_command, command, served, out):
    served.answers = 10
    assert "run the same again to go on" in kvsim_command.refused(*command)
    state = out.with_name("mine.json.partial")
    assert str(state) in kvsim_command.refused(*command)
    kept = len(state.read_text().splitlines()) - 1
    assert kept > 3
    assert not out.exists()
    served.answers, served.asked = None, 0
    assert "decode" in kvsim_command.shown(*command)
    resumed = served.asked
    assert load(out)
    assert not state.exists()
    served.asked = 0
    kvsim_command.shown(*command)
    assert resumed <= served.asked - kept + 2


def test_progress_names_the_points(kvsim_command, command):
    shown = kvsim_command(*command, "--progress")[2]
    assert "measuring" in shown
    assert "decode of" in shown


def test_nothing_there(kvsim_command, out):
    err = kvsim_command.refused("calibrate", "--url", "http://127.0.0.1:9", *FACTS, "--out", out)
    assert "http://127.0.0.1:9" in err
    assert "refused" in err
    assert not list(out.parent.iterdir())


def test_a_server_that_does_not_say_how_long(kvsim_command, command, served, out):
    served.max_model_len = None
    assert "--max-model-len is needed" in kvsim_command.refused(*command)
    assert kvsim_command(*command, "--max-model-len", 1500)[0] == 0
    assert load(out).max_model_len == 1500


def test_facts_that_nothing_knows_are_asked_for(kvsim_command, command, out):
    for arguments, word in (
        ((*command, "--gpu", "h999"), "--gpu-memory-gb and --link-gb-s"),
        ((*command, "--gpu", "cpu"), "--gpu cpu needs --gpu-memory-gb"),
        ((*command, "--model", "qwen3-4b"), "--weight-gb is needed"),
        ((*command, "--weight-gb", -1), "--weight-gb -1"),
        ((*command, "--max-num-seqs", 1), "two values on each axis"),
        ((*command, "--model", "qwen3-9b"), "did you mean"),
    ):
        assert word in kvsim_command.refused(*arguments), arguments
    given = ("--gpu", "mine", "--gpu-memory-gb", 10, "--link-gb-s", 8, "--model", "qwen3-4b", "--weight-gb", 7.5)
    assert kvsim_command(*command, *given)[0] == 0
    profile = load(out)
    assert (profile.gpu, profile.gpu_memory_bytes, profile.weight_bytes) == ("mine", 10 * 2**30, int(7.5 * 2**30))
    assert profile.transfers["h2d"].at(8e9) == pytest.approx(1)


def test_copies_of_a_cpu_are_measured(kvsim_command, command, out):
    assert kvsim_command(*command, "--gpu", "cpu", "--gpu-memory-gb", 4)[0] == 0
    profile = load(out)
    assert profile.provenance["pcie"].kind == "measured"
    assert 1e8 < profile.transfers["h2d"].peak_bytes_per_s < 1e12


def test_bad_arguments(kvsim_command, command, out, tmp_path):
    bare = ("calibrate", "--out", out)
    for arguments, word in (
        ((*bare, *FACTS), "--url or --local: give one"),
        ((*command, "--local", "tiny"), "--url or --local: give one"),
        ((*bare, "--url", "localhost:8000", *FACTS), "not an http:// or https:// address"),
        ((*bare, "--url", "http://127.0.0.1:9", "--gpu", "h100"), "--model and --gpu"),
        ((*bare, "--local", "tiny", "--gpu", "h100"), "--local needs --max-model-len"),
        ((*command, "--engine-arg", "a=1"), "go with --local"),
        ((*bare, "--local", "tiny", "--gpu", "h100", "--engine-arg", "eager"), "key=value"),
        ((*command[:-1], tmp_path / "no" / "p.json"), "no folder"),
    ):
        assert word in kvsim_command.refused(*arguments), arguments


VLLM = """
import time
class EngineArgs:
    def __init__(self, **arguments):
        assert arguments["enforce_eager"] is True and arguments["max_model_len"] == 1200, arguments
        assert arguments["max_num_seqs"] == 256, arguments  # a server's, for its CUDA graphs; 2 are measured
class SamplingParams:
    def __init__(self, max_tokens, **_):
        self.tokens = max_tokens
class LLMEngine:
    @classmethod
    def from_engine_args(cls, arguments):
        return cls()
    def __init__(self):
        self.live = {}
    def add_request(self, name, prompt, sampling):
        self.live[name] = [0, sampling.tokens]
    def has_unfinished_requests(self):
        return bool(self.live)
    def step(self):
        time.sleep(0.0005)
        for state in self.live.values():
            state[0] += 1
        outputs = [
            type("Output", (), {"request_id": name, "outputs": [type("One", (), {"token_ids": [0] * state[0]})]})
            for name, state in self.live.items()
        ]
        self.live = {name: state for name, state in self.live.items() if state[0] < state[1]}
        return outputs
"""


def test_vllm_in_a_child(kvsim_command, out, tmp_path, monkeypatch):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "vllm.py").write_text(VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    model = tmp_path / "tiny"
    model.mkdir()
    config = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 64, "torch_dtype": "float32"}))
    (model / "model.safetensors").write_bytes(b"0" * 1000)
    local = ("--local", model, "--max-model-len", 1200, "--engine-arg", "enforce_eager=true")
    code, _, err = kvsim_command("calibrate", *local, "--gpu", "h100", *SMALL, "--out", out)
    assert code == 0, err
    profile = load(out)
    assert (profile.weight_bytes, profile.kv_bytes_per_token) == (1000, 2 * 2 * 2 * 16 * 4)
    assert "vLLM in process" in profile.provenance["prefill"].source
    assert "one measurement a point" in profile.provenance["prefill"].error
