"""The scheduler's half, driven by hand: no vLLM, no server."""

import pytest
from engine_double import BLOCK, CHUNK, NAMESPACE, EngineRequest, Late, Line, blocks, names, registered, step

from kvcore.vllm.jobs import StepReport
from kvcore.vllm.namespace import Hasher
from kvcore.vllm.scheduler import Options, SchedulerSide


def make(line=None, **options):
    line = line or Line()
    return line, SchedulerSide(line, Hasher(NAMESPACE), Options(block_tokens=BLOCK, **options), clock=lambda: 2.0)


def prompt(tokens, seed=0):
    return [seed * 1000 + i for i in range(tokens)]


def admit(side, request, computed=0, scheduled=None):
    """Lookup, allocation and first step of a request; returns (external, asynchronous, plan)."""
    external, asynchronous = side.matched(request, computed)
    side.allocated(request, blocks(request.num_tokens), external)
    done = computed + external
    todo = request.num_tokens - done if scheduled is None else scheduled
    plan = side.plan(step(new=[(request.request_id, blocks(request.num_tokens), done, todo)]))
    return external, asynchronous, plan


def lookup_under_way():
    """A request's, whose answer has not come and will be a hit."""
    line, side = make()
    line.pending = 3
    request = EngineRequest("a", prompt(200))
    line.resident.update(names(request))
    assert side.matched(request, 0) == (None, False)
    return line, side, request


def test_miss_stores_every_full_chunk():
    line, side = make()
    external, _, plan = admit(side, EngineRequest("a", prompt(200)))
    assert external == 0
    assert not plan.loads
    (store,) = plan.stores
    assert store.tokens == 192
    assert store.blocks.tolist() == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 20, 21]]
    assert line.named("end") == [("end", "a")]


def test_a_lookup_takes_its_time_while_the_engine_has_nothing_else_to_do():
    line, side = make()
    for name, alone in (("a", True), ("b", False)):
        admit(side, EngineRequest(name, prompt(200)))
        assert line.patient is alone


def test_hit_loads_and_stores_the_rest():
    line, side = make()
    request = EngineRequest("a", prompt(200))
    line.resident.update(names(request)[:2])
    external, asynchronous, plan = admit(side, request)
    assert (external, asynchronous) == (128, False)
    (load,) = plan.loads
    assert plan.load_at_once
    assert load.tokens == 128
    assert load.blocks.tolist() == [[10, 11, 12, 13], [14, 15, 16, 17]]
    (store,) = plan.stores
    assert store.chunks == names(request)[2:]


def test_a_load_does_not_overtake_the_zeroing_of_its_blocks():
    line, side = make()
    request = EngineRequest("a", prompt(200))
    line.resident.update(names(request)[:2])
    external, _ = side.matched(request, 0)
    side.allocated(request, blocks(200), external)
    output = step(new=[("a", blocks(200), external, 200 - external)])
    output.new_block_ids_to_zero = blocks(200)
    plan = side.plan(output)
    assert plan.loads
    assert not plan.load_at_once


def test_exact_multiple_leaves_a_block_to_compute():
    line, side = make()
    request = EngineRequest("a", prompt(2 * CHUNK))
    line.resident.update(names(request))
    external, _, plan = admit(side, request)
    assert external == 2 * CHUNK - BLOCK
    assert plan.loads[0].blocks.tolist() == [[10, 11, 12, 13], [14, 15, 16, -1]]
    assert plan.loads[0].tokens == external


def test_asynchronous_full_hit_loads_everything_and_survives_the_second_allocation():
    line, side = make(load_mode="async")
    request = EngineRequest("a", prompt(2 * CHUNK))
    line.resident.update(names(request))
    external, asynchronous = side.matched(request, 0)
    assert (external, asynchronous) == (2 * CHUNK, True)
    side.allocated(request, blocks(2 * CHUNK), external)
    plan = side.plan(step())
    assert plan.loads[0].asynchronous
    assert not plan.load_at_once
    assert plan.loads[0].tokens == 2 * CHUNK
    side.reported(None, (), {"a"})
    side.allocated(request, blocks(2 * CHUNK), 0)
    plan = side.plan(step(new=[("a", blocks(2 * CHUNK), 2 * CHUNK - 1, 1)]))
    assert not plan.loads
    assert not line.named("drop_load")


def test_bytes_of_loads_under_way_are_told_with_a_lookup():
    line, side = make(load_mode="async")
    first, second = EngineRequest("a", prompt(200)), EngineRequest("b", prompt(200, seed=1))
    line.resident.update(names(first))
    external, _ = side.matched(first, 0)
    assert line.queued_bytes == 0
    side.allocated(first, blocks(200), external)
    side.matched(second, 0)
    assert line.queued_bytes == 192 * 10
    side.reported(None, (), {"a"})
    side.matched(EngineRequest("c", prompt(200, seed=2)), 0)
    assert line.queued_bytes == 0


def test_hit_that_starts_inside_a_chunk_skips_blocks_that_others_read():
    line, side = make()
    request = EngineRequest("a", prompt(200))
    line.resident.update(names(request))
    external, _, plan = admit(side, request, computed=CHUNK + 2 * BLOCK)
    assert external == 3 * CHUNK - CHUNK - 2 * BLOCK
    assert plan.loads[0].blocks.tolist() == [[-1, -1, 16, 17], [18, 19, 20, 21]]
    assert plan.loads[0].tokens == external


def test_whole_hit_in_the_engines_cache_is_not_loaded_but_acknowledged():
    line, side = make()
    request = EngineRequest("a", prompt(200))
    line.resident.update(names(request)[:2])
    external, _, plan = admit(side, request, computed=2 * CHUNK + BLOCK)
    assert external == 0
    assert not plan.loads
    assert plan.stores[0].chunks == names(request)[2:]


def test_engine_hits_that_l1_lacks_are_stored():
    _, side = make()
    request = EngineRequest("a", prompt(200))
    _, _, plan = admit(side, request, computed=2 * CHUNK)
    assert plan.stores[0].tokens == 3 * CHUNK


def test_chunked_prefill_asks_as_chunks_are_computed():
    line, side = make()
    request = EngineRequest("a", prompt(300))
    _, _, plan = admit(side, request, scheduled=100)
    assert [store.tokens for store in plan.stores] == [CHUNK]
    plan = side.plan(step(cached=[("a", [], 100, 27, False)]))
    assert not plan.stores
    plan = side.plan(step(cached=[("a", [], 127, 100, False)]))
    assert plan.stores[0].chunks == names(request)[1:3]
    assert not line.named("end")
    side.plan(step(cached=[("a", [], 227, 73, False)]))
    assert line.named("end")
    assert [call[2] for call in line.named("ask")] == [1, 2, 1]


def test_pending_lookup_is_asked_again():
    line, side = make()
    line.pending = 1
    request = EngineRequest("a", prompt(200))
    assert side.matched(request, 0) == (None, False)
    assert side.matched(request, 0) == (0, False)


def test_lookup_is_made_once_while_allocation_fails():
    line, side = make()
    request = EngineRequest("a", prompt(200))
    line.resident.update(names(request)[:2])
    assert side.matched(request, 0) == (128, False)
    assert side.matched(request, CHUNK) == (64, False)
    side.allocated(request, blocks(200), 64)
    assert len(line.named("lookup")) == 1
    assert line.named("drop_load") == [("drop_load", "a", 1)]
    assert side.plan(step(new=[("a", blocks(200), 128, 72)])).loads[0].blocks.tolist() == [[14, 15, 16, 17]]


def test_server_away_is_a_miss_and_nothing_is_asked():
    line, side = make()
    line.registered = None
    external, _, plan = admit(side, EngineRequest("a", prompt(200)))
    assert external == 0
    assert not plan.stores
    assert not line.calls
    side.finished(EngineRequest("a", prompt(200)))


def test_server_lost_after_the_lookup_still_plans_the_promised_load():
    line, side = make()
    request = EngineRequest("a", prompt(200))
    line.resident.update(names(request))
    external, _ = side.matched(request, 0)
    line.registered = None
    side.allocated(request, blocks(200), external)
    plan = side.plan(step(new=[("a", blocks(200), external, 200 - external)]))
    assert plan.loads[0].epoch == 1
    assert not line.named("ask")


def test_a_grant_that_comes_after_the_request_is_used_while_its_blocks_are_untouched():
    line, side = make()
    line.at_once = False
    request = EngineRequest("a", prompt(200))
    _, _, plan = admit(side, request)
    assert not plan.stores
    side.finished(request)
    line.deliver()
    plan = side.plan(step())
    assert plan.stores[0].tokens == 192
    assert not plan.computes


@pytest.mark.parametrize("under_way", [0, 1])
def test_only_a_requests_last_step_waits_for_its_room(under_way):
    line, side = make(Late(polls=4), grant_wait_s=30)
    request = EngineRequest("a", prompt(200))
    request.max_tokens = 3
    _, _, plan = admit(side, request)
    assert (plan.stores, line.polls) == ([], 3)
    request.num_output_tokens, request.num_output_placeholders = 1 - under_way, under_way
    plan = side.plan(step(cached=[("a", (), 200, 1, False)]))
    assert (plan.stores, line.polls) == ([], 2)
    request.num_output_tokens = 2 - under_way
    plan = side.plan(step(cached=[("a", (), 201, 1, False)]))
    assert plan.stores[0].tokens == 192


def test_a_grant_that_comes_after_the_blocks_were_handed_out_again_is_given_back():
    line, side = make()
    line.at_once = False
    request = EngineRequest("a", prompt(200))
    admit(side, request)
    side.finished(request)
    other = EngineRequest("b", prompt(40, seed=7))
    side.matched(other, 0)
    side.allocated(other, blocks(40), 0)
    line.deliver()
    plan = side.plan(step(new=[("b", blocks(40), 0, 40)]))
    assert plan.handed_out.tolist() == blocks(40)
    assert not plan.stores
    assert line.named("drop_store") == [("drop_store", "a", 3)]


def test_a_lost_server_leaves_nothing_to_come():
    line, side = make()
    line.at_once = False
    request = EngineRequest("a", prompt(200))
    admit(side, request)
    side.finished(request)
    line.registered = registered(epoch=2)
    assert not side.plan(step()).stores


@pytest.mark.parametrize(("bad", "stored"), [((), True), ((9,), True), ((13,), False)])
def test_a_grant_that_comes_after_a_load_failed_stores_nothing_of_an_aborted_request(bad, stored):
    line, side = make(grant_wait_s=0.0)
    line.at_once = False
    request = EngineRequest("a", prompt(200))
    line.resident.update(names(request)[:1])
    admit(side, request)
    side.finished(request)
    side.reported(StepReport(failures={0: 1} if bad else {}), bad, ())
    line.deliver()
    plan = side.plan(step())
    assert bool(plan.stores) == stored
    assert bool(line.named("drop_store")) != stored


def test_preemption_gives_back_late_grants_and_looks_up_anew():
    line, side = make()
    line.at_once = False
    request = EngineRequest("a", prompt(200))
    admit(side, request, scheduled=130)
    request.num_preemptions = 1
    line.deliver()
    plan = side.plan(step(preempted=["a"]))
    assert not plan.stores
    assert line.named("drop_store") == [("drop_store", "a", 2)]
    line.at_once = True
    line.resident.update(names(request)[:1])
    external, _ = side.matched(request, 0)
    assert external == CHUNK
    side.allocated(request, blocks(200, 50), external)
    plan = side.plan(step(cached=[("a", blocks(200, 50), CHUNK, 136, True)]))
    assert plan.loads[0].name == "a~1"
    assert plan.loads[0].blocks.tolist() == [[50, 51, 52, 53]]
    assert plan.stores[0].blocks.tolist() == [[54, 55, 56, 57], [58, 59, 60, 61]]


def test_preempted_and_resumed_in_one_step_keeps_its_new_life():
    _, side = make()
    request = EngineRequest("a", prompt(200))
    admit(side, request, scheduled=130)
    request.num_preemptions = 1
    external, _ = side.matched(request, 0)
    side.allocated(request, blocks(200, 50), external)
    plan = side.plan(step(cached=[("a", blocks(200, 50), 0, 200, True)], preempted=["a"]))
    assert plan.stores[0].name == "a~1"


def test_failed_asynchronous_load_is_not_tried_again():
    line, side = make(load_mode="async")
    request = EngineRequest("a", prompt(200))
    line.resident.update(names(request))
    external, _ = side.matched(request, 0)
    side.allocated(request, blocks(200), external)
    side.plan(step())
    side.reported(None, {10}, {"a"})
    assert side.matched(request, 0) == (0, False)
    assert side.matched(request, 0) == (0, False)
    assert len(line.named("lookup")) == 1


def test_nothing_is_stored_of_what_rests_on_a_failed_load():
    line, side = make()
    line.at_once = False
    loader = EngineRequest("a", prompt(200))
    line.resident.update(names(loader)[:1])
    admit(side, loader)
    other = EngineRequest("b", prompt(200, seed=1))
    side.matched(other, 0)
    side.allocated(other, blocks(200, 90), 0)
    side.plan(step(new=[("b", blocks(200, 90), 0, 200)]))
    side.reported(StepReport(failures={0: 1}), {11}, ())
    line.deliver()
    plan = side.plan(step())
    assert plan.failures_seen == {0: 1}
    assert [store.request for store in plan.stores] == ["b"]
    assert line.named("drop_store") == [("drop_store", "a", 2)]


def test_abort_before_allocation_gives_the_hit_back():
    line, side = make()
    request = EngineRequest("a", prompt(200))
    line.resident.update(names(request))
    side.matched(request, 0)
    side.finished(request)
    assert line.named("drop_load") == [("drop_load", "a", 3)]
    assert line.named("end") == [("end", "a")]


def test_abort_while_the_lookup_is_under_way_gives_the_late_hit_back():
    line, side, request = lookup_under_way()
    side.finished(request)
    assert not line.named("end")
    side.plan(step())
    assert not line.named("end")
    side.plan(step())
    assert line.named("drop_load") == [("drop_load", "a", 3)]
    assert line.named("end") == [("end", "a")]


def test_lookup_is_made_again_where_the_engine_has_lost_what_it_held():
    line, side = make()
    request = EngineRequest("a", prompt(200))
    line.resident.update(names(request))
    assert side.matched(request, CHUNK) == (128, False)
    assert side.matched(request, 0) == (192, False)
    side.allocated(request, blocks(200), 192)
    plan = side.plan(step(new=[("a", blocks(200), 192, 8)]))
    assert plan.loads[0].tokens == 192


def test_abort_during_an_asynchronous_load_leaves_the_blocks_to_vllm():
    line, side = make(load_mode="async")
    request = EngineRequest("a", prompt(200))
    line.resident.update(names(request))
    external, _ = side.matched(request, 0)
    side.allocated(request, blocks(200), external)
    side.plan(step())
    side.finished(request)
    assert not line.named("drop_load")


def test_decode_says_nothing_to_the_server():
    line, side = make()
    request = EngineRequest("a", prompt(200))
    admit(side, request)
    before = list(line.calls)
    for i in range(3):
        request.num_output_tokens += 1
        assert not side.plan(step(cached=[("a", [99] if i == 1 else [], 200 + i, 1, False)])).stores
    assert line.calls == before


@pytest.mark.parametrize(("arrived_s", "waited_ms"), [(1.75, 250), (3.0, 0), (-1e9, 0), (2e9, 0)])
def test_an_arrival_by_another_clock_counts_as_now(arrived_s, waited_ms):
    line, side = make()
    admit(side, EngineRequest("a", prompt(200), arrival_time=arrived_s))
    assert line.waited_ms == pytest.approx(waited_ms)


def test_the_log_row_of_a_request():
    line, side = make()
    line.registered = registered(record=True)
    request = EngineRequest("a", prompt(200), arrival_time=0.5)
    admit(side, request, computed=BLOCK)
    request.num_output_tokens = 1
    side.finished(request)
    side.reported(StepReport(load_stalls={"a": 0.25}), (), ())
    ((name, row),) = line.recorded
    assert name == "a"
    assert row["l0_tokens"] == BLOCK
    assert row["input_length"] == 200
    assert row["output_length"] == 1
    assert row["block_size"] == BLOCK
    assert len(row["hash_ids"]) == 8 * 12
    assert row["queue_ms"] == pytest.approx(1500)
    assert row["ttft_ms"] == pytest.approx(1500)
    assert line.waited_ms == pytest.approx(1500)
    assert row["load_ms"] == pytest.approx(250)


def test_after_forgetting_nothing_of_before_matches():
    line, side = make()
    first = EngineRequest("a", prompt(200))
    line.resident.update(names(first))
    side.forget("weights changed")
    assert side.matched(first, 0) == (0, False)


def test_prompts_given_as_embeddings_are_left_alone():
    line, side = make()
    request = EngineRequest("a", prompt(200), prompt_embeds=object())
    assert side.matched(request, 0) == (0, False)
    assert not line.calls


def test_what_is_computed_after_forgetting_is_not_stored_under_the_names_of_before():
    _, side = make()
    admit(side, EngineRequest("a", prompt(300)), scheduled=100)
    side.forget("other weights")
    assert not side.plan(step(cached=[("a", [], 100, 200, False)])).stores


def test_a_request_that_waits_is_looked_up_anew_after_forgetting():
    line, side = make()
    request = EngineRequest("a", prompt(200))
    line.resident.update(names(request))
    assert side.matched(request, 0) == (192, False)  # and not allocated yet
    side.forget("other weights")
    assert line.named("end") == [("end", "a")]
    assert side.matched(request, 0) == (0, False)
    assert line.named("drop_load") == [("drop_load", "a", 3)]


def test_a_preempted_request_is_looked_up_anew_after_forgetting():
    line, side = make()
    request = EngineRequest("a", prompt(200))
    line.resident.update(names(request))
    admit(side, request)
    request.num_preemptions = 1
    side.forget("other weights")
    side.plan(step(preempted=["a"]))
    assert line.named("end") == [("end", "a")]
    assert side.matched(request, 0) == (0, False)


def test_a_lookup_under_way_when_all_is_forgotten_gives_its_hit_back():
    line, side, request = lookup_under_way()
    side.forget("other weights")
    for _ in range(3):
        side.plan(step())
    assert line.named("drop_load") == [("drop_load", "a", 3)]
    assert side.matched(request, 0) == (0, False)


def test_a_request_whose_load_failed_in_its_step_starts_anew_without_one():
    line, side = make()
    request = EngineRequest("a", prompt(200))
    line.resident.update(names(request))
    assert admit(side, request)[0] == 192
    side.reported(StepReport(failures={0: 1}), {10}, ())
    request.num_preemptions = 1
    side.plan(step(preempted=["a"]))
    assert side.matched(request, 0) == (0, False)
    assert len(line.named("lookup")) == 1


@pytest.mark.parametrize(("epoch", "told"), [(1, True), (2, False)])
def test_workers_are_told_that_the_scheduler_has_come_back_to_a_server_that_lives(epoch, told):
    """Then, not before: it may still be granted something. Another server has granted nothing."""
    line, side = make()
    assert not side.plan(step()).grants_lost
    line.registered = None
    assert not side.plan(step()).grants_lost
    line.registered = registered(epoch=epoch)
    assert [side.plan(step()).grants_lost for _ in range(2)] == [told, False]
