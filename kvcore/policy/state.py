"""What the core knows, and the decisions of the event at hand."""

from collections import OrderedDict

from kvcore.policy.config import CoreConfig
from kvcore.policy.decisions import Decision, RefuseReason
from kvcore.policy.events import InstanceRegistered
from kvcore.policy.request import Request
from kvcore.policy.tier import Entry, Tier
from kvcore.policy.types import Chunk


class Lost:
    """Writes whose end will not be believed: their pages are held until the writer is heard of or gone."""

    __slots__ = ("entries", "fetching", "instance", "reason")

    def __init__(self, instance: str, reason: RefuseReason) -> None:
        self.instance = instance
        self.reason: RefuseReason = reason
        self.entries: dict[Chunk, Entry] = {}
        self.fetching: dict[Chunk, None] = {}
        """Those that a lower tier fills, so the engine's word is not needed."""


class State:
    """The state of a core. Only the functions of `loads`, `stores`, `ending`, `operator` and `room` change it."""

    __slots__ = (
        "config",
        "copying",
        "decisions",
        "fetches",
        "instances",
        "lost",
        "missed",
        "now_ns",
        "requests",
        "tiers",
    )

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        self.tiers = tuple(Tier(tier, config.ttl_ns) for tier in config.tiers)
        for salt, pages in config.quotas:
            self.tiers[0].set_quota(salt, pages)
        self.instances: dict[str, InstanceRegistered] = {}
        self.requests: dict[str, Request] = {}
        self.lost: dict[str, Lost] = {}
        """By the name of the request."""
        self.copying: dict[tuple[int, Chunk], Entry] = {}
        """Entries that are the source of a copy into the tier of the key; pinned until it is done."""
        self.fetches: dict[Chunk, list[Request]] = {}
        """Chunks on their way from a lower tier to tier 0, with the requests that wait for another's fetch."""
        self.missed: OrderedDict[Chunk, None] = OrderedDict()
        """Chunks that were asked for once, for the second-use admission."""
        self.now_ns = 0
        self.decisions: list[Decision] = []
        """What has been decided of the event at hand."""

    def decide(self, decision: Decision) -> None:
        """Add a decision; they are carried out in this order."""
        self.decisions.append(decision)
