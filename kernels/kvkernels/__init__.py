"""Transfers between an engine's paged KV cache and chunk slots in host memory.

`describe` works out a cache's layout, `best_backend` measures the backends and returns the fastest, and every backend
is a `Transfer`. Slots hold blocks as they are or, where `packable`, packed. Importing this package imports NumPy only;
torch, Triton, CUDA and JAX are imported by the backend that uses them.
"""

from kvkernels.arena import Arena, HostArena
from kvkernels.errors import DeviceError, LayoutError, RequestError
from kvkernels.layouts import PagedLayout, Plane, describe
from kvkernels.packing import packable, packed_layout
from kvkernels.slots import Piece, Slot, Slots
from kvkernels.transfer import DoneHandle, Handle, Measured, Transfer

__all__ = [
    "Arena",
    "DeviceError",
    "DoneHandle",
    "Handle",
    "HostArena",
    "LayoutError",
    "Measured",
    "PagedLayout",
    "Piece",
    "Plane",
    "RequestError",
    "Slot",
    "Slots",
    "Transfer",
    "describe",
    "packable",
    "packed_layout",
]
