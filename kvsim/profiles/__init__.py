"""Profiles: what prefill, decode and copies cost, by model and GPU."""

from kvsim.profiles.costs import Grid, PrefillFit, TransferCurve
from kvsim.profiles.load import ProfileError, available, load, lookup
from kvsim.profiles.profile import Part, Profile

__all__ = [
    "Grid",
    "Part",
    "PrefillFit",
    "Profile",
    "ProfileError",
    "TransferCurve",
    "available",
    "load",
    "lookup",
]
