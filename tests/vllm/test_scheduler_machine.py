"""The scheduler's half with a real service, in engines that go through everything at random.

More of it by hand: `KVCORE_TEST_SEEDS=3000 pytest tests/vllm/test_scheduler_machine.py`.
"""

import os
from collections import Counter

import pytest
from engine_machine import Engine

OPERATIONS = {
    Engine.turn: 40,
    Engine.deliver: 120,
    Engine.l2_works: 60,
    Engine.add: 16,
    Engine.abort: 3,
    Engine.clear: 0.5,
    Engine.forget_locally: 4,
    Engine.other_weights: 0.3,
    Engine.lose_server: 0.3,
    Engine.server_comes: 3,
}


@pytest.fixture
def run(operate, monkeypatch):
    """Run the engine of a seed; return how often it was where."""

    def run(seed):
        engine = Engine(seed, monkeypatch)
        try:
            operate(engine, seed, OPERATIONS, 1000)
        finally:
            engine.remove()
        return engine.seen

    return run


@pytest.mark.parametrize("seed", range(int(os.environ.get("KVCORE_TEST_SEEDS", "60"))))
def test_nothing_wrong_is_given_out_or_stored_and_nothing_is_left_behind(run, seed):
    run(seed)


def test_the_machine_comes_everywhere(run):
    seen = Counter()
    for seed in range(20):
        seen.update(run(seed))
    assert min(seen.values()) > 10, seen
