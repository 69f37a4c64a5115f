"""Launching what Triton has compiled without Triton's own launcher, which takes longer than the driver by far.

Triton looks a kernel up and checks its arguments at every launch: 60 microseconds of host time beside an engine, more
than all else that a piece of a transfer takes together. Here the kernel is fixed and so are the kinds of its arguments,
and it is launched as the driver does it.

Source: CUDA driver API reference, "Execution Control": cuLaunchKernel. Triton passes a kernel its own arguments, then
pointers to scratch memory, which kernels that ask for none do not read; `CompiledKernel.metadata` says whether.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvkernels.arena import Ints
from kvkernels.cuda_streams import CudaStream

__all__ = ["CompiledKernel", "Launch", "check_aligned"]

_SCRATCH = 0, 0  # global_scratch (Triton 3.3) and profile_scratch (3.5); the driver reads as many as there are
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch in numbers.

    Attributes:
        function: the CUfunction.
        programs: its grid.
        threads: of each program.
        shared: bytes of memory for each.
        values: its parameters; 0 for those that are given later.
        given: the places of these.
    """

    function: int
    programs: int
    threads: int
    shared: int
    values: tuple[int, ...]
    given: tuple[int, ...] = ()


class CompiledKernel:
    """A kernel of pointers, then 32-bit integers.

    Args:
        compiled: what a launch by Triton returned: of a kernel whose pointers were all divisible by 16, and none of
            whose integers was specialised.
    """

    def __init__(self, compiled: Any) -> None:
        metadata = compiled.metadata
        if getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "profile_scratch_size", 0):
            raise ValueError("a kernel that needs scratch memory can only be launched by Triton")
        self._compiled = compiled  # it owns the module
        self._function = int(compiled.function)
        self._threads = 32 * int(metadata.num_warps)
        self._shared = int(metadata.shared)

    def launch(self, stream: CudaStream, programs: int, pointers: Sequence[int], integers: Sequence[int]) -> None:
        """Launch it.

        Raises ValueError for a pointer that is not divisible by 16, as the code that was compiled takes it to be.
        """
        check_aligned(np.array(pointers, np.int64))
        one = self.written(programs, pointers, integers)
        stream.launch_compiled(one.function, one.programs, one.threads, one.shared, one.values)

    def written(self, programs: int, pointers: Sequence[int], integers: Sequence[int]) -> Launch:
        """The launch in numbers; pointers that are 0 are given later."""
        given = tuple(place for place, pointer in enumerate(pointers) if not pointer)
        values = (*pointers, *integers, *_SCRATCH)
        return Launch(self._function, programs, self._threads, self._shared, values, given)


def check_aligned(pointers: Ints) -> None:
    """Raise ValueError for a pointer that is not divisible by 16."""
    if (pointers % _ALIGNMENT).any():
        raise ValueError("a pointer is not divisible by 16")
