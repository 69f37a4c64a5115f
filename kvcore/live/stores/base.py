"""What a store of chunks is, and the frame around each value that tells a good one from a bad one."""

import struct
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
from xxhash import xxh3_64

Parts: TypeAlias = Sequence[memoryview]
"""A chunk's bytes, in order, as one-dimensional contiguous memory: the pieces of the arena that it lies in."""

_FRAME = struct.Struct("<4sQQ")
_MAGIC = b"KVC1"
FRAME_BYTES = _FRAME.size


class StoreError(Exception):
    """A store cannot be reached, or fails. One line, without passwords."""


class StoreFull(StoreError):  # noqa: N818 - a kind of StoreError, named for what is the case
    """A store has no room for a value. It may have once others are deleted."""


class Store(Protocol):
    """Holds chunks by name. Every method may be called from several threads at once.

    A vendor's store is a factory `(url, size_bytes) -> Store` under the entry point group `kvcore.stores`, named for
    the URL's scheme.
    """

    corrupt: int
    """Chunks that were asked for and found broken. Threads count without a lock: a few may be missed under load."""

    def put(self, chunk: bytes, parts: Parts) -> None:
        """Store a chunk, whole or not at all, over any that has its name.

        Raises:
            StoreFull: no room.
            StoreError: anything else that went wrong.
        """

    def get(self, chunk: bytes, into: Parts) -> bool:
        """Fill `into` with a chunk of exactly that many bytes and return True.

        False: it is not there, or is broken, which `corrupt` counts: of another size, or with another checksum. `into`
        may then hold rubbish.

        Raises:
            StoreError: the store cannot be asked.
        """

    def delete(self, chunks: Sequence[bytes]) -> None:
        """Remove chunks; those not there are no error.

        Raises:
            StoreError: the store cannot be asked, or some could not be removed; the others may be gone.
        """

    def close(self) -> None:
        """Let go of connections and files. Nothing else may be called afterwards."""


def frame(chunk: bytes, parts: Parts) -> bytes:
    """Return the header that is stored before the parts: magic, payload length, checksum of name and payload.

    The name is summed too, so that a value under another chunk's name is as bad as a broken one.
    """
    sums = Sums(chunk, parts)
    return _FRAME.pack(_MAGIC, sums.size, sums.checksum)


def is_intact(chunk: bytes, header: bytes | memoryview, parts: Parts) -> bool:
    """Whether parts, filled from a store, are what was put under this header and name."""
    return Sums(chunk, parts).match(header)


class Sums:
    """Size and checksum of a chunk's payload, taken while its bytes come in: they are in the processor's cache then.

    Args:
        chunk: the chunk's name, which is summed too.
        parts: what is there already.
    """

    def __init__(self, chunk: bytes, parts: Parts = ()) -> None:
        self.size = 0
        self._digest = xxh3_64(chunk)
        for part in parts:
            self.add(part)

    def add(self, part: memoryview) -> None:
        """Take in the next bytes."""
        self.size += part.nbytes
        self._digest.update(part)

    @property
    def checksum(self) -> int:
        """Of name and payload so far."""
        return self._digest.intdigest()

    def match(self, header: bytes | bytearray | memoryview) -> bool:
        """Whether they are what a header says."""
        return len(header) == FRAME_BYTES and _FRAME.unpack(header) == (_MAGIC, self.size, self.checksum)


def framed(chunk: bytes, parts: Parts) -> memoryview:
    """Return a chunk as one value, with its frame. For stores that take a value in one piece."""
    value = np.empty(FRAME_BYTES + size_of(parts), np.uint8).data  # not zeroed, as a bytearray is
    value[:FRAME_BYTES] = frame(chunk, parts)
    for piece, part in zip(_cut(value, parts), parts, strict=True):
        _copy(piece, part)
    return value


def accept(chunk: bytes, value: memoryview, into: Parts) -> bool:
    """Copy a whole framed value into the parts, unless it is broken. For stores that return a value in one piece."""
    size = size_of(into)
    is_good = value.nbytes == FRAME_BYTES + size and is_intact(chunk, value[:FRAME_BYTES], _cut(value, into))
    if not is_good:
        return False
    for part, piece in zip(into, _cut(value, into), strict=True):
        _copy(part, piece)
    return True


def size_of(parts: Parts) -> int:
    """Return the bytes of all parts."""
    return sum(part.nbytes for part in parts)


def _copy(into: memoryview, source: memoryview) -> None:
    """Copy bytes with the interpreter's lock let go of, which the request loop needs meanwhile."""
    np.copyto(np.asarray(into), np.asarray(source))


def _cut(value: memoryview, like: Parts) -> list[memoryview]:
    pieces: list[memoryview] = []
    at = FRAME_BYTES
    for part in like:
        pieces.append(value[at : at + part.nbytes])
        at += part.nbytes
    return pieces
