"""A shell without time: every copy ends at once. And the log of what a core was told and decided."""

from dataclasses import replace

from kvcore.policy import Core, Driver, LoadDone, StoreCommitted


class Ticks:
    """A clock that counts its readings."""

    def __init__(self):
        self._now = 0

    def now_ns(self):
        self._now += 1
        return self._now


class InstantShell:
    """Transport and Clock; `placed` collects what was given room in answer to the last event."""

    def __init__(self, config):
        self.clock = Ticks()
        self.log = []
        self.placed = ()
        self.fails = frozenset()
        self.driver = Driver(Core(config), self, lambda *step: self.log.append(step))

    def tell(self, kind, **fields):
        self.placed = ()
        self.driver.handle(kind(now_ns=self.clock.now_ns(), **fields))

    def load(self, decision):
        self._end(LoadDone, decision)

    def store(self, decision):
        if decision.tier:
            self._end(StoreCommitted, decision)
        else:
            self.placed = decision.chunks

    def demote(self, decision):
        self.driver.handle(
            StoreCommitted(now_ns=self.clock.now_ns(), request="", tier=decision.tier + 1, chunks=decision.chunks)
        )

    def drop(self, decision):
        pass

    def refuse(self, decision):
        pass

    def matched(self, decision):
        pass

    def _end(self, kind, decision):
        self.driver.handle(
            kind(now_ns=self.clock.now_ns(), request=decision.request, tier=decision.tier, chunks=decision.chunks)
        )


def timeless(log):
    """A log without its times."""
    return [(replace(event, now_ns=0), decisions) for event, decisions in log]
