import dataclasses
import gzip
import itertools
import json
import math
import resource
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtraces import Log, LogError, Row, Writer, next_seq, read, read_rows, rows_of, write
from kvtraces.schema import INTEGERS, NUMBERS, TEXTS

BLOCK = 16
ids = st.integers(0, 2**63 - 1)
texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
maybe_tokens = st.none() | st.integers(0, 2**31)
maybe_ms = st.none() | st.floats(0, 1e14, allow_nan=False)


@st.composite
def rows(draw: st.DrawFn, *, sequenced: bool) -> list[Row]:
    made = []
    seqs = draw(st.permutations(range(draw(st.integers(1, 12)))))
    time_ms = 0.0
    for seq in seqs:
        time_ms += draw(st.floats(0, 1e6))
        input_length = draw(st.integers(0, 6 * BLOCK))
        output_length = draw(st.integers(0, 3 * BLOCK))
        count = input_length // BLOCK
        outputs = (input_length + output_length) // BLOCK - count
        made.append(
            Row(
                timestamp=time_ms,
                input_length=input_length,
                output_length=output_length,
                hash_ids=draw(st.lists(ids, min_size=count, max_size=count, unique=True)),
                block_size=BLOCK,
                seq=seq if sequenced else None,
                output_hash_ids=draw(st.none() | st.lists(ids, min_size=outputs, max_size=outputs)),
                **{name: draw(maybe_tokens) for name in INTEGERS if name != "seq"},
                **{name: draw(maybe_ms) for name in NUMBERS if name not in INTEGERS},
                **{name: draw(st.none() | texts) for name in TEXTS},
            )
        )
    return made


def write_rows(path: Path, made: list[Row], max_bytes: int | None = None) -> None:
    with Writer(path, max_bytes=max_bytes) as writer:
        for row in made:
            writer.write(row)


def plain(row: Row) -> Row:
    """As a Log gives it back: no recorded outputs and empty ones are the same, where other rows have some."""
    copy = Row(**{name: getattr(row, name) for name in row.__struct_fields__})
    copy.output_hash_ids = row.output_hash_ids or None
    return copy


folders = itertools.count()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows(sequenced=True) | rows(sequenced=False),
    st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"]),
    st.none() | st.integers(1, 3000),
)
def test_what_is_written_is_read(tmp_path: Path, made: list[Row], name: str, max_bytes: int | None) -> None:
    folder = tmp_path / str(next(folders))
    folder.mkdir()
    write_rows(folder / name, made, max_bytes)
    log = read(folder / name)
    expected = sorted(made, key=lambda row: row.seq or 0) if made[0].seq is not None else made
    assert log.block_tokens == BLOCK
    assert [plain(row) for row in rows_of(log)] == [plain(row) for row in expected]
    again = folder / "again.jsonl"
    write(log, again)
    assert_same(read(again), log)
    assert list(read_rows(again)) == list(rows_of(log))


def assert_same(a: Log, b: Log) -> None:
    for one in dataclasses.fields(Log):
        left, right = getattr(a, one.name), getattr(b, one.name)
        if one.name == "doubts":  # they name the files
            continue
        if one.name == "extra":
            assert left.keys() == right.keys()
            for name, column in left.items():
                assert column.dtype == right[name].dtype
                assert all(x == y or (x != x and y != y) for x, y in zip(column, right[name], strict=True))
        elif isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            assert np.array_equal(left, right)
        else:
            assert left == right


def row(time_ms: float, name: int, **more: object) -> Row:
    return Row(timestamp=time_ms, input_length=BLOCK, output_length=1, hash_ids=[name], block_size=BLOCK, **more)


def test_rotation_names_and_order(tmp_path: Path) -> None:
    write_rows(tmp_path / "prod.jsonl", [row(i, i) for i in range(30)], max_bytes=100)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"prod.jsonl", *(f"prod.{i}.jsonl" for i in range(1, 30))}
    for paths in (tmp_path / "prod.jsonl", tmp_path, tmp_path / "*.jsonl", tmp_path / "prod*"):
        assert read(paths).blocks.tolist() == list(range(30))
    assert read(tmp_path / "prod.12.jsonl").blocks.tolist() == [12]
    (tmp_path / "prod.jsonl").unlink()
    assert read(tmp_path / "prod.jsonl").blocks.tolist() == list(range(1, 30))


def test_logrotate_names_count_down_to_the_newest(tmp_path: Path) -> None:
    for suffix, name in ((".10.gz", 0), (".2", 1), (".1", 2), ("", 3)):
        line = json.dumps({"timestamp": name, "input_length": 4, "output_length": 1, "hash_ids": [name]}) + "\n"
        path = tmp_path / f"prod.jsonl{suffix}"
        path.write_bytes(gzip.compress(line.encode()) if suffix.endswith("gz") else line.encode())
    assert read(tmp_path / "prod.jsonl", block_tokens=4).blocks.tolist() == [0, 1, 2, 3]


def test_a_recording_goes_on_in_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "prod.jsonl.gz"
    assert next_seq(path) == 0
    write_rows(path, [row(0, 1, seq=0), row(1, 2, seq=4), row(1, 3, seq=2)])
    before = path.read_bytes()
    assert next_seq(path) == 5
    write_rows(path, [row(2, 4, seq=5)])
    assert path.read_bytes() == before
    assert read(path).blocks.tolist() == [1, 3, 2, 4]
    assert next_seq(path) == 6


def test_next_seq_passes_over_a_row_that_a_crash_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "prod.jsonl"
    write_rows(path, [row(0, 1, seq=7)])
    with path.open("ab") as file:
        file.write(b'{"timestamp":1.0,"seq":9,"inp')
    assert next_seq(path) == 8
    write_rows(path, [row(2, 4, seq=8)])
    assert read(path, skip_bad=True).blocks.tolist() == [1, 4]


def test_a_flushed_row_can_be_read_while_the_file_is_open(tmp_path: Path) -> None:
    with Writer(tmp_path / "a.jsonl") as writer:
        writer.write(row(0, 5))
        writer.flush()
        assert read(tmp_path / "a.jsonl").blocks.tolist() == [5]
        assert writer.rows == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_disk_that_is_full_for_a_while_costs_the_rows_that_are_counted(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    written = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Writer(path, mode=0o600) as writer:
        for at in range(90):
            full = 30 <= at < 60
            resource.setrlimit(resource.RLIMIT_FSIZE, (7 if full else soft, hard))
            try:
                writer.write(row(at, at))
                if at % 3 == 2:
                    writer.flush()
            except OSError:
                assert full
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            written += [at] if not full else []
        assert (writer.rows, writer.lost) == (60, 30)
    assert read(path, skip_bad=suffix != ".jsonl").blocks.tolist() == written  # compressed, it is cut short
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([f"a{suffix}", f"a.1{suffix}"])
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}


def test_whether_a_log_can_be_written_is_known_before(tmp_path: Path) -> None:
    Writer(tmp_path / "a.jsonl").check()
    assert not [*tmp_path.iterdir()]
    with pytest.raises(FileNotFoundError):
        Writer(tmp_path / "none" / "a.jsonl").check()


def test_gz_is_the_same_at_any_time_and_under_any_name(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl.gz", [row(0, 5)])
    write_rows(tmp_path / "b.jsonl.gz", [row(0, 5)])
    data = (tmp_path / "a.jsonl.gz").read_bytes()
    assert data == (tmp_path / "b.jsonl.gz").read_bytes()
    assert data[4:8] == b"\0\0\0\0"


def test_compression_is_known_by_content(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl.zst", [row(0, 5)])
    (tmp_path / "a.jsonl.zst").rename(tmp_path / "renamed.jsonl")
    assert read(tmp_path / "renamed.jsonl").blocks.tolist() == [5]


def test_a_compressed_copy_beside_a_log(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [row(0, 5)])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert len(read(tmp_path / "a.jsonl")) == 1
    assert len(read(tmp_path / "a.jsonl.gz")) == 1
    with pytest.raises(LogError, match=r"a\.jsonl\.gz: is the same log as a\.jsonl in another compression"):
        read(tmp_path)


def test_several_gzip_members_and_zstd_frames(tmp_path: Path) -> None:
    for suffix in ("gz", "zst"):
        first, second = tmp_path / f"{suffix}-1.jsonl.{suffix}", tmp_path / f"{suffix}-2.jsonl.{suffix}"
        write_rows(first, [row(0, 5)])
        write_rows(second, [row(1, 6)])
        joined = first.read_bytes() + second.read_bytes()
        (tmp_path / f"joined.{suffix}").write_bytes(joined)
        assert read(tmp_path / f"joined.{suffix}").blocks.tolist() == [5, 6]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_stream_cut_short(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    write_rows(path, [row(i, hash(i * 7919) % 2**40) for i in range(5000)])
    path.write_bytes(path.read_bytes()[:-20])
    kind = {"gz": "gzip", "zst": "zstd"}[suffix]
    with pytest.raises(LogError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: {kind} stream cut short; copy it again, or read it with --skip-bad"
    log = read(path, skip_bad=True)
    assert log.skipped >= 1
    assert log.skipped_messages[0] == str(caught.value)


def test_a_broken_compressed_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    write_rows(path, [row(i, i) for i in range(100)])
    data = bytearray(path.read_bytes())
    data[40] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(LogError, match=r"a\.jsonl\.gz: broken gzip stream .*; copy the file again$"):
        read(path)


def test_writer_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"written to \.jsonl, \.jsonl\.gz, \.jsonl\.zst, not a\.csv"):
        Writer(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"qwen2\.5\.jsonl would be read as file 5 of another log"):
        Writer(tmp_path / "qwen2.5.jsonl")
    with pytest.raises(ValueError, match="max_bytes must be at least 1"):
        Writer(tmp_path / "a.jsonl", max_bytes=0)


def test_read_rows_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_rows(path, [row(0, 1)])
    with path.open("a") as file:
        file.write("\n{}\n")
    with pytest.raises(LogError, match=r"a\.jsonl:3: row: Object missing required field"):
        list(read_rows(path))


def test_timestamps_survive_to_the_last_bit(tmp_path: Path) -> None:
    moment = math.nextafter(1.7e12, math.inf)
    write_rows(tmp_path / "a.jsonl", [row(moment, 1)])
    assert read(tmp_path / "a.jsonl").timestamp_ms.tolist() == [moment]
