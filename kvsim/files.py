"""Writing a result so that it is there whole or not at all, and never over what it was made from."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvsim.errors import UsageError


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path] = ()) -> None:
    """Raise UsageError if files cannot be put at `outputs`: before the work, not after it.

    None is an output that was not asked for. No output may be one of the inputs, nor another output.
    """
    read = list(inputs)
    written: list[Path] = []
    for path in outputs:
        if path is None:
            continue
        target = _target(path)
        if any(_same(target, one) for one in read):
            raise UsageError(f"{path}: is read by this command, and would be written over")
        if any(_same(target, one) for one in written):
            raise UsageError(f"{path}: is named as an output twice")
        if not target.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {target.parent}")
        _check_folder(target.parent, path)
        written.append(target)


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, if it is not there. Raises UsageError if it cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: the folder cannot be made: {error.strerror}") from error
    _check_folder(path, path)


def files_read(traces: Sequence[str], journal: Path | None = None, *others: str | Path | None) -> list[Path]:
    """Return the files that a command reads: its logs', its journal's, and others where they are files.

    Raises LogError for a trace that names none.
    """
    from kvtraces.journal import segments  # noqa: PLC0415 - loaded when a command writes
    from kvtraces.sources import expand  # noqa: PLC0415

    logs = [file for stream in expand(traces) for file in stream.files]
    recorded = [] if journal is None else segments(journal)
    return [*logs, *recorded, *(Path(other) for other in others if other is not None and Path(other).is_file())]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a place to write to, in a folder beside `path`, and move what is there to `path` once that is done.

    No reader, and no Ctrl-C, sees half a file; a symbolic link stays one, and what it leads to is replaced. The place's
    name is the file's, for what goes by that. Raises UsageError where it cannot be written.
    """
    target = _target(path)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".kvsim-", ignore_cleanup_errors=True) as folder:
            place = Path(folder) / target.name
            yield place
            place.replace(target)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all. Raises UsageError where it cannot be written."""
    with whole(path) as place:
        place.write_text(text, encoding="utf-8")


def _target(path: Path) -> Path:
    """Return the file that a path leads to, which may not be there yet. Raises UsageError for what is no file."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise UsageError(f"{path}: is a symbolic link that leads to itself")
    if target.is_dir():
        raise UsageError(f"{path}: is a folder, not a file")
    if target.exists() and not target.is_file():
        raise UsageError(f"{path}: is a device or a pipe, not a file")
    return target


def _same(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)


def _check_folder(folder: Path, path: Path) -> None:
    """Raise UsageError where a folder takes no files, whatever its permissions say."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{path}: the folder {folder} cannot be written to: {error.strerror}") from error
