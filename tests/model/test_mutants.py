"""Faults planted in the core are caught by the machine: the comparison can fail."""

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from machine import CoreMachine

from kvcore.policy import Core, loads
from kvcore.policy.loads import find
from kvcore.policy.tier import Tier


class EvictsPinned(Tier):
    def _is_idle(self, chunk):
        return chunk in self.resident


class RefreshesHeadToTail(Tier):
    def touch(self, chunks, now_ns):
        super().touch(list(reversed(chunks)), now_ns)


class CountsInsertionAsTouch(Tier):
    def insert(self, entries, now_ns):
        super().insert(entries, now_ns)
        self.policy.touch([entry.chunk for entry in entries])


def with_tier(tier_class):
    class Mutant(Core):
        def __init__(self, config):
            super().__init__(config)
            self._state.tiers = tuple(tier_class(tier, config.ttl_ns) for tier in config.tiers)

    return Mutant


class PinsOnlyTheLeadingMatch(Core):
    def handle(self, event):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loads, "find", pin_the_leading_match)
            return super().handle(event)


def pin_the_leading_match(state, request):
    where = find(state, request)
    for index, found in enumerate(request.found):
        leading = set(request.chunks[: len(where)])
        state.tiers[index].unpin([entry for entry in found if entry.chunk not in leading])
        request.found[index] = [entry for entry in found if entry.chunk in leading]
    return where


MUTANTS = {
    "victim from the pinned set": with_tier(EvictsPinned),
    "head-to-tail refresh": with_tier(RefreshesHeadToTail),
    "insertion counted as a touch": with_tier(CountsInsertionAsTouch),
    "only the leading match pinned": PinsOnlyTheLeadingMatch,
}


def run(core_class, examples=2000):
    @seed(1)
    class Machine(CoreMachine):
        pass

    Machine.core_class = core_class
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=60,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # finding the fault is enough: no time for shrinking
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )


def test_core_itself_passes_the_same_run():
    run(Core, examples=400)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each fault shows in its own way
        run(MUTANTS[name])
    assert not isinstance(caught.value, AttributeError | TypeError | NameError), "the mutant itself is broken"
