"""How much slower a GPU computes for having computed without rest: its clock follows the power it has drawn of late."""

import math

MEMORY_S = 0.5
"""Time in which a GPU forgets."""
WARM, HOT = 0.75, 0.95
"""The heat from which on it slows down, and at which it is as slow as it gets."""
READING = 0.5
"""A step's heat where its time goes to reading weights and KV, as a decode step's does."""


class Heat:
    """The power that an engine's GPU has drawn of late, from 0, idle, to 1, computing prompts without rest.

    An H100 that multiplied matrices for a quarter of a second at a time ran at one speed, within 1%, as long as it
    rested two fifths of the time, 1.5% slower with a fifth, and 6% slower without; from a rest it took 0.7 s until it
    slowed down (benchmarks/results/power-h100.json, which the constants are read off). That steps of decodes draw
    about half is an estimate, after Patel et al., "Splitwise" (ISCA 2024), who find the power of token generation far
    below that of the prompt phase.

    Args:
        sustained: Time of a prefill without rest, over its time with; 1: it makes no difference.
    """

    __slots__ = ("_heat", "_slower", "_until")

    def __init__(self, sustained: float) -> None:
        self._slower = sustained - 1
        self._heat = 0.0
        self._until = 0.0

    def took(self, now: float, seconds: float, computing: float) -> float:
        """Return what a step that begins now takes, in seconds.

        Args:
            now: When it begins.
            seconds: What it takes on a GPU that has rested.
            computing: How much of this goes to computing prompts, in seconds: what a step of one token does not take.
        """
        if not self._slower:
            return seconds
        self._towards(0.0, now)
        warm = min(1.0, max(0.0, self._heat - WARM) / (HOT - WARM))
        return seconds + self._slower * warm * max(0.0, computing)

    def ran(self, began: float, ended: float, computing: float) -> None:
        """Take in a step, or a run of them, from `began` to `ended`; `computing` as in `took`."""
        if self._slower and ended > began:
            self._towards(0.0, began)
            share = min(1.0, max(0.0, computing) / (ended - began))
            self._towards(READING + (1 - READING) * share, ended)

    def _towards(self, level: float, when: float) -> None:
        """Draw power of one level until `when`; nothing, where that is past."""
        if when > self._until:
            self._heat = level + (self._heat - level) * math.exp((self._until - when) / MEMORY_S)
            self._until = when
