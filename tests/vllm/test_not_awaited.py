"""Prompts that the engine's own cache holds: their lookup is sent, and nobody waits for what cannot bring anything."""

import pytest
from engine_double import BLOCK, CHUNK, NAMESPACE, EngineRequest, Line, blocks, decode, finish, names, registered, step
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.vllm.namespace import Hasher
from kvcore.vllm.scheduler import Options, SchedulerSide

TOKENS = 3 * CHUNK + 5
HELD = TOKENS // BLOCK * BLOCK


class Waiting(Line):
    """A server whose every answer is waited for, as long as it takes."""

    def lookup(self, *arguments, wait=True, **fields):
        return super().lookup(*arguments, **fields)


def make(line=None):
    line = line or Line()
    return line, SchedulerSide(line, Hasher(NAMESPACE), Options(block_tokens=BLOCK), clock=lambda: 2.0)


def request(name="a", tokens=TOKENS, seed=0, **fields):
    return EngineRequest(name, [seed * 10_000 + i for i in range(tokens)], **fields)


def first_step(side, one, computed, scheduled=None):
    """The step of a request of which the engine holds `computed` tokens; returns its plan."""
    assert side.matched(one, computed) == (0, False)
    side.allocated(one, blocks(one.num_tokens), 0)
    todo = scheduled or one.num_tokens - computed
    return side.plan(step(new=[(one.request_id, blocks(one.num_tokens), computed, todo)]))


def left_behind(side):
    return [*side._tracked, *side._put_off, *side._abandoned]


def stored(*plans):
    return [chunk for plan in plans for copy in plan.stores for chunk in copy.chunks]


def test_the_answer_is_taken_in_behind_the_first_step():
    line, side = make()
    one = request()
    line.resident.update(names(one)[:2])
    plan = first_step(side, one, HELD)
    assert line.calls == [("sent", "a")]
    assert not plan.stores
    plan = side.plan(decode(one))
    assert line.calls[1:] == [("lookup", "a", 2, 2), ("ask", "a", 1), ("end", "a")]
    assert stored(plan) == [*names(one)[2:]], "what L1 has lost is stored again"
    counted = side.counted()
    assert (counted["lookups"], counted["matched_tokens"]) == (1, 2 * CHUNK)


@pytest.mark.parametrize(
    ("tokens", "computed", "awaited"),
    [
        (TOKENS, HELD, False),
        (TOKENS, 3 * CHUNK, False),
        (TOKENS, 3 * CHUNK - BLOCK, True),
        (TOKENS, 0, True),
        (3 * CHUNK, 3 * CHUNK - BLOCK, False),
        (3 * CHUNK, 3 * CHUNK - 2 * BLOCK, True),
        (CHUNK - 1, 0, False),
        (CHUNK + 1, 0, True),
    ],
)
def test_whose_answer_is_awaited(tokens, computed, awaited):
    """That of a prompt with a chunk that the engine lacks; the last block of a prompt is computed in any case."""
    line, side = make()
    side.matched(request(tokens=tokens), computed)
    assert [call[0] for call in line.calls] == (["lookup"] if awaited else ["sent"])


def test_what_the_server_would_have_loaded_is_given_back():
    line, side = make()
    one = request(tokens=3 * CHUNK)
    line.resident.update(names(one))
    first_step(side, one, 3 * CHUNK - BLOCK)
    plan = side.plan(decode(one))
    assert line.named("drop_load") == [("drop_load", "a", 1)]
    assert not plan.loads
    assert not plan.stores


def test_a_request_of_one_token_is_answered_when_it_ends():
    line, side = make()
    one = request(max_tokens=1)
    line.resident.update(names(one)[:2])
    first_step(side, one, HELD)
    side.finished(one)
    assert stored(side.plan(step())) == [*names(one)[2:]]
    assert len(line.named("end")) == 1
    assert left_behind(side) == []


@pytest.mark.parametrize("pending", [0, 3])
def test_a_request_that_does_not_get_into_the_step_keeps_its_lookup(pending):
    line, side = make()
    one = request()
    line.resident.update(names(one))
    line.pending = pending
    for _ in range(3):
        assert side.matched(one, HELD) == (0, False)
        side.plan(step())
    assert len(line.named("sent")) == 1
    first_step(side, one, HELD)
    line.pending = 0
    side.plan(decode(one))
    assert len(line.named("lookup")) == len(line.named("end")) == 1


@pytest.mark.parametrize("pending", [0, 1])
@pytest.mark.parametrize("scheduled", [False, True])
def test_an_aborted_one_leaves_nothing_behind(pending, scheduled):
    line, side = make()
    one = request()
    line.resident.update(names(one)[:2])
    if scheduled:
        first_step(side, one, HELD)
    else:
        side.matched(one, HELD)
        side.plan(step())
    line.pending = pending
    side.finished(one)
    side.plan(step())
    assert len(line.named("lookup")) == len(line.named("end")) == 1
    assert left_behind(side) == []


def test_a_preempted_one_is_looked_up_anew():
    line, side = make()
    one = request()
    line.resident.update(names(one))
    first_step(side, one, HELD)
    one.num_preemptions = 1
    line.pending = 1
    side.plan(step(preempted=["a"]))
    side.plan(step())
    assert line.named("end") == [("end", "a")]
    assert side.matched(one, 0) == (3 * CHUNK, False)
    assert line.named("lookup")[-1][1] == "a~1"


def test_a_server_lost_meanwhile_is_a_miss():
    line, side = make()
    one = request()
    first_step(side, one, HELD)
    line.registered = registered(epoch=2)
    assert not side.plan(decode(one)).stores
    assert not line.named("ask")
    side.finished(one)
    assert left_behind(side) == []


def test_the_log_is_that_of_a_prompt_whose_answer_is_awaited():
    rows = []
    for kind in (Line, Waiting):
        line, side = make(kind())
        line.registered = registered(record=True)
        one = request()
        first_step(side, one, HELD)
        finish(side, one)
        rows += line.recorded
    assert rows[0] == rows[1]
    assert rows[0][1]["l0_tokens"] == HELD


@settings(deadline=None)
@given(st.data())
def test_the_same_is_found_and_stored_as_with_a_wait(data):
    """One request at a time, of two prompts, of which the engine holds any number of blocks."""
    awaited, sent = make(Waiting()), make()
    for number in range(data.draw(st.integers(1, 6))):
        seed, tokens = data.draw(st.integers(0, 1)), data.draw(st.integers(1, 5 * CHUNK))
        computed = data.draw(st.integers(0, (tokens - 1) // BLOCK)) * BLOCK
        decodes = data.draw(st.integers(0, 2))
        seen = []
        for line, side in (awaited, sent):
            one = request(str(number), tokens, seed)
            external, _ = side.matched(one, computed)
            table = blocks(tokens, 10 + 1000 * number)
            side.allocated(one, table, external)
            done = computed + external
            plans = [side.plan(step(new=[(str(number), table, done, tokens - done)]))]
            for _ in range(decodes):
                one.num_output_tokens += 1
                plans.append(side.plan(decode(one)))
            side.finished(one)
            plans.append(side.plan(step()))
            line.resident.update(stored(*plans))
            seen.append((external, stored(*plans), [copy.chunks for plan in plans for copy in plan.loads]))
        assert seen[0] == seen[1]
    for line, side in (awaited, sent):
        assert len(line.named("end")) == len({call[1] for call in line.named("lookup")})
        assert left_behind(side) == []
    dropped = [sorted(line.named("drop_load")) for line, _ in (awaited, sent)]
    assert dropped[0] == dropped[1]
