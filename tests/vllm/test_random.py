"""Traffic at random through a real engine that plans ahead: requests share prefixes, end early, lose what they load.

More of it by hand: `KVCORE_TEST_SEEDS=200 pytest tests/vllm/test_random.py`.
"""

import os
from contextlib import contextmanager

import harness
import numpy as np
import pytest

pytest.importorskip("vllm")

from harness import BLOCK, CHUNK, Answer, answer, assert_same, generate
from servers import ServerInThread, counters
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from kvcore.live.client import Client
from kvcore.live.wire import Clear
from kvcore.vllm import namespace
from kvcore.vllm.mover import Mover

pytestmark = pytest.mark.vllm

SEEDS = int(os.environ.get("KVCORE_TEST_SEEDS", "3"))
L1_CHUNKS = 16
GPU_BLOCKS = 40
MOST = 40
"""Tokens of an answer."""
ROUNDS, STEPS = 6, 50
GARBAGE = 0x41  # 12.08 as float32


def prompts():
    """Of a tree of prefixes: some end within a block, some at a chunk's end, one token behind or before it."""
    rng = np.random.default_rng(7)
    stems = [rng.integers(4, 300, 3 * CHUNK).tolist() for _ in range(2)]
    return [
        stem[:shared] + rng.integers(4, 300, more).tolist()
        for stem in stems
        for shared in (CHUNK // 2, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, 3 * CHUNK)
        for more in (0, 1, BLOCK, CHUNK + 3)
    ]


PROMPTS = prompts()


@pytest.fixture(scope="module")
def reference(tiny_model):
    """What vLLM answers without a connector."""
    with harness.engine(tiny_model, max_num_batched_tokens=256) as llm:
        return generate(llm, PROMPTS, MOST)


@pytest.fixture(scope="module", params=["mp-sync", "mp-async", "embedded-auto"])
def rig(request, tiny_model, reference, tmp_path_factory):
    """An engine with few blocks, so that requests are preempted, and an endpoint of its server."""
    kind, mode = request.param.split("-")
    options = {"l1_size_gb": L1_CHUNKS / 2048, "page_size": "512KiB", "chunk_size": CHUNK}
    server = ServerInThread(tmp_path_factory.mktemp("server"), **options) if kind == "mp" else None
    if server is not None:
        config = harness.connector_config("KVCoreMPConnector", endpoint=server.endpoint, load_mode=mode)
    else:
        config = harness.connector_config("KVCoreConnector", load_mode=mode, pretouch=False, **options)
    sizes = {"max_num_batched_tokens": 256, "num_gpu_blocks_override": GPU_BLOCKS, "max_model_len": 1024}
    with (
        harness.planning_ahead(),
        harness.engine(tiny_model, config, **sizes) as llm,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(namespace, "_LONG", 16)  # prompts whose lookup may be put off
        yield llm, server.endpoint if server else harness.scheduler(llm).connector._endpoint()
    if server is not None:
        server.stop()


class Traffic:
    """Requests of one seed, and what came of them."""

    def __init__(self, llm, endpoint, seed):
        self.llm, self.engine, self.endpoint = llm, llm.llm_engine, endpoint
        self.rng = np.random.default_rng(seed)
        self.seed = seed
        self.under_way = {}
        self.ended = {}
        self.count = 0

    def add(self):
        which, most = int(self.rng.integers(len(PROMPTS))), int(self.rng.integers(1, MOST + 1))
        name = f"{self.seed}-{self.count}"
        self.count += 1
        params = SamplingParams(
            temperature=0, max_tokens=most, logprobs=0, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
        )
        self.engine.add_request(name, {"prompt_token_ids": list(PROMPTS[which])}, params)
        self.under_way[name] = which, most

    def abort(self):
        if self.under_way:
            name = list(self.under_way)[int(self.rng.integers(len(self.under_way)))]
            self.engine.abort_request([name])
            del self.under_way[name]

    def step(self):
        for output in self.engine.step():
            if output.finished and output.request_id in self.under_way:
                which, most = self.under_way.pop(output.request_id)
                self.ended[output.request_id] = which, most, answer(output)

    def round(self):
        """Some dozens of steps with all that happens, and then the rest of what is under way."""
        for _ in range(STEPS):
            do = self.rng.random()
            if do < 0.35 and len(self.under_way) < 10:
                self.add()
            elif do < 0.4:
                self.abort()
            elif do < 0.41:
                with Client(self.endpoint) as client:
                    client.call(Clear())
            else:
                self.step()
        while self.engine.has_unfinished_requests():
            self.step()
        assert not self.under_way
        harness.step_idle(self.llm)
        if self.rng.random() < 0.8:
            assert self.llm.reset_prefix_cache()

    def check(self, reference):
        for which, most, given in self.ended.values():
            expected = reference[which]
            assert_same([given], [Answer(expected.tokens[:most], expected.logprobs[:most])])


class Late:
    """A copy that is said to be over when it has been asked for some times, or is waited for."""

    def __init__(self, handle, asked):
        self._handle, self._left = handle, asked

    def done(self):
        self._left -= 1
        return self._left <= 0 and self._handle.done()

    def wait(self):
        self._left = 0
        self._handle.wait()

    def __getattr__(self, name):
        return getattr(self._handle, name)


@contextmanager
def robbed(rng, share):
    """Let some loads read pages that change hands right then: their generations rise, and then others write there.

    All loads are over a while later.
    """
    load, count = Mover.load, 0

    def rob(mover, pages, blocks):
        nonlocal count
        late = int(rng.integers(4))
        if rng.random() >= share:
            return Late(load(mover, pages, blocks), late)
        count += 1
        size, arena = mover.registered.page_bytes, mover.arena
        taken = np.unique(pages)
        ranges = [slice(int(page) * size, (int(page) + 1) * size) for page in taken]
        kept = [arena.data[one].copy() for one in ranges]
        arena.generations[taken] += 1
        for one in ranges:
            arena.data[one] = GARBAGE
        handle = load(mover, pages, blocks)
        handle.wait()
        for one, before in zip(ranges, kept, strict=True):
            arena.data[one] = before
        return Late(handle, late)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mover, "load", rob)
        yield lambda: count


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_traffic_is_answered_as_without_a_connector(rig, reference, seed):
    llm, endpoint = rig
    with Client(endpoint) as client:
        client.call(Clear())
    assert llm.reset_prefix_cache()
    before = counters(endpoint)
    traffic = Traffic(llm, endpoint, seed)
    with robbed(traffic.rng, 0.25) as robberies:
        for _ in range(ROUNDS):
            traffic.round()
    traffic.check(reference)
    assert counters(endpoint)["loaded_tokens"] > before["loaded_tokens"]
    assert seed or robberies()

    seen = harness.settle(llm, endpoint)
    assert seen["arena"]["free_pages"] + seen["tiers"][0]["pages"] == seen["arena"]["pages"]
    assert seen["tiers"][0]["idle_pages"] == seen["tiers"][0]["pages"]
    assert llm.reset_prefix_cache()
