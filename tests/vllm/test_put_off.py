"""Prompts of which nothing is cached: their first step does not wait for their names, nor for their lookup."""

import pytest
from engine_double import (
    BLOCK,
    CHUNK,
    NAMESPACE,
    EngineRequest,
    Late,
    Line,
    blocks,
    decode,
    engine_hashes,
    finish,
    names,
    registered,
    step,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.vllm.namespace import Hasher
from kvcore.vllm.scheduler import Options, SchedulerSide

LONG = 66 * BLOCK + 3
CHUNKS = LONG // CHUNK


def make(plans_ahead=True, line=None, **more):
    line = line or Line()
    options = Options(block_tokens=BLOCK, plans_ahead=plans_ahead, **more)
    return line, SchedulerSide(line, Hasher(NAMESPACE, engine_hashes=True), options, clock=lambda: 2.0)


def request(name="a", tokens=LONG, seed=0, **fields):
    one = EngineRequest(name, [seed * 10_000 + i for i in range(tokens)], **fields)
    one.block_hashes = engine_hashes(one.prompt_token_ids)
    return one


def first_step(side, one, scheduled=None):
    """The step of a request of which nothing is cached; returns its plan."""
    assert side.matched(one, 0) == (0, False)
    side.allocated(one, blocks(one.num_tokens), 0)
    return side.plan(step(new=[(one.request_id, blocks(one.num_tokens), 0, scheduled or one.num_tokens)]))


def stored(*plans):
    return {
        chunk: row
        for plan in plans
        for copy in plan.stores
        for chunk, row in zip(copy.chunks, copy.blocks.tolist(), strict=True)
    }


def wanted(one):
    per_chunk = CHUNK // BLOCK
    return {chunk: [10 + at * per_chunk + i for i in range(per_chunk)] for at, chunk in enumerate(names(one))}


def test_the_first_step_is_planned_before_the_prompt_is_looked_up():
    line, side = make()
    one = request()
    plan = first_step(side, one)
    assert line.calls == [("held", False)]
    assert not plan.stores
    plan = side.plan(decode(one))
    assert [call[0] for call in line.calls] == ["held", "lookup", "ask", "end"]
    assert stored(plan) == wanted(one)
    assert side.counted()["lookups"] == 1


def test_a_prompt_whose_head_is_held_is_looked_up_at_once():
    line, side = make()
    one = request()
    line.resident.update(names(one)[:2])
    assert side.matched(one, 0) == (2 * CHUNK, False)
    assert [call[0] for call in line.calls] == ["held", "lookup"]


@pytest.mark.parametrize(
    ("plans_ahead", "tokens", "computed", "silent", "asked"),
    [
        (False, LONG, 0, False, 0),
        (True, 63 * BLOCK, 0, False, 0),
        (True, LONG, CHUNK, False, 0),
        (True, LONG, 0, True, 1),
        (True, LONG, 0, False, 1),
    ],
)
def test_what_is_put_off(plans_ahead, tokens, computed, silent, asked):
    """Long prompts, where steps are planned ahead, the engine has nothing either, and the server says so."""
    line, side = make(plans_ahead)
    line.silent = silent
    assert side.matched(request(tokens=tokens), computed) == (0, False)
    assert len(line.named("held")) == asked
    assert len(line.named("lookup")) == (0 if asked and not silent else 1)


def test_a_prompt_that_comes_back_is_looked_up_at_once():
    line, side = make()
    for name in "ab":
        one = request(name)
        first_step(side, one)
        side.plan(decode(one))
        side.finished(one)
    assert len(line.named("held")) == 1
    assert len(line.named("lookup")) == 2


def test_a_prompt_computed_in_several_steps_is_stored_as_it_grows():
    line, side = make()
    one = request()
    plans = [first_step(side, one, 300)]
    rest = [("a", (), computed, min(300, LONG - computed), False) for computed in range(300, LONG, 300)]
    plans += [side.plan(step(cached=[row])) for row in rest]
    assert stored(*plans) == wanted(one)
    assert [count for _, _, count in line.named("ask")] == [4, 5, 5, CHUNKS - 14]
    assert len(line.named("end")) == 1


def test_nobody_waits_for_room_in_the_middle_of_a_prompt():
    line, side = make(line=Late(polls=4), grant_wait_s=30)
    first_step(side, request(max_tokens=1), 300)
    plan = side.plan(step(cached=[("a", (), 300, 300, False)]))
    assert (plan.stores, line.polls) == ([], 3)


def test_a_request_of_one_token_is_stored_in_the_next_step_though_it_is_not_in_it():
    line, side = make(line=Late(polls=4), grant_wait_s=30)
    one = request(max_tokens=1)
    first_step(side, one)
    plan = side.plan(step())
    assert stored(plan) == wanted(one), "it waits for its room, for there is no step after this one"
    side.finished(one)
    assert len(line.named("end")) == 1


def test_a_request_that_does_not_get_into_the_step_is_asked_about_anew():
    line, side = make()
    one = request()
    assert side.matched(one, 0) == (0, False)
    side.plan(step())
    line.resident.update(names(one))
    external, _ = side.matched(one, 0)
    assert external == CHUNKS * CHUNK
    assert line.named("held") == [("held", False), ("held", True)]


def test_what_others_store_meanwhile_is_given_back_and_not_stored_twice():
    line, side = make()
    one = request()
    first_step(side, one)
    line.resident.update(names(one)[:3])
    plan = side.plan(decode(one))
    assert line.named("drop_load") == [("drop_load", "a", 3)]
    assert set(stored(plan)) == set(names(one)[3:])


def test_an_answer_that_takes_its_time_is_waited_for():
    line, side = make()
    one = request()
    first_step(side, one)
    line.pending = 2
    for _ in range(2):
        assert not side.plan(decode(one)).stores
        assert not line.named("ask")
    assert stored(side.plan(decode(one))) == wanted(one)


@pytest.mark.parametrize("pending", [0, 1])
def test_a_request_aborted_behind_its_first_step_leaves_nothing_behind(pending):
    line, side = make()
    one = request()
    first_step(side, one, 300)
    line.pending = pending
    side.finished(one)
    side.plan(step())
    assert len(line.named("lookup")) == len(line.named("end")) == 1
    assert len(line.named("ask")) == 1 - pending, "what it computed is stored while its blocks hold it"
    assert not side._tracked
    assert not side._put_off
    assert not side._abandoned


def preempted_behind_its_first_step(pending):
    """A request whose answer takes so many calls yet; the next step is to tell of it."""
    line, side = make()
    one = request()
    first_step(side, one, 300)
    line.pending = pending
    one.num_preemptions = 1
    return line, side, one


def test_a_request_preempted_while_its_answer_is_under_way_gives_back_what_it_finds():
    line, side, one = preempted_behind_its_first_step(pending=1)
    line.resident.update(names(one)[:2])
    side.plan(step(preempted=["a"]))
    assert line.named("drop_load") == [("drop_load", "a", 2)]
    assert line.named("end") == [("end", "a")]
    external, _ = side.matched(one, 0)
    assert external == 2 * CHUNK
    assert line.named("lookup")[-1][1] == "a~1"


def test_a_request_preempted_and_asked_about_anew_is_not_forgotten_meanwhile():
    """Its next lookup is under way when a step is planned without it; what that finds is pinned until it ends."""
    line, side, one = preempted_behind_its_first_step(pending=3)
    side.plan(step(preempted=["a"]))
    assert side.matched(one, 0) == (None, False)
    side.plan(step())
    assert side.matched(one, 0) == (0, False)
    assert [call[1] for call in line.named("lookup")] == ["a", "a~1"]
    side.finished(one)
    assert [call[1] for call in line.named("end")] == ["a", "a~1"]


def test_names_change_behind_what_is_put_off():
    _, side = make()
    one = request()
    first_step(side, one)
    side.forget("other weights")
    assert set(stored(side.plan(decode(one)))) == set(names(one))
    two = request("b")
    first_step(side, two)
    assert not set(stored(side.plan(decode(two)))) & set(names(one))


def test_a_server_lost_behind_the_first_step_is_a_miss():
    line, side = make()
    one = request()
    first_step(side, one)
    line.registered = None
    assert not side.plan(decode(one)).stores
    line.registered = registered(epoch=2, record=True)
    side.plan(decode(one))
    assert not line.named("lookup")
    side.finished(one)
    side.plan(step())
    ((_, fields),) = line.recorded
    assert len(fields["hash_ids"]) == 8 * (LONG // BLOCK)


def test_the_log_is_that_of_a_prompt_looked_up_at_once():
    rows = []
    for plans_ahead in (True, False):
        line, side = make(plans_ahead)
        line.registered = registered(record=True)
        one = request()
        first_step(side, one)
        finish(side, one)
        rows += line.recorded
    assert rows[0] == rows[1]


@settings(deadline=None)
@given(st.data())
def test_the_same_is_found_and_stored_as_without(data):
    """One request at a time, of a few prompts that share heads, in steps of any size, aborted here and there."""
    plain, ahead = make(False), make(True)
    for number in range(data.draw(st.integers(1, 5))):
        seed, extra = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 3)) * CHUNK
        budget = data.draw(st.integers(BLOCK, LONG + 3 * CHUNK))
        aborted_after = data.draw(st.one_of(st.none(), st.integers(0, 3)))
        seen = []
        for line, side in (plain, ahead):
            one = request(str(number), LONG + extra, seed)
            external, _ = side.matched(one, 0)
            table = blocks(one.num_tokens, 10 + 1000 * number)
            side.allocated(one, table, external)
            plans, computed, new = [], external, True
            while computed < one.num_tokens and aborted_after != len(plans):
                todo = min(budget, one.num_tokens - computed)
                row = (str(number), table if new else (), computed, todo)
                plans.append(side.plan(step(new=[row]) if new else step(cached=[(*row, False)])))
                computed, new = computed + todo, False
            if computed == one.num_tokens:
                one.num_output_tokens = 1
                plans.append(side.plan(decode(one)))
            side.finished(one)
            plans.append(side.plan(step()))
            line.resident.update(stored(*plans))
            seen.append((external, stored(*plans) if aborted_after is None else None, sorted(line.resident)))
        if aborted_after is None:
            assert seen[0] == seen[1]
        else:  # an abort may come before what was put off is stored
            assert set(seen[1][2]) <= set(seen[0][2])
            plain[0].resident.intersection_update(ahead[0].resident)
    assert len(ahead[0].named("end")) >= len({call[1] for call in ahead[0].named("lookup")})
