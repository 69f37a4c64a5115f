"""L1: one file of pages in shared memory, which a server hands out and engines' workers map and copy by themselves.

The file `<folder>/kvcore-<name>.arena` is: a header, the tables (a generation and a writer's mark for each page, and
the processes that may write), then the pages, from a huge page's boundary on. Beside it lie `.lock`, which the one
server holds exclusively, `.sock`, on which the server watches its workers, and `.held` (`kvcore.live.held`). Workers
hold a shared lock on the arena itself, so an exclusive one proves that nobody maps it.

A server that dies leaves the arena; the next one takes it over, in place, under a raised epoch.
"""

import fcntl
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from kvcore.live.copies import Bytes, Generations, Reader, StaleChunk, Writer, pieces, views
from kvcore.live.limits import ArenaError, check_size, gib, read_limits
from kvcore.live.mapping import HUGE_PAGE_BYTES, Mapping
from kvcore.live.pretouch import Pretouch, Progress
from kvcore.live.writers import MEMBER, MEMBER_SLOTS, WriterTable

__all__ = ["Arena", "ArenaError", "ArenaPaths", "Reader", "StaleChunk", "Writer", "pieces", "views"]

DEFAULT_PAGE_BYTES: Final = 2 << 20
MAX_PAGES: Final = 1 << 31
_MAGIC = b"KVCARENA"
_FORMAT = 1
_HEADER_BYTES = 4096
_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("format", "<u4"),
        ("writers_counter", "<u4"),
        ("page_bytes", "<u8"),
        ("pages", "<u8"),
        ("epoch", "<u8"),
        ("server_pid", "<u8"),
        ("unjournaled", "<u8"),
    ]
)


@dataclass(frozen=True, slots=True)
class ArenaPaths:
    """The files of one arena.

    Raises:
        ArenaError: the name is not of letters, digits, `.`, `_` and `-`.
    """

    folder: Path
    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", self.name):
            raise ArenaError(f"an arena's name is of letters, digits and ._-, not {self.name!r}")

    @property
    def arena(self) -> Path:
        """The arena itself."""
        return self.folder / f"kvcore-{self.name}.arena"

    @property
    def lock(self) -> Path:
        """Held exclusively by the server."""
        return self.folder / f"kvcore-{self.name}.lock"

    @property
    def held(self) -> Path:
        """What the server holds, in brief (`kvcore.live.held`)."""
        return self.folder / f"kvcore-{self.name}.held"

    @property
    def socket(self) -> Path:
        """Where the server may listen for its workers' connections; whoever makes it removes it."""
        return self.folder / f"kvcore-{self.name}.sock"


class Arena:
    """An arena mapped into this process. Made by `open` (a server) or `attach` (a worker)."""

    def __init__(self, path: Path, mapping: Mapping, layout: "_Layout", lock: "_ServerLock | None") -> None:
        self.path = path
        self.page_bytes = layout.page_bytes
        self.pages = layout.pages
        self.taken_over = False
        self._lock = lock
        self._views: _Views | None = _Views(mapping, layout)
        self._pretouch: Pretouch | None = None

    @classmethod
    def open(cls, paths: ArenaPaths, *, size_bytes: int, page_bytes: int = DEFAULT_PAGE_BYTES) -> Self:
        """Start as a server: take over what an earlier one left, else create.

        What lies there with another format or size is removed if nobody maps it.

        Raises:
            ArenaError: another server runs on it, somebody maps it and it differs, or it cannot be created.
        """
        layout = _Layout.of(size_bytes, page_bytes)
        lock = _ServerLock(paths.lock)
        try:
            found = _Found.at(paths.arena)
            if found is not None and found.layout == layout:
                return cls._take_over(paths, found, layout, lock)
            if found is not None:
                found.remove(paths.arena, layout)
            return cls._create(paths, layout, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def attach(cls, path: Path) -> Self:
        """Map a server's arena into a worker, readable and writable.

        Raises:
            ArenaError: there is none, it is of another format, or it is not this user's.
        """
        while True:
            found = _Found.must_be_at(path)
            fcntl.flock(found.fd, fcntl.LOCK_SH)
            if _is_file_at(found.fd, path):
                break
            found.close()  # removed, perhaps replaced, between open and lock
        layout = found.known_layout()
        return cls(path, found.map(layout), layout, None)

    @classmethod
    def _create(cls, paths: ArenaPaths, layout: "_Layout", lock: "_ServerLock") -> Self:
        check_size(layout.file_bytes, paths.folder, read_limits(paths.folder))
        try:
            fd = os.open(paths.arena, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ArenaError(f"{paths.arena}: {error.strerror}") from error
        try:
            mapping = _reserve(paths.arena, fd, layout)
            arena = cls(paths.arena, mapping, layout, lock)
            arena._format(layout)
        except BaseException:
            with suppress(FileNotFoundError):
                paths.arena.unlink()
            raise
        return arena

    @classmethod
    def _take_over(cls, paths: ArenaPaths, found: "_Found", layout: "_Layout", lock: "_ServerLock") -> Self:
        nobody_maps = found.nobody_maps()
        arena = cls(paths.arena, found.map(layout), layout, lock)
        header = arena._opened.header
        header["epoch"] = max(int(header["epoch"][0]) + 1, time.time_ns())
        header["server_pid"] = os.getpid()
        header["unjournaled"] = 0
        arena.taken_over = True
        if nobody_maps:
            arena.writers.clear()
        return arena

    def _format(self, layout: "_Layout") -> None:
        """Write the header of a new file, which is all zeros; the magic last, as it says that the rest is there."""
        header = self._opened.header
        header["format"] = _FORMAT
        header["page_bytes"] = layout.page_bytes
        header["pages"] = layout.pages
        header["epoch"] = time.time_ns()
        header["server_pid"] = os.getpid()
        header["magic"] = _MAGIC

    @property
    def size_bytes(self) -> int:
        """Bytes of all pages."""
        return self.pages * self.page_bytes

    @property
    def data(self) -> Bytes:
        """The pages as one-dimensional uint8, shape (pages * page_bytes,)."""
        return self._opened.data

    @property
    def buffer(self) -> memoryview:
        """The pages as writable memory."""
        return self._opened.data.data

    @property
    def address(self) -> int:
        """Where the first page lies in this process; a multiple of 2 MiB."""
        return int(self._opened.data.ctypes.data)

    @property
    def generations(self) -> Generations:
        """How many times each page has been handed out, uint64, shape (pages,). Only the allocator writes it."""
        return self._opened.generations

    @property
    def page_writers(self) -> NDArray[np.uint32]:
        """Which writer may be writing each page, uint32, shape (pages,). Only the allocator writes it."""
        return self._opened.page_writers

    @property
    def writers(self) -> WriterTable:
        """The processes that may write. Only the server changes it."""
        return self._opened.writers

    @property
    def epoch(self) -> int:
        """Raised by every server that starts on this arena; a worker that sees it change must register again."""
        return int(self._opened.header["epoch"][0])

    @property
    def unjournaled(self) -> bool:
        """Whether this epoch's server went on without the journal that it had begun."""
        return bool(self._opened.header["unjournaled"][0])

    def mark_unjournaled(self) -> None:
        """Note, where no full disk is in the way, that from now on no journal tells what the pages hold."""
        self._opened.header["unjournaled"] = 1

    @property
    def is_current(self) -> bool:
        """Whether `path` still leads here. False after a clean stop of the server: attach anew."""
        return self._views is not None and _is_file_at(self._views.mapping.fd, self.path)

    def pretouch(self, *, huge_pages: bool = True, progress: Progress | None = None) -> Pretouch:
        """Start to fault all pages in, in the background; contents are kept. `close` stops it."""
        opened = self._opened
        self._pretouch = Pretouch(
            opened.mapping,
            offset=opened.data_offset,
            length=self.size_bytes,
            huge_pages=huge_pages,
            progress=progress,
        )
        return self._pretouch

    def close(self, *, unlink: bool | None = None) -> None:
        """Let go of the arena. A server's is removed with it, unless told otherwise (`unlink=False`).

        Arrays and views that others still hold stay valid, and keep the memory and a worker's lock until they go.
        """
        if self._views is None:
            return
        if self._pretouch is not None:
            self._pretouch.stop()
            self._pretouch = None
        if unlink if unlink is not None else self._lock is not None:
            with suppress(FileNotFoundError):
                self.path.unlink()
        self._views = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _opened(self) -> "_Views":
        if self._views is None:
            raise ArenaError(f"{self.path} has been closed")
        return self._views


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things lie in the file."""

    page_bytes: int
    pages: int

    @classmethod
    def of(cls, size_bytes: int, page_bytes: int) -> Self:
        system_page = os.sysconf("SC_PAGE_SIZE")
        if page_bytes <= 0 or page_bytes % system_page:
            raise ArenaError(f"a page of {page_bytes} bytes is no multiple of the system's {system_page}")
        pages = size_bytes // page_bytes
        if not 0 < pages <= MAX_PAGES:
            raise ArenaError(
                f"{gib(size_bytes)} in pages of {page_bytes} bytes are {pages} pages, not 1 to {MAX_PAGES}"
            )
        return cls(page_bytes, pages)

    @property
    def writers_offset(self) -> int:
        return _HEADER_BYTES

    @property
    def generations_offset(self) -> int:
        return _HEADER_BYTES + MEMBER_SLOTS * MEMBER.itemsize

    @property
    def page_writers_offset(self) -> int:
        return self.generations_offset + self.pages * 8

    @property
    def data_offset(self) -> int:
        end = self.page_writers_offset + self.pages * 4
        return -(-end // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES

    @property
    def file_bytes(self) -> int:
        return self.data_offset + self.pages * self.page_bytes


class _Views:
    """The mapping, cut up by a layout."""

    def __init__(self, mapping: Mapping, layout: _Layout) -> None:
        def cut(offset: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
            return mapping.bytes[offset : offset + count * dtype.itemsize].view(dtype)

        self.mapping = mapping
        self.data_offset = layout.data_offset
        self.header = cut(0, 1, _HEADER)
        self.generations: Generations = cut(layout.generations_offset, layout.pages, np.dtype("<u8"))
        self.page_writers: NDArray[np.uint32] = cut(layout.page_writers_offset, layout.pages, np.dtype("<u4"))
        slots = cut(layout.writers_offset, MEMBER_SLOTS, MEMBER)
        self.writers = WriterTable(slots, self.header["writers_counter"])
        self.data: Bytes = mapping.bytes[layout.data_offset : layout.file_bytes]


class _Found:
    """A file that lies where an arena should, opened; `layout` is None if it is none of this format."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self._path = path
        self.layout: _Layout | None = None
        if os.fstat(fd).st_uid != os.geteuid():
            raise ArenaError(f"{path} belongs to another user")
        raw = os.pread(fd, _HEADER.itemsize, 0)
        if len(raw) == _HEADER.itemsize:
            header = np.frombuffer(raw, _HEADER)[0]
            if header["magic"] == _MAGIC and header["format"] == _FORMAT:
                layout = _Layout(int(header["page_bytes"]), int(header["pages"]))
                self.layout = layout if os.fstat(fd).st_size == layout.file_bytes else None

    @classmethod
    def at(cls, path: Path) -> Self | None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ArenaError(f"{path}: {error.strerror}") from error
        try:
            return cls(fd, path)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def must_be_at(cls, path: Path) -> Self:
        found = cls.at(path)
        if found is None:
            raise ArenaError(f"{path}: no arena there")
        return found

    def known_layout(self) -> _Layout:
        if self.layout is None:
            self.close()
            raise ArenaError(f"{self._path}: not an arena of format {_FORMAT}")
        return self.layout

    def map(self, layout: _Layout) -> Mapping:
        try:
            return Mapping(self.fd, layout.file_bytes)
        except OSError as error:
            self.close()
            raise ArenaError(f"cannot map an arena of {gib(layout.file_bytes)}: {error.strerror}") from error

    def nobody_maps(self) -> bool:
        """Whether an exclusive lock can be had, which workers' shared ones prevent."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        return True

    def remove(self, path: Path, wanted: _Layout) -> None:
        try:
            if not self.nobody_maps():
                was = "another format" if self.layout is None else _describe(self.layout)
                raise ArenaError(
                    f"{path} is {was}, not {_describe(wanted)}, and is still mapped: stop the engines on it"
                )
            path.unlink()
        finally:
            self.close()

    def close(self) -> None:
        os.close(self.fd)


class _ServerLock:
    """The right to be the one server of an arena, held by a lock on a file that is removed on release.

    Raises:
        ArenaError: another process holds it, or the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise ArenaError(f"{path}: {error.strerror}") from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
                os.close(fd)
                raise ArenaError(f"{path} is held by the server with process id {holder or 'unknown'}") from None
            if _is_file_at(fd, path):
                break
            os.close(fd)  # its holder removed it between our open and our lock
        os.truncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd

    def release(self) -> None:
        """Remove the file, then give the lock up."""
        with suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._fd)


def _reserve(path: Path, fd: int, layout: _Layout) -> Mapping:
    """Give a new file its memory now, so that no later touch of it can fail. Closes the descriptor on failure."""
    try:
        os.posix_fallocate(fd, 0, layout.file_bytes)
        mapping = Mapping(fd, layout.file_bytes)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            limits = read_limits(path.parent)
            raise ArenaError(
                f"cannot reserve {gib(layout.file_bytes)} in {path.parent}: {error.strerror} ({limits})"
            ) from error
        raise
    mapping.advise_huge()
    return mapping


def _is_file_at(fd: int, path: Path) -> bool:
    ours = os.fstat(fd)
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def _describe(layout: _Layout) -> str:
    return f"{layout.pages} pages of {layout.page_bytes} bytes"
