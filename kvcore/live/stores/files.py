"""The embedded store: a folder with one file for each chunk."""

import errno
import fcntl
import itertools
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from kvcore.live.stores.base import (
    FRAME_BYTES,
    Parts,
    StoreError,
    StoreFull,
    Sums,
    frame,
    size_of,
)

_SHARDS = 256
_NAME = re.compile(r"(?:[0-9a-f]{2}){1,64}")
_MAX_VECTOR = 1024  # IOV_MAX of Linux
_SUMMED_BYTES = 1 << 20
"""Read and summed at a time: a core's own cache holds them in between, which makes reading a fifth faster."""
_OF_ONE_FILE = frozenset((errno.EIO, errno.EACCES, errno.EPERM, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA))
"""What a file fails with that is itself the fault: bad blocks, a damaged inode, a strange owner."""


class FileStore:
    """Chunks as files `<folder>/<first byte of the name>/<name>`, in hex, up to `size_bytes` of them in all.

    A file is written beside its place and renamed into it, so a reader finds all of it or nothing. It is not synced: a
    machine that goes down may leave files that their checksum refuses. What a killed server had half written is removed
    by the next. One server at a time may use a folder.

    Files of an earlier run are found when they matter: a scan or a delete looks into the folder at hand, the first put
    under a limit into all 256, for some milliseconds per thousand files. `used_bytes` is too low until then.

    Raises:
        StoreError: the folder cannot be used, or another server uses it.
    """

    def __init__(self, folder: Path, size_bytes: int | None = None) -> None:
        self.corrupt = 0
        self.size_bytes = size_bytes
        self._folder = folder
        self._lock = threading.Lock()
        self._sizes: tuple[dict[bytes, int], ...] = tuple({} for _ in range(_SHARDS))
        """Of the files known of, by folder."""
        self._used = 0
        self._unknown = set(range(_SHARDS))
        self._numbers = itertools.count()
        self._parts_folder = folder / "parts"
        try:
            self._parts_folder.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _store_error(folder, error) from error
        try:
            self._claim()
        except BaseException:
            os.close(self._lock_fd)
            raise

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in self._parts_folder.iterdir():
                leftover.unlink()
        except BlockingIOError:
            raise StoreError(f"files:{self._folder}: another server uses this folder") from None
        except OSError as error:
            raise _store_error(self._folder, error) from error

    @property
    def used_bytes(self) -> int:
        """Bytes of the files known of."""
        return self._used

    def put(self, chunk: bytes, parts: Parts) -> None:
        """Write a file. See `Store.put`."""
        header = memoryview(frame(chunk, parts))
        size = header.nbytes + size_of(parts)
        before = self._reserve(chunk, size)
        part = self._parts_folder / str(next(self._numbers))
        try:
            _write(part, [header, *parts])
            place = self._place(chunk)
            place.parent.mkdir(exist_ok=True)
            part.replace(place)
        except BaseException as error:
            with suppress(OSError):
                part.unlink()
            self._account(chunk, before)
            if isinstance(error, OSError):
                raise _store_error(self._folder, error) from error
            raise

    def get(self, chunk: bytes, into: Parts) -> bool:
        """Read a file. One that is broken, or cannot be read, is removed. See `Store.get`."""
        try:
            is_good = _read(self._place(chunk), chunk, into)
        except FileNotFoundError as error:
            if self._is_away():
                raise _store_error(self._folder, error) from error
            return False
        except OSError as error:
            if error.errno not in _OF_ONE_FILE:
                raise _store_error(self._folder, error) from error
            self.delete([chunk])  # where that fails, too, it is the folder's fault
            is_good = False
        else:
            if not is_good:
                with suppress(StoreError):  # a miss all the same; it only takes room
                    self.delete([chunk])
        self.corrupt += not is_good
        return is_good

    def delete(self, chunks: Sequence[bytes]) -> None:
        """Remove files, all that can be. See `Store.delete`."""
        failure: StoreError | None = None
        for chunk in chunks:
            try:
                self._remove(chunk)
            except StoreError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def scan(self) -> Iterator[tuple[bytes, int]]:
        """List the chunks there and their sizes in bytes, frame included, folder after folder.

        What comes or goes meanwhile may be listed or not. For a server that starts: what its core does not know of
        takes room for nothing.

        Raises:
            StoreError: a folder cannot be read.
        """
        for shard in range(_SHARDS):
            with self._lock:
                self._look_into(shard)
                found = [*self._sizes[shard].items()]
            yield from found

    def close(self) -> None:
        """Let the folder go."""
        os.close(self._lock_fd)

    def _is_away(self) -> bool:
        """Whether it is the disk that is not there at the moment, rather than a file."""
        return not self._parts_folder.is_dir()

    def _remove(self, chunk: bytes) -> None:
        with self._lock:
            self._look_into(chunk[0])
            try:
                self._place(chunk).unlink()
            except OSError as error:
                if not isinstance(error, FileNotFoundError) or self._is_away():
                    raise _store_error(self._folder, error) from error
            self._set_size(chunk, None)

    def _place(self, chunk: bytes) -> Path:
        return self._folder / f"{chunk[0]:02x}" / chunk.hex()

    def _reserve(self, chunk: bytes, size: int) -> int | None:
        """Count a file before it is written. Returns the size that the chunk's file has so far."""
        with self._lock:
            if self.size_bytes is None:
                self._look_into(chunk[0])
                return self._set_size(chunk, size)
            for shard in sorted(self._unknown):
                self._look_into(shard)
            wanted = self._used - self._sizes[chunk[0]].get(chunk, 0) + size
            if wanted > self.size_bytes:
                raise StoreFull(f"files:{self._folder}: {size} bytes more are {wanted} of {self.size_bytes}")
            return self._set_size(chunk, size)

    def _account(self, chunk: bytes, size: int | None) -> None:
        with self._lock:
            self._set_size(chunk, size)

    def _set_size(self, chunk: bytes, size: int | None) -> int | None:
        sizes = self._sizes[chunk[0]]
        before = sizes.pop(chunk, None)
        self._used += (size or 0) - (before or 0)
        if size is not None:
            sizes[chunk] = size
        return before

    def _look_into(self, shard: int) -> None:
        """Learn of an earlier run's files in a shard's folder, once. The lock is held."""
        if shard not in self._unknown:
            return
        try:
            with os.scandir(self._folder / f"{shard:02x}") as entries:
                for entry in entries:
                    if _NAME.fullmatch(entry.name) and entry.name.startswith(f"{shard:02x}"):  # others are not ours
                        self._set_size(bytes.fromhex(entry.name), entry.stat().st_size)
        except FileNotFoundError:
            pass  # no chunk of this shard has been stored yet
        except OSError as error:
            raise _store_error(self._folder, error) from error
        self._unknown.discard(shard)


def _write(path: Path, parts: Parts) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        left = list(parts)
        while left:
            _advance(left, os.writev(fd, left[:_MAX_VECTOR]))
    finally:
        os.close(fd)


def _read(path: Path, chunk: bytes, into: Parts) -> bool:
    """Fill the parts. Returns whether the file has exactly their bytes, as they were put under this name."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header, sums = bytearray(FRAME_BYTES), Sums(chunk)
        if os.fstat(fd).st_size != FRAME_BYTES + size_of(into) or not _fill(fd, memoryview(header)):
            return False
        for part in into:
            for at in range(0, part.nbytes, _SUMMED_BYTES):
                piece = part[at : at + _SUMMED_BYTES]
                if not _fill(fd, piece):
                    return False
                sums.add(piece)
        return sums.match(header)
    finally:
        os.close(fd)


def _fill(fd: int, piece: memoryview) -> bool:
    while piece:
        count = os.readv(fd, [piece])
        if count == 0:
            return False
        piece = piece[count:]
    return True


def _advance(parts: list[memoryview], count: int) -> None:
    """Drop the first `count` bytes, as the kernel may take fewer than asked (2 GiB at most at a time)."""
    done = 0
    while done < len(parts) and count >= parts[done].nbytes:
        count -= parts[done].nbytes
        done += 1
    del parts[:done]
    if count:
        parts[0] = parts[0][count:]


def _store_error(folder: Path, error: OSError) -> StoreError:
    kind = StoreFull if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else StoreError
    return kind(f"files:{folder}: {error.strerror}")
