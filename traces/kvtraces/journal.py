"""The journal of a server: every event that its core was told, with what the core decided.

A journal is a folder of segments, `00000001.kvj` and so on, each a magic and then records: a header `<III` (payload
bytes, CRC-32 of these four bytes, CRC-32 of the payload) and a msgpack payload. A segment begins with the core's
configuration and, unless the core was new, a snapshot of its state; then come steps, (event, decisions), the pages
that a step took, and what engines say of themselves. A decision's chunks are written as a range where they are a run
of the event's. So each segment replays by itself, the oldest can be deleted, and a server that takes over needs the
last one only. A crash may leave the last record torn; anything else that does not fit its checksum is damage. What a
segment begins with is written as a whole before the segment has its name, so after a killed process the newest tells
everything. It is on the disk before an older one is deleted, so after a machine that went down one of them does.
"""

import errno
import os
import re
import struct
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeAlias, get_args
from zlib import crc32

import msgspec

from kvcore.policy import Chunk, Core, CoreConfig, Decision, Event
from kvcore.policy.snapshot import dump, reconfigured, restore
from kvtraces.collector import without_collection
from kvtraces.words import counted

MAGIC = b"KVJRNL\x00\x01"
DEFAULT_SEGMENT_BYTES = 256 << 20
_MOST_ENGINES = 64
"""Engines that a new segment tells of: the last that registered."""
_HEADER = struct.Struct("<III")
_LENGTH = struct.Struct("<I")
_NAME = re.compile(r"(\d{8})\.kvj")

_EVENTS: tuple[type[Any], ...] = get_args(Event)
_DECISIONS: tuple[type[Any], ...] = get_args(Decision)
_TAGS = {kind: kind.__name__ for kind in (*_EVENTS, *_DECISIONS)}
_FIELDS = {kind: tuple(f.name for f in fields(kind)) for kind in _TAGS}
_VALUES = {kind: attrgetter(*names) for kind, names in _FIELDS.items()}
"""A tuple of every field's value; no event or decision has less than two."""
_KINDS = {kind.__name__: kind for kind in _TAGS}


class JournalError(Exception):
    """There is no journal, or one that cannot be read; the message names the segment and where in it."""

    def __init__(self, message: str, segment: str = "", offset: int = 0) -> None:
        super().__init__(f"{segment} at byte {offset}: {message}" if segment else message)
        self.reason = message
        self.segment = segment
        self.offset = offset


class SegmentGoneError(JournalError):
    """A segment that was there is not any more: the server that writes the journal keeps only the last ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a segment begins with."""

    config: CoreConfig
    meta: dict[str, Any]
    """What the server says of itself: its arena's epoch, page size."""
    has_snapshot: bool = False
    """Whether a snapshot follows, which the writer sees to: without one the core is new, or the segment is torn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The state before the first step of a segment."""

    core: bytes
    """msgpack of `kvcore.policy.snapshot.dump`."""
    pages: bytes
    """The server's book of pages, in its own encoding; what replays the core needs none of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One event and what was decided."""

    event: Event
    decisions: tuple[Decision, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """The pages that the next placing decision of the step before was given, and their generations."""

    ids: bytes
    """uint32, little-endian."""
    generations: bytes
    """uint64, little-endian."""
    chunk_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What an engine instance said of itself when it registered; nothing is decided by it."""

    instance: str
    facts: dict[str, int]
    """By the names of the simulator's settings, and `l0_blocks`; 0 and 1 for no and yes."""


Record: TypeAlias = Head | Snapshot | Step | Pages | Engine


@dataclass(frozen=True, slots=True)
class Located:
    """A record and where it lies."""

    segment: str
    offset: int
    record: Record


class JournalWriter:
    """Appends to a journal, always in a new segment.

    `step` and `pages` only collect; `flush` hands everything to the operating system with one write, so what was
    flushed survives the process. `due` says that the segment is full: `rotate` then begins the next with a snapshot.
    A thread of its own has the disk take it, which may last seconds, and then deletes the oldest beyond `keep`; while
    it is `settling`, `rotate` and `close` wait for that. What went wrong there is raised by the next `flush`.

    Raises OSError where the folder cannot be made or written.
    """

    def __init__(
        self,
        folder: str | Path,
        head: Head,
        snapshot: Snapshot | None = None,
        *,
        segment_bytes: int = DEFAULT_SEGMENT_BYTES,
        keep: int = 4,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.head = head
        self.segment_bytes = segment_bytes
        self.keep = keep
        self.written_bytes = 0
        self.size_bytes = 0
        """Of the segment at hand, behind what it begins with: a snapshot alone may be larger than a segment."""
        self._waiting: list[bytes] = []
        self._engines: dict[str, dict[str, int]] = {}
        self._encode = msgspec.msgpack.Encoder().encode
        self._fd = -1
        self._settling: _Settling | None = None
        names = segments(self.folder)
        self._number = int(names[-1].stem) if names else 0
        self._begin(snapshot)
        self._settle()
        self.flush()

    def step(self, event: Event, decisions: tuple[Decision, ...]) -> None:
        """Collect an event with its decisions."""
        named = getattr(event, "chunks", None)
        out = [(_TAGS[type(decision)], _compact(decision, named)) for decision in decisions]
        self._collect(("step", _TAGS[type(event)], _VALUES[type(event)](event), out))

    def pages(self, ids: bytes, generations: bytes, chunk_bytes: int) -> None:
        """Collect the pages given to the next placing decision of the last step."""
        self._collect(("pages", ids, generations, chunk_bytes))

    def engine(self, instance: str, facts: dict[str, int]) -> None:
        """Collect what an engine says of itself; later segments say it again."""
        self._engines.pop(instance, None)
        self._engines[instance] = facts
        if len(self._engines) > _MOST_ENGINES:
            del self._engines[next(iter(self._engines))]
        self._collect(("engine", instance, facts))

    def flush(self) -> None:
        """Write what was collected. Raises OSError, also where the disk did not take the segment."""
        if self._settling is not None and self._settling.error is not None:
            raise self._settling.error
        if not self._waiting:
            return
        data = memoryview(b"".join(self._waiting))
        self._waiting.clear()
        self.size_bytes += len(data)
        self.written_bytes += len(data)
        while data:
            data = data[os.write(self._fd, data) :]

    @property
    def due(self) -> bool:
        """Whether the segment is full."""
        return self.size_bytes >= self.segment_bytes

    @property
    def settling(self) -> bool:
        """Whether the disk has still to take what the segment begins with."""
        return self._settling is not None and self._settling.is_alive()

    def rotate(self, snapshot: Snapshot) -> None:
        """Begin the next segment with `snapshot`, the state after everything collected so far. Raises OSError."""
        self._settle()
        self.flush()
        os.close(self._fd)
        self._fd = -1
        self._begin(snapshot)

    def abandon(self) -> None:
        """Close, after an OSError, with what could not be written given up: nothing may follow a hole."""
        self._waiting.clear()
        self._settle()
        self._settling = None
        self.close()

    def close(self) -> None:
        """Flush and close. Raises OSError."""
        self._settle()
        if self._fd >= 0:
            self.flush()
            os.close(self._fd)
            self._fd = -1

    def _settle(self) -> None:
        """Wait until the disk has taken what the segment at hand begins with."""
        if self._settling is not None:
            self._settling.join()

    def _collect(self, payload: tuple[Any, ...]) -> None:
        data = self._encode(payload)
        length = _LENGTH.pack(len(data))
        self._waiting.append(_HEADER.pack(len(data), crc32(length), crc32(data)))
        self._waiting.append(data)

    def _begin(self, snapshot: Snapshot | None) -> None:
        """Write the head of the next segment under another name, so that one is there whole or not at all.

        It has its own name before the first record that only it holds. When the machine goes down before the disk has
        taken it, it is torn at its beginning, and the one before it is there still: that is deleted only then.
        """
        self._number += 1
        path = self.folder / f"{self._number:08d}.kvj"
        self._waiting.append(MAGIC)
        self._collect(("head", msgspec.to_builtins(self.head.config), self.head.meta, snapshot is not None))
        if snapshot is not None:
            self._collect(("snapshot", snapshot.core, snapshot.pages))
        for instance, facts in self._engines.items():
            self._collect(("engine", instance, facts))
        partial = path.with_suffix(".part")
        self._fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.flush()
        partial.rename(path)
        self.size_bytes = 0
        self._settling = _Settling(os.dup(self._fd), self.folder, self.keep)
        self._settling.start()


class _Settling(threading.Thread):
    """Has the disk take the newest segment, of which it owns the descriptor, and then deletes the oldest.

    Its writer goes on meanwhile. Where it fails, `error` says why, and no segment is deleted.
    """

    def __init__(self, fd: int, folder: Path, keep: int) -> None:
        super().__init__(name="kvcore-journal", daemon=True)
        self.error: OSError | None = None
        self._segment = fd
        self._folder = folder
        self._keep = keep

    def run(self) -> None:
        try:
            os.fsync(self._segment)
            _sync_folder(self._folder)
            for old in segments(self._folder)[: -self._keep]:
                old.unlink()
        except OSError as error:
            self.error = error
        finally:
            os.close(self._segment)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system on which folders need none
            raise
    finally:
        os.close(fd)


def segments(folder: str | Path) -> list[Path]:
    """Return a journal's segments, oldest first."""
    return sorted(path for path in Path(folder).glob("*.kvj") if _NAME.fullmatch(path.name))


def take_snapshot(core: Core, pages: bytes = b"") -> Snapshot:
    """Return the core's state as a journal holds it."""
    with without_collection():
        return Snapshot(core=msgspec.msgpack.encode(dump(core)), pages=pages)


def restore_core(head: Head, snapshot: Snapshot | None) -> Core:
    """Return the core as it was at the beginning of a segment. Raises JournalError for a snapshot that is none."""
    if snapshot is None:
        return Core(head.config)
    try:
        return restore(head.config, msgspec.msgpack.decode(snapshot.core))
    except (msgspec.MsgspecError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise JournalError(f"the snapshot cannot be restored: {type(error).__name__}: {error}") from error


def read_segment(path: Path) -> Generator[Located, None, bool]:
    """Yield a segment's records; return whether the last one is torn, which a crash leaves and nothing follows.

    Raises JournalError for damage: a checksum, or a payload that is no record; SegmentGoneError where it is not there.
    """
    try:
        opened = path.open("rb")
    except FileNotFoundError as error:
        raise SegmentGoneError(
            f"the server that writes {path.parent} has removed it meanwhile: try again, or with a copy", path.name
        ) from error
    with opened as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise JournalError("not a journal of this format", path.name)
        offset = len(MAGIC)
        while header := file.read(_HEADER.size):
            if len(header) < _HEADER.size:
                return True
            length, length_sum, payload_sum = _HEADER.unpack(header)
            if crc32(header[: _LENGTH.size]) != length_sum:
                raise JournalError("a record's length does not fit its checksum", path.name, offset)
            payload = file.read(length)
            if len(payload) < length:
                return True
            if crc32(payload) != payload_sum:
                raise JournalError("a record does not fit its checksum", path.name, offset)
            yield Located(path.name, offset, _decode(payload, path.name, offset))
            offset += _HEADER.size + length
    return False


def _decode(payload: bytes, segment: str, offset: int) -> Record:
    try:
        match msgspec.msgpack.decode(payload):
            case ["step", tag, values, decisions]:
                event = _build(tag, values)
                named = getattr(event, "chunks", None)
                return Step(event=event, decisions=tuple(_build(tag, values, named) for tag, values in decisions))
            case ["pages", ids, generations, chunk_bytes]:
                return Pages(ids=ids, generations=generations, chunk_bytes=chunk_bytes)
            case ["engine", instance, facts]:
                return Engine(instance=instance, facts=msgspec.convert(facts, dict[str, int]))
            case ["head", config, meta, *rest]:  # journals of before do not say whether a snapshot follows
                return Head(config=msgspec.convert(config, CoreConfig), meta=meta, has_snapshot=bool(rest and rest[0]))
            case ["snapshot", core, pages]:
                return Snapshot(core=core, pages=pages)
    except (msgspec.MsgspecError, ValueError, TypeError, KeyError) as error:
        raise JournalError(f"{type(error).__name__}: {error}", segment, offset) from error
    raise JournalError("no record of this format", segment, offset)


def _compact(decision: Decision, named: tuple[Chunk, ...] | None) -> tuple[Any, ...]:
    """Return a decision's values; chunks that are a run of those the event names become where it begins and ends."""
    values: tuple[Any, ...] = _VALUES[type(decision)](decision)
    chunks = getattr(decision, "chunks", None)
    if not named or not chunks or len(chunks) > len(named):
        return values
    try:
        start = named.index(chunks[0])
    except ValueError:
        return values
    if named[start : start + len(chunks)] != chunks:
        return values
    at = _FIELDS[type(decision)].index("chunks")
    return (*values[:at], {"from": start, "to": start + len(chunks)}, *values[at + 1 :])


def _build(tag: str, values: list[Any], named: tuple[Chunk, ...] | None = None) -> Any:
    kind = _KINDS[tag]
    if len(values) > len(_FIELDS[kind]):
        raise ValueError(f"{tag} has {len(values)} values, {len(_FIELDS[kind])} are known")
    found = dict(zip(_FIELDS[kind], values, strict=False))  # journals of before lack fields that came since
    match found.get("chunks"):
        case {"from": int(start), "to": int(end)} if named is not None and 0 <= start < end <= len(named):
            found["chunks"] = named[start:end]
    return msgspec.convert(found, kind)


# Verification


@dataclass(frozen=True, slots=True, kw_only=True)
class Equal:
    """A journal whose replay decided the same throughout."""

    segments: int
    steps: int
    torn: tuple[str, ...] = ()
    """Segments whose last record a crash has cut short: what it held is in no step."""

    def __str__(self) -> str:
        within = counted(self.segments, "segment")
        if not self.steps:
            return f"nothing to decide again: no whole step in {within}"
        words = f"equal: {counted(self.steps, 'step')} in {within} decided again as recorded"
        cut = f"; the last record of {', '.join(self.torn)} is cut short, as a crash leaves it" if self.torn else ""
        return f"{words}{cut}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first place at which a journal and its replay part."""

    segment: str
    offset: int
    """Of the record in its segment, in bytes."""
    step: int
    """How many steps before it were equal."""
    reason: str
    event: Event | None = None
    recorded: tuple[Decision, ...] = ()
    replayed: tuple[Decision, ...] = ()

    def __str__(self) -> str:
        lines = [f"different after {self.step} equal steps, {self.segment} at byte {self.offset}: {self.reason}"]
        if self.event is not None:
            lines.append(f"  event    {_shown(self.event)}")
            for at in range(max(len(self.recorded), len(self.replayed))):
                ours, theirs = self.recorded[at : at + 1], self.replayed[at : at + 1]
                if ours != theirs:
                    lines.append(f"  recorded {_shown(*ours)}")
                    lines.append(f"  replayed {_shown(*theirs)}")
                    break
        return "\n".join(lines)


def verify(folder: str | Path) -> Equal | Difference:
    """Replay a journal from its first segment on, and compare every decision and every later snapshot.

    Raises JournalError where there is no journal, SegmentGoneError where its server removes a segment meanwhile.
    """
    paths = segments(folder)
    if not paths:
        raise JournalError(f"no journal in {folder}")
    check = _Verifier()
    torn: list[str] = []
    try:
        for path in paths:
            check.begin(path.name)
            for located in _records(path, torn):
                difference = check.take(located)
                if difference is not None:
                    return difference
    except SegmentGoneError:
        raise
    except JournalError as error:
        return Difference(
            segment=error.segment or path.name, offset=error.offset, step=check.steps, reason=error.reason
        )
    return Equal(segments=len(paths), steps=check.steps, torn=tuple(torn))


def _records(path: Path, torn: list[str]) -> Iterator[Located]:
    """Yield a segment's records; note it in `torn` where the last one is."""
    if (yield from read_segment(path)):
        torn.append(path.name)


class _Verifier:
    """A replay under way."""

    def __init__(self) -> None:
        self.steps = 0
        self._core: Core | None = None
        self._head: Head | None = None
        self._previous: int | None = None

    def begin(self, segment: str) -> None:
        number = int(Path(segment).stem)
        if self._previous is not None and number != self._previous + 1:
            raise JournalError(f"segment {self._previous + 1:08d} is missing", segment)
        self._previous = number
        self._head = None

    def take(self, located: Located) -> Difference | None:
        record = located.record
        match record:
            case Head():
                self._head, self._carried = record, self._core
                if not record.has_snapshot:  # where it is torn off, the next segment goes on where this one began
                    self._core = Core(record.config)
            case Snapshot():
                return self._compare_snapshot(record, located)
            case Step():
                return self._compare_step(record, located)
            case Pages() | Engine():
                pass
        return None

    def _compare_snapshot(self, snapshot: Snapshot, located: Located) -> Difference | None:
        if self._head is None:
            return self._at(located, "a snapshot before the segment's head")
        carried, config = self._carried, self._head.config
        if carried is not None and carried.config != config:
            try:
                carried = reconfigured(carried, config)
            except ValueError as error:
                return self._at(located, f"its configuration is not the one of the steps before: {error}")
        if carried is not None and take_snapshot(carried).core != snapshot.core:
            return self._at(located, "the snapshot is not the state that the steps before lead to")
        self._core = restore_core(self._head, snapshot)
        return None

    def _compare_step(self, step: Step, located: Located) -> Difference | None:
        if self._core is None or self._head is None:
            return self._at(located, "a step before the segment's head")
        try:
            replayed = self._core.handle(step.event)
        except (ValueError, AssertionError, KeyError) as error:
            return self._at(located, f"the core fails: {type(error).__name__}: {error}", step)
        if replayed != step.decisions:
            return self._at(located, "other decisions", step, replayed)
        self.steps += 1
        return None

    def _at(
        self, located: Located, reason: str, step: Step | None = None, replayed: tuple[Decision, ...] = ()
    ) -> Difference:
        return Difference(
            segment=located.segment,
            offset=located.offset,
            step=self.steps,
            reason=reason,
            event=None if step is None else step.event,
            recorded=() if step is None else step.decisions,
            replayed=replayed,
        )


def _shown(*things: object) -> str:
    """Show an event or decision on one line, digests and long tuples shortened."""
    if not things:
        return "nothing"
    thing = things[0]
    parts = []
    for name in _FIELDS[type(thing)]:
        value = getattr(thing, name)
        if isinstance(value, tuple) and value and isinstance(value[0], bytes | int) and name == "chunks":
            first = value[0].hex()[:12] if isinstance(value[0], bytes) else str(value[0])
            value = f"[{len(value)} from {first}]"
        parts.append(f"{name}={value}")
    return f"{type(thing).__name__}({', '.join(parts)})"
