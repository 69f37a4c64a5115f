"""vLLM's own scheduler with two steps in flight, and a synchronous load that fails: no worker, no server."""

from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from kvcore.vllm import compat

pytestmark = pytest.mark.vllm
PROMPT, HIT, BLOCK = 200, 128, 32


def scheduler(model, runner):
    """vLLM's for its first or second model runner, over a connector that finds HIT tokens."""
    args = EngineArgs(model=str(model), dtype="float32", enforce_eager=True, block_size=BLOCK, max_model_len=1024)
    config = args.create_engine_config()
    config.scheduler_config.async_scheduling = True  # as on a GPU
    config.cache_config.num_gpu_blocks = 100
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.float32)
    cache = KVCacheConfig(num_blocks=100, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    sizes = {"block_size": BLOCK, "hash_block_size": BLOCK}
    made = AsyncScheduler(config, cache, StructuredOutputManager(config), **sizes)
    made.connector = connector = MagicMock(supports_divergent_local_hybrid_hits=False, requires_kv_delivery=False)
    connector.get_num_new_matched_tokens.return_value = (HIT, False)
    connector.request_finished.return_value = (False, None)
    for nothing in ("build_connector_meta", "take_events", "get_kv_connector_stats"):
        getattr(connector, nothing).return_value = None
    connector.has_pending_block_frees.return_value = False
    made.recompute_kv_load_failures = made.defer_block_free = True
    made.use_v2_model_runner = runner == 2
    made.log_stats = False
    return made


def output(token, invalid=()):
    told = KVConnectorOutput(invalid_block_ids=set(invalid))
    return ModelRunnerOutput(["r"], {"r": 0}, sampled_token_ids=[[token]], kv_connector_output=told)


def tokens(outputs):
    return [token for one in outputs.values() for each in one.outputs for token in each.new_token_ids]


@pytest.mark.parametrize("runner", [1, 2])
def test_no_token_that_rests_on_a_failed_load_is_given_out(tiny_model, runner):
    compat.recompute_by_preemption()
    engine = scheduler(tiny_model, runner)
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    engine.add_request(Request("r", list(range(PROMPT)), params, None, block_hasher=hasher))
    first = engine.schedule()
    engine.connector.get_num_new_matched_tokens.return_value = (0, False)
    second = engine.schedule()  # planned while the first runs
    ((blocks,),) = (new.block_ids for new in first.scheduled_new_reqs)
    assert not tokens(engine.update_from_output(first, output(1, {blocks[0]})))
    third = engine.schedule()
    assert third.num_scheduled_tokens == {"r": PROMPT}, "all of it, and no token of the steps before"
    anew = third.scheduled_cached_reqs.all_token_ids if runner == 1 else [r.req_id for r in third.scheduled_new_reqs]
    assert list(anew) == ["r"], "the worker is to take it up anew"
    assert not tokens(engine.update_from_output(second, output(2)))
    engine.schedule()
    assert tokens(engine.update_from_output(third, output(3))) == [3]
