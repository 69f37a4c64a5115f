"""Launching what Triton has compiled without Triton's own launcher, which takes longer than the driver by far.

Triton looks a kernel up and checks its arguments at every launch: 60 microseconds of host time beside an engine, more
than all else that a piece of a transfer takes together. Here the kernel is fixed and so are the kinds of its arguments,
and it is launched as the driver does it.

Source: CUDA driver API reference, "Execution Control": cuLaunchKernel. Triton passes a kernel its own arguments, then
pointers to scratch memory, which kernels that ask for none do not read; `CompiledKernel.metadata` says whether.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from kvkernels.cuda_streams import CudaStream

__all__ = ["CompiledKernel"]

_SCRATCH_POINTERS = 2  # global_scratch (Triton 3.3) and profile_scratch (3.5); the driver reads as many as there are
_ALIGNMENT = 16


class CompiledKernel:
    """A kernel of pointers, then 32-bit integers.

    Args:
        compiled: what a launch by Triton returned.
        pointers: how many pointers it takes, all divisible by 16.
        integers: how many integers, none of which was specialised.
    """

    def __init__(self, compiled: Any, *, pointers: int, integers: int) -> None:
        metadata = compiled.metadata
        if getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "profile_scratch_size", 0):
            raise ValueError("a kernel that needs scratch memory can only be launched by Triton")
        self._compiled = compiled  # it owns the module
        self._function = int(compiled.function)
        self._threads = 32 * int(metadata.num_warps)
        self._shared = int(metadata.shared)
        self._pointers = (ctypes.c_uint64 * (pointers + _SCRATCH_POINTERS))()
        self._integers = (ctypes.c_int32 * integers)()
        addresses = [ctypes.addressof(self._pointers) + 8 * i for i in range(pointers)]
        addresses += [ctypes.addressof(self._integers) + 4 * i for i in range(integers)]
        addresses += [ctypes.addressof(self._pointers) + 8 * (pointers + i) for i in range(_SCRATCH_POINTERS)]
        self._arguments = (ctypes.c_void_p * len(addresses))(*addresses)

    def launch(self, stream: CudaStream, programs: int, pointers: Sequence[int], integers: Sequence[int]) -> None:
        """Launch it; the driver has read the arguments when this returns.

        Raises ValueError for a pointer that is not divisible by 16, as the code that was compiled takes it to be.
        """
        if any(pointer % _ALIGNMENT for pointer in pointers):
            raise ValueError("a pointer is not divisible by 16")
        for i, pointer in enumerate(pointers):
            self._pointers[i] = pointer
        for i, integer in enumerate(integers):
            self._integers[i] = integer
        stream.launch_compiled(self._function, programs, self._threads, self._shared, self._arguments)
