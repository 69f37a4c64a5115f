"""bf16 rows kept in 0.785 of their bytes where they are long, bit for bit.

Eight bits of exponent carry about three bits of information: the values of a vector lie within a few powers of two of
its largest. A packed row keeps four bits of exponent a value, below the largest one of each vector of 128, and the
whole value of the few that lie lower still (`escapes`). A row with too many of those cannot be packed, and its chunk is
rejected.

One packed row of n values, little-endian, its parts one behind another and each padded to 16 bytes:

    int32 count            escapes
    int32 escapes[n / 64]  place in the row << 16 | the value's 16 bits, in any order; undefined beyond `count`
    uint8 bases[n / 128]   a vector each: its largest exponent - 15, or 0 where that is negative
    uint8 codes[n / 2]     64 bytes a vector: value j in the low half of byte j, value j + 64 in the high half
    uint8 rest[n]          sign << 7 | mantissa

A value's code is its exponent - base where that is 1 to 15. It is 0 for an exponent of 0, which is unpacked as 0, and
for an escape, which is unpacked whole from the list. Infinities and NaNs, of exponent 255, are nothing special.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvkernels.errors import LayoutError
from kvkernels.layouts import PagedLayout

__all__ = ["ESCAPE_SHARE", "HALF", "VECTOR", "PackedRow", "packable", "packed_layout"]

VECTOR = 128
"""Values that share a base."""
HALF = VECTOR // 2
ESCAPE_SHARE = 64
"""One value of so many may be an escape."""
_HEADER_BYTES = 16
_ALIGNMENT = 16
_MOST_VALUES = 1 << 16
"""A place must fit 16 bits."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Where the parts of one packed row of `values` bf16 values lie; offsets and sizes in bytes."""

    values: int

    @classmethod
    def of(cls, row_bytes: int) -> PackedRow:
        """The packed row of an unpacked one of so many bytes. Raises LayoutError where it has none."""
        if row_bytes % (2 * VECTOR) or not 0 < row_bytes <= 2 * _MOST_VALUES:
            raise LayoutError(f"a row of {row_bytes} bytes is not 1 to 512 vectors of {VECTOR} bf16 values")
        return cls(row_bytes // 2)

    @property
    def vectors(self) -> int:
        """Vectors in the row."""
        return self.values // VECTOR

    @property
    def capacity(self) -> int:
        """The most escapes."""
        return self.values // ESCAPE_SHARE

    @property
    def escapes(self) -> int:
        """Where the list of escapes begins; their number is at 0."""
        return _HEADER_BYTES

    @property
    def bases(self) -> int:
        """Where the bases begin."""
        return _aligned(self.escapes + 4 * self.capacity)

    @property
    def codes(self) -> int:
        """Where the codes begin."""
        return _aligned(self.bases + self.vectors)

    @property
    def rest(self) -> int:
        """Where signs and mantissas begin."""
        return _aligned(self.codes + self.values // 2)

    @property
    def nbytes(self) -> int:
        """The packed row's size."""
        return _aligned(self.rest + self.values)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def packable(layout: PagedLayout) -> bool:
    """Whether every row is one of bf16 values that can be packed; wherever it lies."""
    return layout.dtype == "bfloat16" and all(
        plane.row_bytes % (2 * VECTOR) == 0 and 0 < plane.row_bytes <= 2 * _MOST_VALUES for plane in layout.planes
    )


def packed_layout(layout: PagedLayout) -> PagedLayout:
    """The same cache with slots of packed rows: only `row_bytes`, and what follows from them, are another's.

    Offsets and strides stay those of the cache, whose own rows only the original layout knows.

    Raises:
        LayoutError: the layout is not packable.
    """
    if not packable(layout):
        raise LayoutError(f"not packable: {layout.fingerprint()}")
    planes = tuple(replace(plane, row_bytes=PackedRow.of(plane.row_bytes).nbytes) for plane in layout.planes)
    return replace(layout, planes=planes, form=layout.form + "/packed-4")
