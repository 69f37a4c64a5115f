"""Real vLLM on the CPU reuses KV through a server, and answers as it does without one."""

import re
from collections import defaultdict
from contextlib import nullcontext

import harness
import numpy as np
import pytest

pytest.importorskip("vllm")

from harness import BLOCK, CHUNK, assert_same, generate, metrics
from servers import ServerInThread, counters, status
from vllm import SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvcore.live.client import Client
from kvcore.live.wire import Clear, Where
from kvcore.policy.hashing import block_hashes, chunk_names
from kvcore.vllm import namespace
from kvcore.vllm.mover import Mover

pytestmark = pytest.mark.vllm

L1_CHUNKS = 16
CHUNK_BYTES = 512 << 10
GPU_BLOCKS = 112
MODES = ["mp-sync", "mp-async-ahead", "embedded-sync-ahead"]


def tokens(count, seed):
    return np.random.default_rng(seed).integers(4, 300, count).tolist()


SHARED = tokens(4 * CHUNK + 50, 1)
PROMPTS = {
    "first": SHARED + tokens(100, 2),
    "second": SHARED + tokens(130, 3),
    "exact": tokens(4 * CHUNK, 4),
    "longer than L1": tokens((L1_CHUNKS + 6) * CHUNK + 40, 5),
    "mid-chunk": tokens(5 * CHUNK + 70, 6),
    **{f"concurrent {i}": SHARED[: (1 + i % 4) * CHUNK + 16 * i] + tokens(150, 10 + i) for i in range(8)},
    **{f"tight {i}": tokens(3 * CHUNK, 30 + i % 3) + tokens(190 + 40 * i, 40 + i) for i in range(8)},
}
LONG_ANSWER = 96


def length(name):
    return LONG_ANSWER if name.startswith("tight") else 8


@pytest.fixture(scope="module")
def reference(tiny_model):
    """What vLLM answers without a connector."""
    with harness.engine(tiny_model, max_num_batched_tokens=256) as llm:
        found = {}
        for same in (8, LONG_ANSWER):
            names = [name for name in PROMPTS if length(name) == same]
            found |= zip(names, generate(llm, [PROMPTS[name] for name in names], same), strict=True)
        return found


@pytest.fixture(scope="module", params=MODES)
def setup(request, tiny_model, reference, tmp_path_factory):
    """An engine with a connector, small in every way: chunked prefill, few blocks, an L1 of 16 chunks.

    `ahead` has vLLM plan steps ahead, as it does on a GPU, and lookups put off then.
    """
    kind, mode, *ahead = request.param.split("-")
    options = {"l1_size_gb": L1_CHUNKS * CHUNK_BYTES / 2**30, "page_size": "512KiB", "chunk_size": CHUNK}
    server = ServerInThread(tmp_path_factory.mktemp("server"), **options) if kind == "mp" else None
    if server is not None:
        config = harness.connector_config(
            "KVCoreMPConnector", endpoint=server.endpoint, load_mode=mode, deadline_ms=10_000
        )
    else:
        config = harness.connector_config("KVCoreConnector", load_mode=mode, pretouch=False, **options)
    with (
        harness.planning_ahead() if ahead else nullcontext(),
        harness.engine(tiny_model, config, max_num_batched_tokens=256, num_gpu_blocks_override=GPU_BLOCKS) as llm,
        pytest.MonkeyPatch.context() as patch,
    ):
        if ahead:
            side = harness.scheduler(llm).connector._scheduler
            assert side._options.plans_ahead
            patch.setattr(namespace, "_LONG", 16)
            put_off = spied(patch, side, "_puts_off")
        yield Setup(llm, server, reference)
        assert not ahead or {True, False} <= set(put_off)
    if server is not None:
        server.stop()


def spied(patch, thing, name):
    """Return the list that gets what a method returns from now on."""
    returned, method = [], getattr(thing, name)
    patch.setattr(thing, name, lambda *given: returned.append(method(*given)) or returned[-1])
    return returned


class Setup:
    def __init__(self, llm, server, reference):
        self.llm = llm
        self.endpoint = server.endpoint if server else harness.scheduler(llm).connector._endpoint()
        self.reference = reference

    def forget_locally(self):
        """Leave nothing in the engine's cache, once the server has heard from the workers of every store."""
        harness.settle(self.llm, self.endpoint)
        held = {name: str(request.status) for name, request in harness.scheduler(self.llm).requests.items()}
        assert self.llm.reset_prefix_cache(), held

    def clear(self):
        self.forget_locally()
        with Client(self.endpoint) as client:
            client.call(Clear())

    def ask(self, *names):
        """Answer prompts at once, compare with the reference; return what vLLM's and the server's counters gained."""
        before, served = metrics(self.llm), counters(self.endpoint)
        answers = [
            answer
            for same in {length(name): None for name in names}
            for answer in generate(self.llm, [PROMPTS[n] for n in names if length(n) == same], same)
        ]
        assert_same(answers, [self.reference[name] for name in names])
        after = metrics(self.llm)
        harness.settle(self.llm, self.endpoint)  # workers tell the server of their copies in their own time
        now = counters(self.endpoint)
        gained = defaultdict(int, {name: after[name] - before.get(name, 0) for name in after})
        gained |= {name: now[name] - served.get(name, 0) for name in now}
        return gained


def hits(gained):
    return gained["vllm:external_prefix_cache_hits"]


def logged(caplog, verb):
    once = {id(record): record.getMessage() for record in caplog.records}  # one can come through two loggers
    return sum(int(n) for n in re.findall(rf"{verb} (\d+) tokens", "\n".join(once.values())))


def test_second_request_loads_the_shared_prefix(setup, caplog):
    setup.clear()
    gained = setup.ask("first")
    assert hits(gained) == 0
    assert gained["vllm:kvcore_stored_tokens"] == 5 * CHUNK
    setup.forget_locally()
    caplog.clear()
    with caplog.at_level("INFO", logger="kvcore"):
        gained = setup.ask("second")
    assert hits(gained) == 4 * CHUNK
    assert gained["vllm:kvcore_loaded_tokens"] == hits(gained)
    assert gained["loaded_tokens"] == hits(gained)
    assert gained["matched_tokens"] == 4 * CHUNK
    assert logged(caplog, "Retrieved") == hits(gained)
    assert logged(caplog, "Stored") == gained["vllm:kvcore_stored_tokens"] == CHUNK


def test_prompt_of_whole_chunks(setup):
    setup.clear()
    setup.ask("exact")
    setup.forget_locally()
    gained = setup.ask("exact")
    asynchronous = setup.llm.llm_engine.vllm_config.kv_transfer_config.kv_connector_extra_config["load_mode"] == "async"
    assert hits(gained) == 4 * CHUNK - (0 if asynchronous else BLOCK)
    assert gained["loaded_tokens"] == hits(gained)
    assert gained["matched_tokens"] == 4 * CHUNK


def test_hit_begins_inside_a_chunk_that_vllm_holds_in_part(setup):
    setup.clear()
    setup.ask("mid-chunk")
    setup.forget_locally()
    generate(setup.llm, [PROMPTS["mid-chunk"][: CHUNK + 3 * BLOCK + 5]], 1)
    gained = setup.ask("mid-chunk")
    assert hits(gained) == 5 * CHUNK - (CHUNK + 3 * BLOCK)
    assert gained["loaded_tokens"] == gained["vllm:kvcore_loaded_tokens"] == hits(gained)


def test_what_vllm_holds_and_l1_lacks_is_stored(setup):
    setup.clear()
    setup.ask("first")
    with Client(setup.endpoint) as client:
        client.call(Clear())
    gained = setup.ask("first")
    assert hits(gained) == 0
    assert gained["vllm:kvcore_stored_tokens"] == 5 * CHUNK


def test_prompt_longer_than_l1(setup):
    setup.clear()
    gained = setup.ask("longer than L1")
    assert gained["vllm:kvcore_stored_tokens"] == L1_CHUNKS * CHUNK
    setup.forget_locally()
    gained = setup.ask("longer than L1")
    assert hits(gained) == L1_CHUNKS * CHUNK
    assert gained["loaded_tokens"] == hits(gained)


def test_eight_at_once_with_overlapping_prefixes(setup):
    setup.clear()
    setup.ask("first")
    setup.forget_locally()
    gained = setup.ask(*[f"concurrent {i}" for i in range(8)])
    assert hits(gained) > 0
    assert gained["loaded_tokens"] == gained["vllm:kvcore_loaded_tokens"] == hits(gained)


def test_preemption_with_loads_and_evictions(setup):
    setup.clear()
    names = [f"tight {i}" for i in range(8)]
    setup.ask(names[0], names[1])
    setup.forget_locally()
    gained = setup.ask(*names)
    assert gained["vllm:num_preemptions"] > 0
    assert gained["vllm:kvcore_loaded_tokens"] > 0
    assert gained["evicted_chunks"] > 0
    setup.forget_locally()


def test_load_that_fails_is_computed_and_poisons_nothing(setup, monkeypatch):
    """The pages change hands during the copy; what the same step computed on top of the bad blocks is not stored."""
    setup.clear()
    setup.ask("second")
    setup.forget_locally()
    load = Mover.load

    def robbed(mover, pages, blocks):
        handle = load(mover, pages, blocks)
        mover.arena.data[:] = 0
        mover.arena.generations[pages.ravel()] += 1
        return handle

    with monkeypatch.context() as patch:
        patch.setattr(Mover, "load", robbed)
        gained = setup.ask("first")
    assert gained["vllm:kvcore_failed_tokens"] == 4 * CHUNK
    assert gained["loaded_tokens"] == 0
    hasher = harness.scheduler(setup.llm).connector._scheduler._hasher
    root = hasher.namespace.digest()
    names = chunk_names(block_hashes(PROMPTS["first"], BLOCK, root), CHUNK // BLOCK)
    with Client(setup.endpoint) as client:
        assert client.call(Where(names[:3])).tiers == (0, 0, 0)
        assert client.call(Where(names[4:])).tiers == (-1,)
    setup.clear()
    assert hits(setup.ask("first")) == 0
    setup.forget_locally()
    assert hits(setup.ask("first")) == 5 * CHUNK


def test_salts_keep_tenants_apart(setup):
    setup.clear()
    generate(setup.llm, [PROMPTS["first"]], 1, salts=["one"])
    setup.forget_locally()
    before = metrics(setup.llm)["vllm:external_prefix_cache_hits"]
    generate(setup.llm, [PROMPTS["first"]], 1, salts=["two"])
    assert metrics(setup.llm)["vllm:external_prefix_cache_hits"] == before
    generate(setup.llm, [PROMPTS["first"]], 1)
    assert metrics(setup.llm)["vllm:external_prefix_cache_hits"] == before
    setup.forget_locally()
    generate(setup.llm, [PROMPTS["first"]], 1, salts=["one"])
    assert metrics(setup.llm)["vllm:external_prefix_cache_hits"] == before + 5 * CHUNK


def test_requests_aborted_half_way_leave_nothing_behind(setup):
    setup.clear()
    setup.ask("first")
    setup.forget_locally()
    engine = setup.llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    for steps in (0, 1, 2, 4, 12):
        name = f"aborted-{steps}"
        engine.add_request(name, {"prompt_token_ids": PROMPTS["first"] + PROMPTS["exact"]}, params)
        for _ in range(steps):
            engine.step()
        engine.abort_request([name])
        harness.step_idle(setup.llm)
    setup.forget_locally()
    seen = status(setup.endpoint)
    assert seen["arena"]["free_pages"] + seen["tiers"][0]["pages"] == seen["arena"]["pages"]
    setup.ask("first")


def test_nothing_is_left_under_way(setup):
    """After everything that this engine has been through, the server holds resident chunks only, and no pin."""
    seen = harness.settle(setup.llm, setup.endpoint)
    assert seen["arena"]["free_pages"] + seen["tiers"][0]["pages"] == seen["arena"]["pages"]
    assert seen["tiers"][0]["idle_pages"] == seen["tiers"][0]["pages"]


def test_a_prompt_whose_log_probabilities_are_asked_for_is_computed(setup):
    """vLLM takes no hit for it; what a hit left out would be garbage."""
    setup.clear()
    setup.ask("first")
    setup.forget_locally()
    before = metrics(setup.llm)
    prompt = {"prompt_token_ids": PROMPTS["first"]}
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    (output,) = setup.llm.generate([prompt], params, use_tqdm=False)
    assert_same([harness.answer(output)], [setup.reference["first"]])
    told = [row[token].logprob for token, row in zip(PROMPTS["first"][1:], output.prompt_logprobs[1:], strict=True)]
    assert max(told) <= 0
    assert len(told) == len(PROMPTS["first"]) - 1
    after = metrics(setup.llm)
    for name in ("vllm:external_prefix_cache_hits", "vllm:kvcore_lookups"):
        assert after[name] == before[name], name
    setup.clear()


def test_zeros_in_l1_change_the_answer(setup):
    setup.clear()
    setup.ask("first")
    setup.forget_locally()
    get_kv_transfer_group()._worker._mover.arena.data[:] = 0
    before = metrics(setup.llm)
    (answer,) = generate(setup.llm, [PROMPTS["first"]])
    assert metrics(setup.llm)["vllm:external_prefix_cache_hits"] > before["vllm:external_prefix_cache_hits"]
    expected = setup.reference["first"]
    assert answer.tokens != expected.tokens
    setup.clear()
