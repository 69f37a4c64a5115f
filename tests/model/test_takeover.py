"""Whatever was under way when a server ended is ended by its successor, and with L1 gone L2 is as it was."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule
from machine import INSTANCES, CoreMachine

from kvcore.live.book import Book
from kvcore.live.takeover import State, end_of_what_was_under_way
from kvcore.policy import InstanceRegistered


class TakeoverMachine(CoreMachine):
    @rule(has_l1=st.booleans())
    def server_restarts(self, has_l1):
        before = [dict.fromkeys(tier.resident) for tier in self.core.tiers]
        for event in end_of_what_was_under_way(State(self.core, Book()), self.tick(), has_l1=has_l1):
            self.send(event)
        self.core.check()
        assert not list(self.core.requests())
        for tier in self.core.tiers:
            assert tier.idle == tier.used - sum(entry.pages for entry in tier.kept.values()), "something is held still"
        if not has_l1:
            assert not self.core.tiers[0].used
            if self.core.config.ttl_ns is None:
                assert [dict.fromkeys(tier.resident) for tier in self.core.tiers[1:]] == before[1:]
        self.open, self.loads, self.stores = {}, [], []
        for instance, pages in INSTANCES.items():
            self.send(InstanceRegistered(now_ns=self.tick(), instance=instance, chunk_pages=pages))


TestTakeover = TakeoverMachine.TestCase
TestTakeover.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
