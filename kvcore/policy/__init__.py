"""The policy core: what is cached where, and what is evicted.

Pure: no clock, no input or output, no thread, no logging. The simulator and the server run this same code.
"""

from kvcore.policy.config import CoreConfig, TierConfig
from kvcore.policy.core import Core, replay
from kvcore.policy.cost import LoadCost
from kvcore.policy.decisions import Decision, Demote, Evict, Load, Matched, Place, Refuse
from kvcore.policy.driver import Clock, Driver, Transport
from kvcore.policy.events import (
    Cleared,
    Event,
    InstanceLeft,
    InstanceRegistered,
    LeaseExpired,
    LoadDone,
    LoadFailed,
    LookedUp,
    Pinned,
    QuotaSet,
    RequestEnded,
    RoomAsked,
    StoreAborted,
    StoreCommitted,
    TierCleared,
    Unpinned,
)
from kvcore.policy.eviction import POLICIES
from kvcore.policy.loads import UnknownInstanceError
from kvcore.policy.types import Chunk

__all__ = [
    "POLICIES",
    "Chunk",
    "Cleared",
    "Clock",
    "Core",
    "CoreConfig",
    "Decision",
    "Demote",
    "Driver",
    "Event",
    "Evict",
    "InstanceLeft",
    "InstanceRegistered",
    "LeaseExpired",
    "Load",
    "LoadCost",
    "LoadDone",
    "LoadFailed",
    "LookedUp",
    "Matched",
    "Pinned",
    "Place",
    "QuotaSet",
    "Refuse",
    "RequestEnded",
    "RoomAsked",
    "StoreAborted",
    "StoreCommitted",
    "TierCleared",
    "TierConfig",
    "Transport",
    "UnknownInstanceError",
    "Unpinned",
    "replay",
]
