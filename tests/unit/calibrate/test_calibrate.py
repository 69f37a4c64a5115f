import contextlib
import http.server
import json
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from kvsim.calibration import (
    CalibrationError,
    EndpointError,
    Facts,
    HttpEndpoint,
    LocalEndpoint,
    Plan,
    calibrate,
    linked,
    make_plan,
)
from kvsim.calibration.endpoint import step_s
from kvsim.profiles import Part, TransferCurve, load, lookup
from kvsim.profiles.load import to_json

CURVE = TransferCurve(sizes=(1,), bytes_per_s=(1e9,))
FACTS = Facts(
    name="test",
    model="test",
    gpu="test",
    layers=4,
    kv_bytes_per_token=100,
    weight_bytes=0,
    gpu_memory_bytes=10**9,
    max_model_len=20_000,
    transfers={"h2d": CURVE, "d2h": CURVE},
    transfers_from=Part(kind="assumed", source="a test", error="unknown"),
)
PLAN = make_plan(max_model_len=20_000, max_num_batched_tokens=4096, max_num_seqs=8)


class Engine:
    """An engine with a prefix cache whose times are known forms."""

    model = "known"
    where = "here"
    handling = (0.01, 1e-6)

    def __init__(self, fail_after=None):
        self.cached = []
        self.calls = 0
        self.fail_after = fail_after

    def step(self, batch, context):
        return 2e-3 + 1e-4 * batch + 1e-8 * batch * context

    def first_token_s(self, prompt):
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise EndpointError("here: gone")
        cached = max((common(prompt, old) for old in self.cached), default=0) // 16 * 16
        cached = min(cached, (len(prompt) - 1) // 16 * 16)
        self.cached = [*[old for old in self.cached if common(prompt, old) >= 16][-3:], list(prompt)]
        new = len(prompt) - cached
        compute = max(self.step(1, len(prompt)), 1e-3 + 2e-5 * new + 1e-9 * new * (new + 2 * cached))
        return self.handling[0] + self.handling[1] * len(prompt) + compute

    def decode_step_s(self, prompts, steps):
        self.calls += 1
        return self.step(len(prompts), len(prompts[0]))


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_a_known_engine_is_found_again():
    profile = calibrate(Engine(), PLAN, FACTS)
    assert profile.handling_base_s == pytest.approx(0.01, rel=0.05)
    assert profile.handling_token_s == pytest.approx(1e-6, rel=0.05)
    for new, cached in ((512, 0), (2048, 4096), (4096, 1024)):
        assert profile.prefill_s(new, cached) == pytest.approx(
            1e-3 + 2e-5 * new + 1e-9 * new * (new + 2 * cached), rel=0.1
        )
    assert profile.prefill_s(1500, 2000) == pytest.approx(1e-3 + 3e-2 + 1e-9 * 1500 * 5500, rel=0.1)
    assert profile.prefill_fit.quadratic_s == pytest.approx(1e-9, rel=0.2)
    for batch, context in ((1, 16), (8, 4096), (3, 2000)):
        assert profile.decode_step_s(batch, context) == pytest.approx(Engine().step(batch, context), rel=0.05)


def test_points_that_do_not_fit_follow_the_form():
    profile = calibrate(Engine(), PLAN, FACTS)
    assert (4096, 16_384) not in PLAN.prefill
    want = 1e-3 + 2e-5 * 4096 + 1e-9 * 4096 * (4096 + 2 * 16_384)
    assert profile.prefill_s(4096, 16_384) == pytest.approx(want, rel=0.15)


def test_what_is_made_can_be_kept(tmp_path):
    profile = calibrate(Engine(), PLAN, FACTS)
    (tmp_path / "p.json").write_text(to_json(profile))
    assert load(tmp_path / "p.json") == profile
    assert all(part.source and part.error for part in profile.provenance.values())


@pytest.mark.parametrize(("more", "warned"), [(0.0, False), (0.1, False), (0.4, True)])
def test_a_machine_that_was_busy_shows_in_the_profile(more, warned):
    class Busy(Engine):
        def first_token_s(self, prompt):
            return super().first_token_s(prompt) * (1 + more * (self.calls % 2))

        def decode_step_s(self, prompts, steps):
            return super().decode_step_s(prompts, steps) * (1 + more * (self.calls % 2))

    profile = calibrate(Busy(), PLAN, FACTS)
    part = profile.provenance["prefill"]
    assert f"spread by {100 * part.spread:.1f}%" in part.error
    assert (part.spread > 0) == (more > 0)
    assert (profile.doubt() is not None) == warned


def test_progress_names_every_point():
    seen = []
    calibrate(Engine(), PLAN, FACTS, progress=lambda *row: seen.append(row))
    total = PLAN.repeats * len(PLAN.prefill) + 1 + len(PLAN.decode)
    assert [done for done, _, _ in seen] == list(range(total + 1))
    assert sum("without rest" in what for _, _, what in seen) == 1
    assert "behind" in seen[0][2]
    assert "decode" in seen[-2][2]


def test_prefills_are_measured_in_rounds():
    engine = Engine()
    asked = []
    inner = engine.first_token_s
    engine.first_token_s = lambda prompt: asked.append(len(prompt)) or inner(prompt)
    plan = Plan(prefill=((1, 0), (256, 0), (1, 512), (256, 512)), decode=PLAN.decode, repeats=3, least_s=0)
    calibrate(engine, plan, FACTS)
    prefix = 513
    round_ = [1, 256, prefix, 513, 768]
    assert asked[1 : 1 + 3 * len(round_)] == 3 * round_  # behind the first, which warms the engine up


def test_what_disturbs_a_point_does_not_stay_in_the_grid():
    class Disturbed(Engine):
        def first_token_s(self, prompt):
            return super().first_token_s(prompt) + (0.1 if len(prompt) == 512 else 0)

    profile, quiet = calibrate(Disturbed(), PLAN, FACTS), calibrate(Engine(), PLAN, FACTS)
    assert profile.prefill_s(512) == profile.prefill_s(520) == pytest.approx(quiet.prefill_s(520), rel=0.01)
    assert profile.prefill_s(256) == pytest.approx(quiet.prefill_s(256), rel=0.01)
    table = np.array(profile.prefill.seconds)
    assert (np.diff(table, axis=0) >= 0).all()


class Clock:
    """Stands for `time`, in which nothing passes but what an engine and pauses take."""

    def __init__(self):
        self.now = self.worked = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        if seconds > 0.1 * self.worked:
            self.worked = 0.0


def test_a_gpu_that_is_slower_without_rest_is_found_out(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("kvsim.calibration.measure.time", clock)

    class Hot(Engine):
        """A tenth slower once it has computed for most of a second, until it rests for a tenth of that."""

        def first_token_s(self, prompt):
            beside = self.handling[0] + self.handling[1] * len(prompt)
            compute = (super().first_token_s(prompt) - beside) * (1.1 if clock.worked > 0.8 else 1)
            clock.now += beside + compute
            clock.worked += compute
            return beside + compute

    plan = replace(PLAN, prefill=((1, 0), (4096, 0), (1, 1024), (4096, 1024)), repeats=9)
    profile = calibrate(Hot(), plan, FACTS)
    assert profile.sustained == pytest.approx(1.1, rel=0.01)
    assert profile.prefill_s(4096) == pytest.approx(1e-3 + 2e-5 * 4096 + 1e-9 * 4096 * 4096, rel=0.02)
    assert profile.provenance["sustained"].kind == "measured"


def test_without_a_measurement_a_gpu_does_not_slow_down():
    profile = calibrate(Engine(), replace(PLAN, sustained_s=0), FACTS)
    assert profile.sustained == 1
    assert profile.provenance["sustained"].kind == "assumed"


@pytest.mark.parametrize(("slower_engine", "tokens"), [(1, 4096), (6, 2048), (1000, 0), (0.01, 0)])
def test_the_longest_step_before_a_gpu_slows_down_is_measured_without_rest(monkeypatch, slower_engine, tokens):
    clock = Clock()
    monkeypatch.setattr("kvsim.calibration.measure.time", clock)
    asked = []

    class Slow(Engine):
        def first_token_s(self, prompt):
            asked.append(len(prompt))
            took = slower_engine * super().first_token_s(prompt)
            clock.now += took
            return took

    points = ((64, 0), (2048, 0), (4096, 0), (16_384, 0), (64, 1024), (2048, 1024), (4096, 1024))
    decodes = ((1, 16), (8, 16), (1, 1024), (8, 1024))
    profile = calibrate(Slow(), replace(PLAN, prefill=points, decode=decodes, repeats=1), FACTS)
    assert "one measurement a point" in profile.provenance["prefill"].error
    assert profile.sustained == 1
    part = profile.provenance["sustained"]
    assert part.kind == ("measured" if tokens else "assumed")
    if tokens:
        assert f"of {tokens:,} tokens" in part.error
        assert asked.count(tokens) > 10
    else:
        assert max(asked.count(new) for new, _ in points) < 15


def test_a_few_prefills_without_rest_say_nothing(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("kvsim.calibration.measure.time", clock)

    class Short(Engine):
        """Has hardly computed for a second after four hundred prefills, and then takes three times as long."""

        def first_token_s(self, prompt):
            took = super().first_token_s(prompt)
            clock.now += 2.508e-3 if len(prompt) == 4096 else 0
            return took if clock.now < 1 else 3 * took

    profile = calibrate(Short(), replace(PLAN, rest=0, repeats=1), FACTS)
    assert profile.sustained == 1
    assert profile.provenance["sustained"].kind == "assumed"


def test_a_rest_is_a_second_at_most(monkeypatch):
    clock = Clock()
    rests = []
    monkeypatch.setattr("kvsim.calibration.measure.time", clock)
    monkeypatch.setattr(clock, "sleep", rests.append)

    class Timed(Engine):
        def first_token_s(self, prompt):
            took = 50 * super().first_token_s(prompt)
            clock.now += took
            return took

    calibrate(Timed(), replace(PLAN, rest=0.5, repeats=1), FACTS)
    assert max(rests) == 1
    assert min(rests) < 0.5


@pytest.mark.parametrize("stop", [1, 20, 70])
def test_half_a_calibration_goes_on_where_it_stopped(tmp_path, stop):
    state = tmp_path / "state.jsonl"
    with pytest.raises(EndpointError):
        calibrate(Engine(fail_after=stop), PLAN, FACTS, state=state)
    state.write_bytes(state.read_bytes() + b'{"point": ["pre')  # cut off within a line
    again = Engine()
    resumed = calibrate(again, PLAN, FACTS, state=state)
    whole_engine = Engine()
    whole = calibrate(whole_engine, PLAN, FACTS)
    assert resumed.prefill == whole.prefill
    assert resumed.decode == whole.decode
    assert stop < 5 or again.calls < whole_engine.calls - stop // 2
    third = Engine()
    calibrate(third, PLAN, FACTS, state=state)
    assert third.calls == 0


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_what_was_cut_off_is_not_found_in_the_cache(tmp_path, stop):
    engine = Engine()
    computed = []
    inner = engine.first_token_s

    def first_token_s(prompt):
        computed.append(tuple(prompt))
        took = inner(prompt)
        if len(computed) == stop:
            raise KeyboardInterrupt  # the engine has computed it, and nobody has taken note
        return took

    engine.first_token_s = first_token_s
    state = tmp_path / "state.jsonl"
    with pytest.raises(KeyboardInterrupt):
        calibrate(engine, PLAN, FACTS, state=state)
    cut_off = computed[-1]
    calibrate(engine, PLAN, FACTS, state=state)
    assert cut_off not in computed[stop:]


def test_a_state_of_something_else_is_refused(tmp_path):
    state = tmp_path / "state.jsonl"
    calibrate(Engine(), PLAN, FACTS, state=state)
    other = Engine()
    other.model = "another"
    with pytest.raises(CalibrationError, match="model differ"):
        calibrate(other, PLAN, FACTS, state=state)
    state.write_text("hello\n")
    with pytest.raises(CalibrationError, match="not a calibration"):
        calibrate(Engine(), PLAN, FACTS, state=state)


def test_plans_stay_within_the_engines_limits():
    plan = make_plan(max_model_len=4096, max_num_batched_tokens=2048, max_num_seqs=16, kv_tokens=10_000)
    assert max(new for new, _ in plan.prefill) == 2048
    assert all(new + cached < 4096 for new, cached in plan.prefill)
    assert all(batch <= 16 and batch * context <= 10_000 for batch, context in plan.decode)
    with pytest.raises(ValueError, match="two values"):
        Plan(prefill=((1, 0), (2, 0)), decode=plan.decode)


def test_a_step_is_measured_only_while_all_decode():
    assert step_s([[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]]) == pytest.approx(1)
    assert step_s([np.arange(0, 10, 0.5).tolist(), np.arange(0.1, 9, 0.5).tolist()]) == pytest.approx(0.5, rel=0.05)
    with pytest.raises(EndpointError, match="more decode steps"):
        step_s([[0, 1, 2], [3, 4, 5]])


class Server(http.server.BaseHTTPRequestHandler):
    """Streams tokens 10 ms apart, the first after 20 ms and a ms for each hundred tokens of prompt."""

    usage = True
    copied = ""
    """What a connector there has counted."""
    told = None
    """Sum and count of what it says its times to the first token were: 5 s each."""
    protocol_version = "HTTP/1.0"

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path.endswith("/metrics"):
            self.send_response(200 if self.told or self.copied else 404)
            self.end_headers()
            self.wfile.write(self.copied.encode())
            self.wfile.write(
                b"# HELP vllm:time_to_first_token_seconds Seconds\n"
                b'vllm:time_to_first_token_seconds_bucket{le="1.0"} 7.0\n'
                b'vllm:time_to_first_token_seconds_sum{model_name="served"} %f\n'
                b'vllm:time_to_first_token_seconds_count{model_name="served"} %f\n' % tuple(self.told or (0, 0))
            )
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "served"}]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if len(body["prompt"]) > 1000:
            self.send_error(400, "too long")
            return
        self.send_response(200)
        self.end_headers()
        time.sleep(0.02 + 1e-5 * len(body["prompt"]))
        if self.told:
            self.told[0] += 5
            self.told[1] += 1
        for number in range(body["max_tokens"]):
            message = {"choices": [{"text": "x"}]}
            if self.usage:
                message["usage"] = {"completion_tokens": number + 1}
            self.wfile.write(b"data: " + json.dumps(message).encode() + b"\n\n")
            self.wfile.flush()
            time.sleep(0.01)
        self.wfile.write(b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\n' % body["max_tokens"])
        self.wfile.write(b"data: [DONE]\n\n")


@contextlib.contextmanager
def serving(**attributes):
    handler = type("Handler", (Server,), attributes)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=[True, False])
def url(request):
    with serving(usage=request.param) as url:
        yield url


def test_a_server_that_tells_its_times_is_taken_at_its_word():
    with serving(told=[100.0, 20.0]) as url:
        endpoint = HttpEndpoint(url)
        assert endpoint.first_token_s([1] * 100) == pytest.approx(5)
        assert endpoint.first_token_s([2] * 200) == pytest.approx(5)


COPIED = """# HELP vllm:kvcore_stored_bytes_total Bytes copied to L1.
vllm:kvcore_stored_bytes_total{engine="0"} 4e9
vllm:kvcore_stored_bytes_total{engine="1"} 2e9
vllm:kvcore_store_seconds_total{engine="0"} 0.1
vllm:kvcore_store_seconds_total{engine="1"} 0.05
vllm:kvcore_stored_tokens_total{engine="0"} 7
"""
LOADED = COPIED.replace("stored_", "loaded_").replace("store_", "load_").replace("4e9", "1e8").replace("2e9", "1e8")


def test_what_a_connector_has_copied_is_asked_for():
    with serving() as url:
        assert HttpEndpoint(url).copied() == {}
    with serving(copied=COPIED) as url:
        assert HttpEndpoint(url).copied() == {"d2h": (6e9, pytest.approx(0.15))}
    with serving(copied=COPIED + LOADED) as url:
        assert HttpEndpoint(url).copied() == {
            "d2h": (6e9, pytest.approx(0.15)),
            "h2d": (2e8, pytest.approx(0.15)),
        }


def test_the_link_is_what_was_copied_over_it():
    profile = lookup("qwen3-8b", "h100")
    assert linked(profile, {}) is profile
    assert linked(profile, {"h2d": (2e8, 0.1), "d2h": (6e9, 0.0)}) is profile, "hardly anything, or by no clock"
    out = linked(profile, {"h2d": (2e8, 0.1), "d2h": (6e9, 0.15)})
    assert out.transfers["d2h"].peak_bytes_per_s == pytest.approx(40e9)
    assert {**out.transfers, "d2h": 0} == {**profile.transfers, "d2h": 0}
    told = out.provenance["pcie"]
    assert told.kind == "measured"
    assert "6.0 GB d2h" in told.source
    assert f"h2d: {profile.provenance['pcie'].source}" in told.error
    both = linked(replace(profile, tensor_parallel=2), {"h2d": (3e9, 0.1), "d2h": (6e9, 0.15)})
    assert both.transfers["h2d"].peak_bytes_per_s == pytest.approx(60e9), "two ranks, whose seconds are added up"


def test_a_server_with_other_clients_is_timed_from_here():
    class Busy(list):
        def __iter__(self):  # another request, each time it is asked
            self[1] += 2
            return super().__iter__()

    with serving(told=Busy([100.0, 20.0])) as url:
        endpoint = HttpEndpoint(url)
        assert endpoint.first_token_s([1] * 100) < 1
        assert endpoint.first_token_s([1] * 100) < 1
        assert endpoint.where == url  # all of it is timed from here


def test_a_profile_says_where_its_times_are_of_two_kinds():
    class Later(list):
        asked = 0

        def __iter__(self):  # another request, from the third time on that it is asked
            self.asked += 1
            self[1] += 2 * (self.asked > 2)
            return super().__iter__()

    with serving(told=Later([100.0, 20.0])) as url:
        endpoint = HttpEndpoint(url)
        assert endpoint.first_token_s([1] * 100) == pytest.approx(5)
        assert endpoint.where == url
        assert endpoint.first_token_s([1] * 100) < 1
        assert endpoint.where.startswith(url)
        assert "in part timed by the client" in endpoint.where


def test_an_endpoint_is_timed_over_http(url):
    endpoint = HttpEndpoint(url + "/v1/")
    assert endpoint.model == "served"
    assert 0.02 < endpoint.first_token_s([1] * 100) < 0.2
    assert endpoint.decode_step_s([[1] * 10] * 3, 12) == pytest.approx(0.01, rel=0.5)
    with pytest.raises(EndpointError, match="status 400"):
        endpoint.first_token_s([1] * 2000)


def test_an_endpoint_that_is_not_there_is_one_line():
    with pytest.raises(EndpointError, match=r"http://127\.0\.0\.1:9.*refused") as caught:
        HttpEndpoint("http://127.0.0.1:9")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="--url"):
        HttpEndpoint("localhost:8000")


FAKE_VLLM = """
import time
print("noise of an engine that starts")
class EngineArgs:
    def __init__(self, **arguments):
        assert arguments.pop("model") == "tiny" and arguments.pop("enable_prefix_caching") and not arguments
class SamplingParams:
    def __init__(self, max_tokens, **_):
        self.tokens = max_tokens
class Output:
    def __init__(self, name, count):
        self.request_id = name
        self.outputs = [type("One", (), {"token_ids": [0] * count})]
class LLMEngine:
    @classmethod
    def from_engine_args(cls, arguments):
        return cls()
    def __init__(self):
        self.live = {}
    def add_request(self, name, prompt, sampling):
        if len(prompt["prompt_token_ids"]) > 100:
            raise SystemExit("out of memory")
        self.live[name] = [0, sampling.tokens]
    def has_unfinished_requests(self):
        return bool(self.live)
    def step(self):
        time.sleep(0.005)
        for state in self.live.values():
            state[0] += 1
        outputs = [Output(name, state[0]) for name, state in self.live.items()]
        self.live = {name: state for name, state in self.live.items() if state[0] < state[1]}
        return outputs
"""


def test_a_local_engine_is_stepped_in_a_child(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with LocalEndpoint("tiny") as endpoint:
        assert endpoint.first_token_s([1, 2, 3]) == pytest.approx(0.005, abs=0.02)
        assert endpoint.decode_step_s([[1], [2]], 10) == pytest.approx(0.005, rel=0.8)
        with pytest.raises(EndpointError, match="out of memory"):
            endpoint.first_token_s([1] * 101)
    assert "vllm" not in sys.modules


def test_a_local_engine_that_does_not_start_says_why(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("raise ImportError('no GPU here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EndpointError, match="no GPU here"):
        LocalEndpoint("tiny")
    with pytest.raises(EndpointError, match="nowhere"):
        LocalEndpoint("tiny", python="/nowhere/python")
