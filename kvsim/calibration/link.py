"""A profile's link by what an engine's connector has copied over it."""

from collections.abc import Mapping
from dataclasses import replace

from kvsim.profiles import Part, Profile, TransferCurve

LEAST_BYTES = 256 * 2**20
"""Copies of less than this altogether say little of a link."""


def linked(profile: Profile, copied: Mapping[str, tuple[float, float]]) -> Profile:
    """Return the profile with its link as measured, in the directions in which enough was copied.

    Args:
        profile: Of the engine.
        copied: Bytes of all ranks and the sum of the ranks' seconds, by `h2d` and `d2h`, by the device's clock.
    """
    enough = {way: one for way, one in copied.items() if one[0] >= LEAST_BYTES and one[1] > 0}
    if not enough:
        return profile
    curves = {
        way: TransferCurve(sizes=(2**30,), bytes_per_s=(profile.tensor_parallel * nbytes / seconds,))
        for way, (nbytes, seconds) in enough.items()
    }
    said = ", ".join(f"{nbytes / 1e9:.1f} GB {way}" for way, (nbytes, _) in sorted(enough.items()))
    assumed = [way for way in ("d2h", "h2d") if way not in enough]
    error = "one rate for all sizes, beside whatever the engine computed"
    if assumed:
        error += f"; {assumed[0]}: {profile.provenance['pcie'].source}"
    part = Part(kind="measured", source=f"kvcore's copies so far, by the device's clock: {said}", error=error)
    return replace(profile, transfers={**profile.transfers, **curves}, provenance={**profile.provenance, "pcie": part})
