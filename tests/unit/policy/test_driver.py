"""The driver carries every decision out, in order, and takes in what its transport reports meanwhile."""

import pytest

from kvcore.policy import (
    Core,
    CoreConfig,
    Driver,
    InstanceRegistered,
    LoadDone,
    LookedUp,
    RequestEnded,
    RoomAsked,
    StoreCommitted,
    TierConfig,
)


class Instant:
    """A transport whose copies end within the call, and which notes what it was told."""

    def __init__(self):
        self.log = []
        self.driver = None

    def load(self, decision):
        self.log.append(("load", decision.tier, decision.chunks))
        self.driver.handle(LoadDone(now_ns=0, request=decision.request, tier=decision.tier, chunks=decision.chunks))

    def store(self, decision):
        self.log.append(("store", decision.tier, decision.chunks))
        self.commit(decision.request, decision.tier, decision.chunks)

    def demote(self, decision):
        self.log.append(("demote", decision.tier, decision.chunks))
        self.commit("", decision.tier + 1, decision.chunks)

    def commit(self, request, tier, chunks):
        self.driver.handle(StoreCommitted(now_ns=0, request=request, tier=tier, chunks=chunks))

    def drop(self, decision):
        self.log.append(("drop", decision.tier, decision.chunks))

    def refuse(self, decision):
        self.log.append(("refuse", decision.reason, decision.chunks))

    def matched(self, decision):
        self.log.append(("matched", decision.hits))


def start(placement, *pages):
    tiers = tuple(TierConfig(name=f"l{i}", pages=size) for i, size in enumerate(pages))
    transport, seen = Instant(), []
    driver = Driver(Core(CoreConfig(tiers=tiers, placement=placement)), transport, lambda *step: seen.append(step))
    transport.driver = driver
    driver.handle(InstanceRegistered(now_ns=0, instance="i", chunk_pages=1))
    return driver, transport, seen


def serve(driver, request, chunks):
    driver.handle(LookedUp(now_ns=0, request=request, instance="i", chunks=chunks))
    driver.handle(RoomAsked(now_ns=0, request=request, chunks=chunks))
    driver.handle(RequestEnded(now_ns=0, request=request))


def test_decisions_are_carried_out_in_order_down_the_tiers():
    driver, transport, _ = start("write-back", 2, 2, 2)
    serve(driver, "r", (1, 2))
    serve(driver, "s", (3, 4))
    serve(driver, "t", (5, 6))
    assert transport.log == [
        ("matched", (0, 0, 0)),
        ("store", 0, (1, 2)),
        ("matched", (0, 0, 0)),
        ("demote", 0, (2, 1)),
        ("store", 0, (3, 4)),
        ("matched", (0, 0, 0)),
        ("demote", 1, (2, 1)),
        ("demote", 0, (4, 3)),
        ("store", 0, (5, 6)),
    ]


def test_the_ends_of_copies_are_events_like_any_other():
    driver, transport, seen = start("write-through", 2, None)
    serve(driver, "r", (1, 2))
    serve(driver, "s", (3, 4))
    transport.log.clear()
    driver.handle(LookedUp(now_ns=0, request="t", instance="i", chunks=(1, 2)))
    assert transport.log == [
        ("matched", (0, 2)),
        ("drop", 0, (4, 3)),
        ("load", 1, (1, 2)),
        ("load", 0, (1, 2)),
    ]
    kinds = [type(event).__name__ for event, _ in seen]
    assert kinds[-3:] == ["LookedUp", "LoadDone", "LoadDone"]
    driver.core.check()


def test_an_error_leaves_the_driver_usable():
    driver, transport, _ = start("write-through", 2)
    try:
        driver.handle(LookedUp(now_ns=0, request="r", instance="nobody", chunks=(1,)))
    except ValueError:
        serve(driver, "r", (1,))
    assert ("store", 0, (1,)) in transport.log


def test_what_is_decided_is_carried_out_whatever_the_observer_raises():
    driver, transport, _ = start("write-back", 2)

    def fail(*_):
        raise ZeroDivisionError("a fault")

    driver._observe = fail
    for event in (
        LookedUp(now_ns=0, request="r", instance="i", chunks=(1, 2)),
        RoomAsked(now_ns=0, request="r", chunks=(1, 2)),
    ):
        with pytest.raises(ZeroDivisionError):
            driver.handle(event)
    assert transport.log == [("matched", (0,)), ("store", 0, (1, 2))]
