"""Servers and engines that die or stand still under load: no request fails, and nobody reads what was half written."""

import threading
import time
from contextlib import ExitStack, closing, nullcontext

import harness
import numpy as np
import pytest

pytest.importorskip("vllm")

from engines import Child, Filler, Timed
from harness import CHUNK, assert_same, generate, metrics
from servers import ServerProcess, counters, status, wait_for
from vllm.distributed.kv_transfer import get_kv_transfer_group

pytestmark = pytest.mark.vllm

L1_CHUNKS = 24
FLAGS = ["--l1-size-gb", str(L1_CHUNKS / 2048), "--page-size", "512KiB", "--chunk-size", str(CHUNK)]
BLOCK_BYTES = 128 << 10
STALL_S = 2.0


def tokens(count, seed):
    return np.random.default_rng(seed).integers(4, 300, count).tolist()


PROMPT = tokens(3 * CHUNK + 60, 1)
QUEUED = [tokens(2 * CHUNK, 50 + i % 10) + tokens(60, 100 + i) for i in range(100)]


@pytest.fixture(scope="module")
def reference(tiny_model):
    with harness.engine(tiny_model) as llm:
        return generate(llm, [PROMPT])[0], generate(llm, QUEUED, 4)


class Queue:
    """100 requests in an engine, in a thread of its own."""

    def __init__(self, llm):
        self.answers = None
        self.thread = threading.Thread(target=self._run, args=(llm,))
        self.thread.start()

    def _run(self, llm):
        self.answers = generate(llm, QUEUED, 4)

    def wait(self):
        self.thread.join(120)
        return self.answers


@pytest.fixture(scope="module", params=["at rest", "ahead"])
def rig(request, tiny_model, reference, tmp_path_factory):
    """A server with a journal, and an engine that plans a step when the one before is over, or while it runs."""
    journal = tmp_path_factory.mktemp("journal")
    server = ServerProcess(tmp_path_factory.mktemp("server"), *FLAGS, "--journal", str(journal))
    config = harness.connector_config("KVCoreMPConnector", endpoint=server.endpoint)
    with (
        harness.planning_ahead() if request.param == "ahead" else nullcontext(),
        harness.engine(tiny_model, config, max_num_batched_tokens=512) as llm,
    ):
        yield server, llm, Timed(harness.scheduler(llm).connector, get_kv_transfer_group())
    server.stop()


def hits_come(llm):
    """Store a prompt, forget it locally, and load it: within a few seconds of the server's return."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        generate(llm, [PROMPT])
        assert llm.reset_prefix_cache()
        before = metrics(llm)["vllm:external_prefix_cache_hits"]
        answer = generate(llm, [PROMPT])
        if metrics(llm)["vllm:external_prefix_cache_hits"] - before == 3 * CHUNK:
            return answer
        time.sleep(0.2)
    raise AssertionError("no hit within 10 s")


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_server_lost_with_100_requests_queued(rig, reference, fault, record_property):
    server, llm, timed = rig
    alone, queued = reference
    assert_same(hits_come(llm), [alone])
    assert llm.reset_prefix_cache()
    timed.seconds = timed.longest = 0.0
    queue = Queue(llm)
    time.sleep(0.5)
    assert queue.answers is None, "the queue was empty before the fault"
    getattr(server, fault)()
    if fault == "pause":
        time.sleep(5)
        server.go_on()
    assert_same(queue.wait(), queued)
    record_property("connector_seconds", timed.seconds)
    record_property("longest_call_seconds", timed.longest)
    assert timed.seconds < STALL_S
    if fault == "kill":
        server.start()
    assert_same(hits_come(llm), [alone])


def test_server_with_a_journal_that_is_killed_keeps_what_was_stored(rig, reference):
    server, llm, _ = rig
    generate(llm, [PROMPT])
    assert llm.reset_prefix_cache()
    server.kill()
    server.start()
    link = harness.scheduler(llm).connector._scheduler._link
    wait_for(lambda: link.registered is not None and link.registered.epoch == status(server.endpoint)["epoch"])
    wait_for(lambda: any(one["ready"] for one in status(server.endpoint)["instances"]))
    before = metrics(llm)["vllm:external_prefix_cache_hits"]
    assert_same(generate(llm, [PROMPT]), reference[:1])
    assert metrics(llm)["vllm:external_prefix_cache_hits"] - before == 3 * CHUNK


@pytest.fixture
def started(tiny_model, tmp_path):
    """Starts a server with more flags, and an engine beside it; both end with the test, however that ends."""
    with ExitStack() as stack:

        def start(*flags):
            server = ServerProcess(tmp_path, *FLAGS, *flags)
            stack.callback(server.stop)
            child = Child(tiny_model, server.endpoint, tmp_path / "child.log")
            stack.callback(child.kill)
            return server, child

        yield start


def test_engine_killed_in_the_middle_of_a_store(started):
    server, child = started()
    child.say(prompts=[PROMPT], slow="store")
    child.wait_for("COPYING")
    assert status(server.endpoint)["arena"]["free_pages"] < L1_CHUNKS
    child.kill()
    wait_for(lambda: status(server.endpoint)["arena"]["free_pages"] == L1_CHUNKS)
    assert counters(server.endpoint)["chunks"] == 0
    assert counters(server.endpoint)["stored_tokens"] == 0


@pytest.mark.parametrize("kind", ["store", "load"])
def test_engine_stopped_in_the_middle_of_a_copy_past_its_lease(started, reference, kind):
    server, child = started("--lease-s", "1")
    with closing(Filler(server.endpoint, BLOCK_BYTES)) as filler:
        overtaken(server, child, filler, reference[0], kind)
    child.end()


def overtaken(server, child, filler, alone, kind):
    """Stop an engine in a copy until its lease has run out and others have its pages; let it go on."""
    if kind == "load":
        child.say(prompts=[PROMPT])
        child.answers()
    child.say(prompts=[PROMPT], slow=kind, reset=kind == "load")
    child.wait_for("COPYING")
    child.stop_running()
    time.sleep(2)
    filler.fill(3 * L1_CHUNKS)
    kept, same = filler.intact()
    assert same
    assert kept == L1_CHUNKS - (3 if kind == "store" else 0)
    child.go_on()
    answers, gained = child.answers()
    assert_same(answers, [alone])
    assert filler.intact() == (kept, True)
    if kind == "load":
        assert gained["vllm:kvcore_failed_tokens"] == 3 * CHUNK
    else:
        wait_for(lambda: status(server.endpoint)["tiers"][0]["pages"] == kept)
        filler.fill(L1_CHUNKS)
        assert filler.intact() == (L1_CHUNKS, True)
    child.say(prompts=[PROMPT], reset=True)
    assert_same(child.answers()[0], [alone])
    child.say(prompts=[PROMPT], reset=True)
    answers, again = child.answers()
    assert_same(answers, [alone])
    assert again["vllm:external_prefix_cache_hits"] - gained["vllm:external_prefix_cache_hits"] >= 3 * CHUNK
