"""A restored core goes on as the dumped one would have: the machine swaps it for its own copy now and then."""

import json

from hypothesis import settings
from hypothesis.stateful import precondition, rule
from machine import CoreMachine

from kvcore.policy.snapshot import dump, restore


def through_json(state):
    """Only plain values may be in it; bytes are the one thing that JSON lacks."""
    text = json.dumps(state, default=lambda value: {"bytes": value.decode()})
    return json.loads(text, object_hook=lambda one: one["bytes"].encode() if list(one) == ["bytes"] else one)


class SnapshotMachine(CoreMachine):
    @precondition(lambda self: self.count % 3 == 0)
    @rule()
    def restart(self):
        state = dump(self.core)
        self.core = restore(self.core.config, through_json(state))
        assert dump(self.core) == state


TestSnapshots = SnapshotMachine.TestCase
TestSnapshots.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
