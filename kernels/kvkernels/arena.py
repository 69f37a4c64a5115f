"""Host memory that chunk slots lie in."""

from __future__ import annotations

from mmap import mmap
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Arena", "HostArena"]

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


class Arena(Protocol):
    """A run of host bytes that slots point into, and which parts of it a GPU's copy engine can reach.

    `split_bytes` is non-zero where the arena was registered with CUDA in slices of that size: no single copy may
    cross from one slice into the next, since the driver knows each slice as an allocation of its own.
    """

    @property
    def array(self) -> Bytes:
        """The whole arena as one-dimensional bytes."""
        ...

    @property
    def address(self) -> int:
        """Where its first byte lies in this process."""
        ...

    @property
    def split_bytes(self) -> int:
        """Size of a registered slice, 0 where there are none."""
        ...

    def pinned(self, offsets: Ints, lengths: Ints) -> bool:
        """Whether every byte of these ranges can be copied by a GPU without a bounce."""
        ...

    def defer(self, seconds: float) -> None:
        """Put off pinning more of it in the background, if that goes on, for so long: it stalls the device's calls."""
        ...


class HostArena:
    """An arena over any writable buffer: an mmap, a memoryview, a NumPy array or a torch CPU tensor of bytes.

    Args:
        buffer: the memory; a reference is kept for as long as the arena lives.
        is_pinned: whether CUDA knows all of it (pinned or registered as one allocation).

    Raises:
        ValueError: the buffer is read-only, not one-dimensional bytes, or not contiguous.
    """

    def __init__(self, buffer: Any, *, is_pinned: bool = False) -> None:
        self._array = _as_bytes(buffer)
        self._address = int(self._array.ctypes.data)  # asked for at every copy, and slow to ask NumPy for
        self._is_pinned = is_pinned

    @property
    def array(self) -> Bytes:
        """The whole arena as one-dimensional bytes."""
        return self._array

    @property
    def address(self) -> int:
        """Where its first byte lies in this process."""
        return self._address

    @property
    def split_bytes(self) -> int:
        """No slices."""
        return 0

    def pinned(self, offsets: Ints, lengths: Ints) -> bool:
        """As told at construction."""
        return self._is_pinned

    def defer(self, seconds: float) -> None:
        """Nothing goes on in the background."""


def _as_bytes(buffer: Any) -> Bytes:
    if hasattr(buffer, "numpy"):
        array: Bytes = buffer.numpy()
    elif isinstance(buffer, np.ndarray):
        array = buffer
    else:
        view = memoryview(buffer) if isinstance(buffer, mmap) else buffer
        array = np.frombuffer(view, dtype=np.uint8)
    if array.dtype != np.uint8 or array.ndim != 1 or not array.flags.c_contiguous:
        raise ValueError(f"an arena is one dimension of contiguous bytes, not {array.dtype} of shape {array.shape}")
    if not array.flags.writeable:
        raise ValueError("the arena's buffer is read-only")
    return array
