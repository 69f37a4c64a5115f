"""A shared mapping of a file, aligned to huge pages, that outlives nobody's view of it.

Python's own mmap can neither choose an alignment (the kernel makes huge pages only where file and address agree) nor
give advice without holding the interpreter's lock, which would stop the request loop while memory is zeroed.
"""

import ctypes
import errno
import os
import weakref

import numpy as np
from numpy.typing import NDArray

HUGE_PAGE_BYTES = 2 << 20

# From <asm-generic/mman-common.h>; Python's mmap module names only some of them.
_PROT_NONE, _PROT_READ, _PROT_WRITE = 0, 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 14, 23, 25
_MAP_FAILED = ctypes.c_void_p(-1).value


class Mapping:
    """Maps the first `length` bytes of `fd`, shared, readable and writable, and owns both from then on.

    `bytes` is the mapping as a NumPy array. The memory is unmapped and the descriptor closed (and with it any flock)
    when the last array or view made from it is gone: a copy that still runs never finds its memory taken away, and a
    lock that says "somebody maps this" says so for as long as it is true.

    Raises:
        OSError: the kernel refuses to map; the descriptor is then still the caller's.
    """

    def __init__(self, fd: int, length: int) -> None:
        libc = _libc()
        address = _map_aligned(libc, fd, length)
        block = (ctypes.c_uint8 * length).from_address(address)
        release = weakref.finalize(block, _release, libc, address, length, fd)
        release.atexit = False  # the kernel does it; a daemon thread may still be copying then
        self._libc = libc
        self.fd = fd
        self.address = address
        self.bytes: NDArray[np.uint8] = np.frombuffer(memoryview(block), np.uint8)

    def advise_huge(self) -> None:
        """Ask for huge pages (MADV_HUGEPAGE); a kernel without them says no, which is not an error."""
        self._madvise(0, self.bytes.nbytes, _MADV_HUGEPAGE)

    def collapse(self, offset: int, length: int) -> int:
        """Turn a range into huge pages (MADV_COLLAPSE, Linux 6.1), contents kept. Returns 0 or the errno."""
        return self._madvise(offset, length, _MADV_COLLAPSE)

    def populate(self, offset: int, length: int) -> int:
        """Fault a range in, writable, contents kept (MADV_POPULATE_WRITE, Linux 5.14). Returns 0 or the errno."""
        return self._madvise(offset, length, _MADV_POPULATE_WRITE)

    def _madvise(self, offset: int, length: int, advice: int) -> int:
        while True:
            if self._libc.madvise(self.address + offset, length, advice) == 0:
                return 0
            code = ctypes.get_errno()
            if code != errno.EINTR:
                return code


def _map_aligned(libc: ctypes.CDLL, fd: int, length: int) -> int:
    """Map over a reservation that is one huge page too long, at the aligned address inside it; trim the rest."""
    reserved_bytes = length + HUGE_PAGE_BYTES
    base = libc.mmap(None, reserved_bytes, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    if base is None or base == _MAP_FAILED:
        raise _os_error()
    address = -(-base // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    got = libc.mmap(address, length, _PROT_READ | _PROT_WRITE, _MAP_SHARED | _MAP_FIXED, fd, 0)
    if got != address:
        error = _os_error()
        libc.munmap(base, reserved_bytes)
        raise error
    page = os.sysconf("SC_PAGE_SIZE")
    end = address + -(-length // page) * page
    if address > base:
        libc.munmap(base, address - base)
    if base + reserved_bytes > end:
        libc.munmap(end, base + reserved_bytes - end)
    return int(address)


def _release(libc: ctypes.CDLL, address: int, length: int, fd: int) -> None:
    libc.munmap(address, length)
    os.close(fd)


def _os_error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_longlong,
    )
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc
