"""kvcore as a part of vLLM's MultiConnector."""

import harness
import numpy as np
import pytest

pytest.importorskip("vllm")

from harness import CHUNK, assert_same, generate, metrics
from servers import ServerInThread
from vllm import __version__
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

from kvcore.vllm import KVCoreMPConnector, compat, connector
from kvcore.vllm.mover import Mover

pytestmark = pytest.mark.vllm
PROMPT = np.random.default_rng(1).integers(4, 300, 4 * CHUNK + 50).tolist()


def multi(endpoint, load_mode):
    part = harness.connector_config("KVCoreMPConnector", endpoint=endpoint, load_mode=load_mode, deadline_ms=10_000)
    extra = {"connectors": [part]}
    return {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


@pytest.fixture(scope="module")
def reference(tiny_model):
    with harness.engine(tiny_model) as llm:
        return generate(llm, [PROMPT])


@pytest.mark.skipif(__version__.startswith("0.26."), reason="it takes counts from another process only")
@pytest.mark.parametrize("load_mode", ["sync", "async"])
def test_a_part_of_several_gives_hits_and_its_failed_loads_are_recomputed(
    tiny_model, reference, tmp_path, monkeypatch, load_mode
):
    server = ServerInThread(tmp_path, l1_size_gb=0.02, page_size="256KiB", chunk_size=CHUNK)
    load = Mover.load

    def robbed(mover, pages, blocks):
        handle = load(mover, pages, blocks)
        mover.arena.generations[pages.ravel()] += 1
        return handle

    with harness.engine(tiny_model, multi(server.endpoint, load_mode)) as llm:
        assert connector._worker_here() is not None
        assert_same(generate(llm, [PROMPT]), reference)
        for hits, failed in ((4, 0), (8, 4)):
            harness.settle(llm, server.endpoint)
            assert llm.reset_prefix_cache()
            if failed:
                monkeypatch.setattr(Mover, "load", robbed)
            assert_same(generate(llm, [PROMPT]), reference)
            told = metrics(llm)
            assert told["vllm:external_prefix_cache_hits"] == hits * CHUNK
            assert told["vllm:kvcore_failed_tokens"] == failed * CHUNK
    server.stop()


def test_its_counts_are_told_by_its_name():
    """As they are in a process of `vllm serve` that has no connector of its own, at the log's usual level."""
    told = MultiConnector.build_kv_connector_stats({"KVCoreMPConnector": {"data": {"loaded_tokens": 5}}})
    assert told["KVCoreMPConnector"].data


def test_beside_another_that_shakes_hands_it_says_what_to_do():
    with pytest.raises(compat.UnsupportedModelError, match="list kvcore in front"):
        KVCoreMPConnector.set_xfer_handshake_metadata_pp_aware(None, {(0, 0): object()})
