"""Every bad log is one line that names file, line and field, or is counted."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from kvtraces import LogError, read, sources

MEND = "mend or remove the row, or count it with --skip-bad"


def line(time_ms: int = 0, **changes: Any) -> str:
    row = {"timestamp": time_ms, "input_length": 1000, "output_length": 5, "hash_ids": [1, 2], **changes}
    return json.dumps({name: value for name, value in row.items() if value is not ...})


GOOD = [line(0), line(1), line(2)]


def fails(path: Path, lines: list[str], **arguments: Any) -> str:
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(LogError) as caught:
        read(path, **arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(path))
    return text.removeprefix(str(path))


CASES = {
    "truncated": (line(2)[:40], "row: is cut short"),
    "not JSON": ("hello", "row: is not JSON (invalid character (byte 0))"),
    "JSON and more": (line(2) + "x", "row: is not JSON (trailing characters (byte 79))"),
    "no object": ("[1]", "row: expected object, got array"),
    "a number": ("17", "row: expected object, got int"),
    "two rows": (line(2) + line(2), "row: is not JSON (trailing characters (byte 79))"),
    "no input_length": (line(2, input_length=...), "input_length: is missing"),
    "no output_length": (line(2, output_length=...), "output_length: is missing"),
    "no timestamp": (line(2, timestamp=...), "timestamp: is missing"),
    "no hash_ids": (line(2, hash_ids=...), "hash_ids: is missing"),
    "negative length": (line(2, input_length=-5), "input_length: expected int >= 0, got -5"),
    "negative output": (line(2, output_length=-1), "output_length: expected int >= 0, got -1"),
    "negative time": (line(-3), "timestamp: expected float >= 0.0, got -3"),
    "absurd length": (line(2, input_length=2**31 + 1), "input_length: expected int <= 2147483648, got 2147483649"),
    "absurd output": (line(2, output_length=10**30), f"output_length: expected int <= 2147483648, got {10**30}"),
    "absurd time": (line(10**15), f"timestamp: expected float < 1000000000000000.0, got {10**15}"),
    "infinite time": (line(2).replace(": 2,", ": 1e999,", 1), "timestamp: number out of range, got 1e999"),
    "NaN": (line(2).replace(": 2,", ": NaN,", 1), "row: is not JSON (invalid character (byte 14))"),
    "time as text": (line(2, timestamp="2"), "timestamp: expected float, got str"),
    "length as text": (line(2, input_length="1000"), "input_length: expected int, got str"),
    "fractional length": (line(2, input_length=999.5), "input_length: expected int, got float"),
    "null length": (line(2, input_length=None), "input_length: expected int, got null"),
    "true length": (line(2, input_length=True), "input_length: expected int, got bool"),
    "ids as text": (line(2, hash_ids="1, 2"), "hash_ids: expected array, got str"),
    "null ids": (line(2, hash_ids=None), "hash_ids: expected array, got null"),
    "an id as text": (line(2, hash_ids=[1, "2"]), "hash_ids[1]: expected int, got str"),
    "a nested id": (line(2, hash_ids=[[1], 2]), "hash_ids[0]: expected int, got array"),
    "a fractional id": (line(2, hash_ids=[1.5, 2]), "hash_ids[0]: expected int, got float"),
    "a negative id": (line(2, hash_ids=[1, -2]), "hash_ids[1]: expected int >= 0, got -2"),
    "an id of 64 bits": (line(2, hash_ids=[2**63, 2]), f"hash_ids[0]: expected int <= {2**63 - 1}, got {2**63}"),
    "too many ids": (line(2, hash_ids=[1, 2, 3]), "hash_ids: 3 ids where 1000 tokens in blocks of 512 have 2"),
    "too few ids": (line(2, hash_ids=[]), "hash_ids: 0 ids where 1000 tokens in blocks of 512 have 2"),
    "block of nothing": (line(2, block_size=0), "block_size: expected int >= 1, got 0"),
    "negative seq": (line(2, seq=-1), "seq: expected int >= 0, got -1"),
    "text for a number": (line(2, ttft_ms="fast"), "ttft_ms: expected float or null, got str"),
    "number for a text": (line(2, salt=7), "salt: expected str or null, got int"),
    "long text": (line(2, salt="x" * 2000), 'salt: expected str of length <= 1024, got "' + "x" * 36 + "..."),
    "output ids": (line(2, output_hash_ids=[1, "x"]), "output_hash_ids[1]: expected int, got str"),
    "output ids as text": (line(2, output_hash_ids="x"), "output_hash_ids: expected array, got str"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_row(tmp_path: Path, name: str) -> None:
    row, message = CASES[name]
    path = tmp_path / "bad.jsonl"
    assert fails(path, [*GOOD, row, line(3)]) == f":4: {message}; {MEND}"
    log = read(path, skip_bad=True)
    assert log.timestamp_ms.tolist() == [0, 1, 2, 3]
    assert log.skipped == 1
    assert log.skipped_messages == (f"{path}:4: {message}; mend or remove the row",)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(line(0).encode() + b"\n" + line(1, salt="?").encode().replace(b"?", b"\xff"))
    with pytest.raises(LogError, match=r"bad\.jsonl:2: row: is not JSON \('utf-8' codec can't decode byte 0xff"):
        read(path)
    assert len(read(path, skip_bad=True, block_tokens=512)) == 1


def test_lines_are_counted_over_pieces_and_blank_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 200)
    rows = [line(i) for i in range(40)]
    rows[10] = ""
    assert fails(tmp_path / "a.jsonl", [*rows, line(40)[:30]]) == f":41: row: is cut short; {MEND}"
    assert fails(tmp_path / "a.jsonl", [*rows, line(3)]).startswith(":41: timestamp: 3 comes after 39")
    assert fails(tmp_path / "a.jsonl", [*rows, line(50, hash_ids=[1])]).startswith(":41: hash_ids: 1 ids where")


def test_time_running_backwards(tmp_path: Path) -> None:
    message = fails(tmp_path / "a.jsonl", [*GOOD, line(1)])
    assert message == ":4: timestamp: 1 comes after 2: time runs backwards; sort the rows (--sort), or give them seq"
    log = read(tmp_path / "a.jsonl", skip_bad=True)
    assert (log.timestamp_ms.tolist(), log.skipped) == ([0, 1, 2], 1)


def test_a_row_that_jumps_ahead_costs_itself_alone(tmp_path: Path) -> None:
    times = [0, 1, 2, 10**12, *range(3, 90)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(line(time) for time in times))
    log = read(path, skip_bad=True)
    assert log.timestamp_ms.tolist() == list(range(90))
    assert log.skipped == 1
    assert ":4: timestamp: 1000000000000 is out of order with most rows" in log.skipped_messages[0]
    with pytest.raises(LogError, match=":5: timestamp: 3 comes after 1000000000000"):
        read(path)


def test_time_running_backwards_between_the_files_of_a_set(tmp_path: Path) -> None:
    (tmp_path / "a.1.jsonl").write_text(line(1) + "\n")
    (tmp_path / "a.jsonl").write_text("\n".join(GOOD))
    with pytest.raises(LogError, match=r"a\.1\.jsonl:1: timestamp: 1 comes after 2: time runs backwards"):
        read(tmp_path / "a.jsonl")


def test_seq_in_some_rows_only(tmp_path: Path) -> None:
    message = fails(tmp_path / "a.jsonl", [line(0, seq=0), line(1)])
    assert message == f":2: seq: is missing, though other rows of the recording have it; {MEND}"


def test_seq_twice(tmp_path: Path) -> None:
    message = fails(tmp_path / "a.jsonl", [line(0, seq=3), line(1, seq=4), line(2, seq=3)])
    assert message == ":3: seq: 3 is there twice; keep each recording under a name of its own"


def test_a_count_that_contradicts_the_block_size_given(tmp_path: Path) -> None:
    rows = [line(0, block_size=512), line(1, block_size=512, hash_ids=[1, 2, 3])]
    message = fails(tmp_path / "a.jsonl", rows)
    assert message == f":2: hash_ids: 3 ids where 1000 tokens in blocks of 512 have 1 or 2; {MEND}"


def test_blocks_of_two_sizes(tmp_path: Path) -> None:
    message = fails(tmp_path / "a.jsonl", [line(0, block_size=512), line(1, block_size=1000)])
    assert message == ":2: block_size: is 1000, in other rows 512; read them apart"


def test_block_size_asked_against_the_log(tmp_path: Path) -> None:
    message = fails(tmp_path / "a.jsonl", [line(0, block_size=512)], block_tokens=256)
    assert message == ":1: block_size: is 512, but --block-size 256 was given; leave that out"
    with pytest.raises(ValueError, match="--block-size must be from 1 to"):
        read(tmp_path / "a.jsonl", block_tokens=0)


def test_more_output_blocks_than_tokens(tmp_path: Path) -> None:
    message = fails(tmp_path / "a.jsonl", [line(0, block_size=512, output_hash_ids=[3, 4])])
    assert message == f":1: output_hash_ids: 2 ids where prompt and output leave room for 1; {MEND}"


def test_an_empty_log(tmp_path: Path) -> None:
    expected = ": empty log: no requests in it; record some, or check the path"
    assert fails(tmp_path / "a.jsonl", [""]) == expected
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(LogError, match="empty log"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"")
    with pytest.raises(LogError, match=r"a\.jsonl: empty log: no requests in it or the 1 files after it"):
        read(tmp_path)


def test_a_log_of_bad_rows_alone(tmp_path: Path) -> None:
    message = fails(tmp_path / "a.jsonl", ["x", "y"], skip_bad=True)
    assert message.startswith(": empty log: no requests in it, 2 bad rows left out; the first: ")
    assert fails(tmp_path / "a.jsonl", [line(0, seq=1, block_size=512), "y"], skip_bad=False).startswith(":2: row")


def test_paths_that_name_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(LogError) as caught:
            read(path)
        assert str(caught.value) == f"{path}: names no log; check the path"
    with pytest.raises(LogError, match=r"a folder without \.jsonl, \.json or \.csv files; check the path$"):
        read(tmp_path)


def test_only_the_first_few_messages_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*GOOD, *["x"] * 100]))
    log = read(path, skip_bad=True)
    assert log.skipped == 100
    assert [message.split(":")[-3].strip() or message for message in log.skipped_messages] != []
    assert len(log.skipped_messages) == 5


def test_an_error_survives_pickling() -> None:
    error = LogError("a.jsonl", 3, "seq", "is bad; mend it")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "a.jsonl:3: seq: is bad; mend it"
    assert (again.path, again.line, again.field) == (Path("a.jsonl"), 3, "seq")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n1,2,3\n", ":1: header: no known columns; a CSV of lengths has one of: TIMESTAMP, ContextTokens"),
        ("timestamp,input_length,output_length\n0,5,5\n1,2,-3\n", ":3: output_length: expected from 0 to below"),
        ("timestamp,input_length,output_length\n0,x,5\n", f":2: input_length: cannot be read, got 'x'; {MEND}"),
        ("timestamp,input_length,output_length\n0,5\n", f":2: output_length: is missing; {MEND}"),
        ("timestamp,input_length,output_length\nnan,5,5\n", ":2: timestamp: expected from 0 to below"),
        ("timestamp,input_length,output_length\n5,5,5\n4,5,5\n", ":3: timestamp: 4 comes after 5: time runs backwards"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,5,5\n", ":2: TIMESTAMP: cannot be read, got 'yesterday'"),
        ("timestamp,input_length,output_length\n", ": empty log: no requests in it"),
    ],
)
def test_bad_lengths(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(LogError) as caught:
        read(tmp_path / "a.csv")
    assert str(caught.value).removeprefix(str(tmp_path / "a.csv")).startswith(message)


def test_lengths_beside_hashes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line(0))
    (tmp_path / "b.csv").write_text("timestamp,input_length,output_length\n0,5,5\n")
    with pytest.raises(LogError, match=r"b\.csv: has lengths alone, the other files block hashes; read them apart$"):
        read(tmp_path, block_tokens=512)
