"""Writing a result so that it is there whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvsim.errors import UsageError


def check_writable(path: Path) -> None:
    """Raise UsageError if no file can be put at `path`: before the work, not after it."""
    if path.is_dir():
        raise UsageError(f"{path}: is a folder, not a file")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path}: the folder {path.parent} cannot be written to")


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, if it is not there. Raises UsageError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: the folder cannot be made: {error.strerror}") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a place beside `path` to write to, and move it there once that is done.

    No reader, and no Ctrl-C, sees half a file. The place's name ends like the file's, for what goes by that.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=f".{path.name}")
    os.close(handle)
    try:
        yield Path(name)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with whole(path) as place:
        place.write_text(text, encoding="utf-8")
