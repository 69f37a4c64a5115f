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
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvcore.vllm.failed_loads import recompute_by_preemption

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


def output(token, invalid=(), received=()):
    told = KVConnectorOutput(invalid_block_ids=set(invalid), finished_recving=set(received))
    return ModelRunnerOutput(["r"], {"r": 0}, sampled_token_ids=[[token]], kv_connector_output=told)


def tokens(outputs):
    return [token for one in outputs.values() for each in one.outputs for token in each.new_token_ids]


@pytest.fixture(params=[1, 2])
def runner(request):
    return request.param


@pytest.fixture
def engine(tiny_model, runner):
    """A scheduler that has planned a step with a load, and one behind it."""
    recompute_by_preemption()
    init_none_hash(sha256)
    made = scheduler(tiny_model, runner)
    add(made, "r")
    made.plans = [made.schedule()]
    made.connector.get_num_new_matched_tokens.return_value = (0, False)
    made.plans.append(made.schedule())  # planned while the first runs
    ((made.loaded,),) = (new.block_ids for new in made.plans[0].scheduled_new_reqs)
    return made


def add(engine, name, more=0):
    hasher = get_request_block_hasher(BLOCK, sha256)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    prompt = [*range(PROMPT), *[ord(name)] * more]
    engine.add_request(Request(name, prompt, params, None, block_hasher=hasher))


def test_no_token_that_rests_on_a_failed_load_is_given_out(engine, runner):
    first, second = engine.plans
    assert not tokens(engine.update_from_output(first, output(1, {engine.loaded[0]})))
    third = engine.schedule()
    assert third.num_scheduled_tokens == {"r": PROMPT}, "all of it, and no token of the steps before"
    anew = third.scheduled_cached_reqs.all_token_ids if runner == 1 else [r.req_id for r in third.scheduled_new_reqs]
    assert list(anew) == ["r"], "the worker is to take it up anew"
    assert not tokens(engine.update_from_output(second, output(2)))
    engine.schedule()
    assert tokens(engine.update_from_output(third, output(3))) == [3]


def starts_anew(engine):
    """Its load fails; no token of its two steps is given out, and it is computed whole."""
    first, second = engine.plans
    assert not tokens(engine.update_from_output(first, output(1, {engine.loaded[0]})))
    assert not tokens(engine.update_from_output(second, output(2)))
    third = engine.schedule()
    assert third.num_scheduled_tokens == {"r": PROMPT}
    engine.schedule()
    assert tokens(engine.update_from_output(third, output(3))) == [3]


def test_nor_of_a_request_that_is_preempted_meanwhile(engine):
    (request,) = engine.running
    engine.running.remove(request)
    engine._preempt_request(request, 0.0)  # as for want of blocks
    starts_anew(engine)


def test_what_a_reset_leaves_out_is_left_out_once(engine):
    engine.defer_block_free = False  # vLLM 0.26 cannot reset while it defers
    assert engine.reset_prefix_cache(reset_running_requests=True)
    starts_anew(engine)


@pytest.mark.parametrize("invalid", [0, HIT // BLOCK - 1])
def test_what_an_aborted_request_was_to_load_is_not_matched(engine, invalid):
    first, second = engine.plans
    engine.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    engine.update_from_output(first, output(1, {engine.loaded[invalid]}))
    engine.update_from_output(second, output(2))
    add(engine, "s")
    assert engine.schedule().num_scheduled_tokens == {"s": PROMPT - invalid * BLOCK}


def test_what_an_aborted_request_has_loaded_is_matched(engine):
    first, second = engine.plans
    engine.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    engine.update_from_output(first, output(1))
    engine.update_from_output(second, output(2))
    add(engine, "s")
    assert engine.schedule().num_scheduled_tokens == {"s": PROMPT % BLOCK}


@pytest.mark.parametrize("right", [0, 2])
def test_all_that_load_behind_a_block_that_is_not_loaded_are_computed_from_there(engine, right):
    first, second = engine.plans
    engine.connector.get_num_new_matched_tokens.return_value = (2 * BLOCK, True)
    for name in "stu":
        add(engine, name, 3 * BLOCK)
    third = engine.schedule()
    engine.update_from_output(first, output(1, engine.loaded[right : HIT // BLOCK]))
    assert [engine.requests[name].num_computed_tokens for name in "stu"] == [right * BLOCK] * 3
    engine.update_from_output(second, output(2))
    engine.update_from_output(third, output(3, received="stu"))
    engine.connector.get_num_new_matched_tokens.return_value = (0, False)
    engine.schedule()
    tables = {name: engine.kv_cache_manager.get_block_ids(name)[0] for name in "rstu"}
    assert {name: len(table) for name, table in tables.items()} == dict.fromkeys("stu", 10) | {"r": 7}
