"""Writing a result so that it is there whole or not at all."""

import os
import tempfile
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


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and move it there, so that no reader, and no Ctrl-C, sees half of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
