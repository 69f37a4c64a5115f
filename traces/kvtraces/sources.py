"""Where logs lie: files, globs, folders and rotated sets; plain, gz or zst."""

import glob
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from kvtraces.errors import BadRows, LogError

PIECE_BYTES = 4 << 20
_COMPRESSED_READ = 128 << 10
_LOG_NAME = re.compile(r".+\.(jsonl|json|csv)(\.[1-9]\d*)?(\.gz|\.zst)?$")
# Ours counts up (prod.jsonl, prod.1.jsonl, ...: nothing is ever renamed); logrotate's counts down to the newest.
_ROTATED = re.compile(r"(?P<stem>.+?)(?:\.(?P<up>[1-9]\d*))?\.jsonl(?:\.(?P<down>[1-9]\d*))?(?:\.gz|\.zst)?$")
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}

Progress = Callable[[int, int], None]
"""Called with bytes read so far and bytes in all, as they lie on disk."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One recording: a file, or the files of a rotated set in the order in which they were written."""

    files: tuple[Path, ...]


def expand(paths: str | Path | Sequence[str | Path]) -> list[Stream]:
    """Return the recordings that `paths` name, in the order given; a file named twice, by whatever path, counts once.

    A path is a file, a glob, a folder (its .jsonl, .json and .csv files, compressed or not, at any depth, by name), or
    the base name of a rotated set, which stands for the whole set (`prod.jsonl` for `prod.jsonl`, `prod.1.jsonl`, ...;
    `prod.1.jsonl` for itself alone). Raises LogError for a path that names no file.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    found: dict[Path, Path] = {}
    for path in paths:
        for file in _files(Path(path)):
            found.setdefault(file.resolve(), file)
    streams: dict[object, dict[int, Path]] = {}
    for file in found.values():
        members = streams.setdefault(_set_of(file.parent.resolve() / file.name), {})
        twin = members.setdefault(rotation_number(file), file)
        if twin is not file:
            raise LogError(file, None, None, f"is the same log as {twin.name} in another compression; name one of them")
    return [Stream(tuple(files[number] for number in sorted(files))) for files in streams.values()]


def rotated_set(path: Path) -> list[Path]:
    """Return the files of the rotated set whose base name is `path`, oldest first; none if there are none.

    Where a file lies there in several compressions, the one that `path` has goes first.
    """
    if not path.parent.is_dir() or _set_of(path) == path:
        return []
    files: dict[int, Path] = {}
    siblings = sorted(file for file in path.parent.iterdir() if _set_of(file) == _set_of(path))
    for file in sorted(siblings, key=lambda file: file.suffix != path.suffix):
        files.setdefault(rotation_number(file), file)
    return [files[number] for number in sorted(files)]


def rotation(path: Path, number: int) -> Path:
    """Return the name of file `number` of the rotated set with base name `path`; file 0 is `path` itself."""
    stem, dot, suffix = path.name.rpartition(".jsonl")
    return path if number == 0 else path.with_name(f"{stem}.{number}{dot}{suffix}")


def rotation_number(path: Path) -> int:
    """Return a file's place in its rotated set: 0 for the base name, negative for logrotate's older files."""
    match = _ROTATED.match(path.name)
    if not match:
        return 0
    return int(match["up"] or 0) - int(match["down"] or 0)


def read_pieces(path: Path, bad: BadRows, progress: Callable[[int], None] | None = None) -> Iterator[bytes]:
    """Yield a file's bytes, uncompressed, in pieces of whole lines of about `PIECE_BYTES`.

    `progress` is called with the bytes read from disk since its last call. Raises LogError for a file that cannot be
    opened or whose compressed stream is broken; a cut stream is reported to `bad` after all that could be read.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise LogError(path, None, None, f"cannot be opened: {error.strerror}") from error
    with file:
        rest: list[bytes | memoryview] = []
        held = 0
        for data in _uncompressed(path, file, bad, progress):
            rest.append(data)
            held += len(data)
            if held < PIECE_BYTES:
                continue
            cut = data.rfind(b"\n") + 1
            if cut:
                rest[-1] = memoryview(data)[:cut]
                yield b"".join(rest)
                rest = [data[cut:]]
                held = len(rest[0])
        if held:
            yield b"".join(rest)


def _compression(head: bytes) -> str | None:
    """Return "gzip" or "zstd" by a file's first bytes, whatever it is called; None for a plain file."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _LOG_NAME.match(file.name))
        if not files:
            raise LogError(path, None, None, "a folder without .jsonl, .json or .csv files; check the path")
        return files
    whole_set = rotated_set(path) if rotation_number(path) == 0 else []
    if whole_set:
        return whole_set
    if path.is_file():
        return [path]
    if glob.has_magic(str(path)):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [file for match in matches for file in (_files(match) if match.is_dir() else [match])]
        if files:
            return files
    raise LogError(path, None, None, "names no log; check the path")


def _set_of(path: Path) -> object:
    """Return what the files of one rotated set have in common; the path itself for a file that is never rotated."""
    match = _ROTATED.match(path.name)
    return (path.parent, match["stem"]) if match else path


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _decompressor(kind: str) -> tuple[Callable[[], _Decompressor], type[Exception]]:
    if kind == "gzip":
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    import zstandard  # noqa: PLC0415 - loaded when such a log is read

    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError


def _uncompressed(path: Path, file: BinaryIO, bad: BadRows, progress: Callable[[int], None] | None) -> Iterator[bytes]:
    kind = _compression(file.read(4))
    file.seek(0)
    size = PIECE_BYTES if kind is None else _COMPRESSED_READ
    blocks = iter(lambda: file.read(size), b"")
    if progress is not None:
        blocks = _told(blocks, progress)
    return blocks if kind is None else _decompressed(path, kind, blocks, bad)


def _told(blocks: Iterator[bytes], progress: Callable[[int], None]) -> Iterator[bytes]:
    for block in blocks:
        yield block
        progress(len(block))


def _decompressed(path: Path, kind: str, blocks: Iterator[bytes], bad: BadRows) -> Iterator[bytes]:
    """Yield what the members (gzip) or frames (zstd) of a file hold, one after another."""
    make, error_type = _decompressor(kind)
    stream = make()
    begun = False
    try:
        for block in blocks:
            data = block
            while data:
                if stream.eof:
                    stream = make()
                yield stream.decompress(data)
                begun, data = not stream.eof, stream.unused_data if stream.eof else b""
    except error_type as error:
        raise LogError(path, None, None, f"broken {kind} stream ({error}); copy the file again") from error
    if begun:
        bad.report(LogError(path, None, None, f"{kind} stream cut short; copy it again, or read it with --skip-bad"))
