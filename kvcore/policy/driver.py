"""Carries decisions out: the one loop that the simulator and the server share.

A shell brings a Clock and a Transport and nothing else. It reports what happened outside (an engine's request, the end
of a copy) by `Driver.handle`; no shell branches on policy.
"""

from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeAlias, assert_never

from kvcore.policy.core import Core
from kvcore.policy.decisions import Decision, Demote, Evict, Load, Matched, Place, Refuse
from kvcore.policy.events import Event


class Clock(Protocol):
    """Where events get their time from."""

    def now_ns(self) -> int:
        """Return the time, in ns, from any origin; it never runs backwards."""


class Transport(Protocol):
    """Moves bytes and frees pages as decided.

    Decisions arrive one at a time, in order. The end of a copy is an event (named with each method) that the transport
    hands to `Driver.handle`, from within the call or later.
    """

    def load(self, decision: Load) -> None:
        """Copy towards the engine. Ends in LoadDone or LoadFailed of the same request and tier."""

    def store(self, decision: Place) -> None:
        """Give room and copy away from the engine. Ends in StoreCommitted or StoreAborted of the same tier."""

    def demote(self, decision: Demote) -> None:
        """Take the bytes over, then free the pages. Ends in StoreCommitted or StoreAborted of the tier below."""

    def drop(self, decision: Evict) -> None:
        """Free the chunks' pages."""

    def refuse(self, decision: Refuse) -> None:
        """Learn that chunks are not stored or not loaded; free the pages of those that had been placed."""

    def matched(self, decision: Matched) -> None:
        """Learn what a lookup found."""


Observer: TypeAlias = Callable[[Event, tuple[Decision, ...]], None]


class Driver:
    """Feeds events to a core, in order, and its decisions to a transport.

    `observe` sees every event with its decisions before they are carried out (a journal, a recorder, metrics). Whatever
    it raises is raised behind them: the core believes that what it decided is done.
    """

    def __init__(self, core: Core, transport: Transport, observe: Observer | None = None) -> None:
        self.core = core
        self._transport = transport
        self._observe = observe
        self._waiting: deque[Event] = deque()
        self._running = False

    def handle(self, event: Event) -> None:
        """Take in an event. Called from within a transport's method, it waits until the decisions at hand are out."""
        self._waiting.append(event)
        if self._running:
            return
        self._running = True
        try:
            while self._waiting:
                self._step(self._waiting.popleft())
        finally:
            self._running = False

    def _step(self, event: Event) -> None:
        decisions = self.core.handle(event)
        try:
            if self._observe is not None:
                self._observe(event, decisions)
        finally:
            for decision in decisions:
                self._carry_out(decision)

    def _carry_out(self, decision: Decision) -> None:
        match decision:
            case Load():
                self._transport.load(decision)
            case Place():
                self._transport.store(decision)
            case Demote():
                self._transport.demote(decision)
            case Evict():
                self._transport.drop(decision)
            case Refuse():
                self._transport.refuse(decision)
            case Matched():
                self._transport.matched(decision)
            case _:
                assert_never(decision)
