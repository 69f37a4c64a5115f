"""How the kernels of the sweep are compiled. Importing this imports numba, so only what runs a sweep does."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Final, ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")

_OPTIONS: Final = {"cache": True, "nogil": True, "error_model": "numpy"}


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` on its first call, keep the code on disk, and run it without the interpreter's lock."""
    return cast("Callable[P, R]", numba.njit(**_OPTIONS)(function))


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Do as `compiled` for a function that makes no arrays of its own.

    It then does without counting references to the arrays it is given, which costs more than the work itself where
    an inner loop passes arrays on.
    """
    return cast("Callable[P, R]", numba.njit(**_OPTIONS, _nrt=False)(function))


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """Do as `kernel` for a part of one, which becomes part of its caller and cannot be called otherwise."""
    part = numba.njit(**_OPTIONS, _nrt=False, forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
    return cast("Callable[P, R]", part(function))


@functools.cache
def drop_stale_code(folder: Path) -> None:
    """Delete the code kept on disk for the files of `folder` where any of them has changed since.

    Numba sees by itself that the file of a kernel has changed, but not that the file of what it calls has. Where the
    folder may not be written numba keeps its code elsewhere, and nothing is done.
    """
    changed = max(source.stat().st_mtime for source in folder.glob("*.py"))
    for index in folder.glob("__pycache__/*.nbi"):
        if index.stat().st_mtime < changed:
            with contextlib.suppress(PermissionError):
                index.unlink(missing_ok=True)
