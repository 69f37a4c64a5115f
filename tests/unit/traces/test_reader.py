import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtraces import LogError, _digits, _lists, describe, read, sources
from kvtraces.rows import leading


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mooncake(time_ms: float, tokens: int, block: int, **more: Any) -> dict[str, Any]:
    count = -(-tokens // block)
    return {"timestamp": time_ms, "input_length": tokens, "output_length": 1, "hash_ids": [*range(count)], **more}


PARSERS = [_digits.parse_lists, _lists.parse_lists]


@pytest.mark.parametrize("parse", PARSERS, ids=["many", "few"])
@settings(deadline=None)  # the kernel may be compiled
@given(
    lists=st.lists(st.lists(st.integers(0, 2**63 - 1), max_size=6), min_size=1, max_size=6),
    blank=st.sampled_from(["", " "]),
)
def test_lists_are_what_json_says(parse: Any, lists: list[list[int]], blank: str) -> None:
    texts = [json.dumps(one, separators=("," + blank, ":")).replace("[", "[" + blank) for one in lists]
    ids, counts, bad = parse(",".join(texts).encode(), len(lists))
    assert bad == -1
    assert counts.tolist() == [len(one) for one in lists]
    assert ids.tolist() == [one for row in lists for one in row]


@pytest.mark.parametrize("parse", PARSERS, ids=["many", "few"])
@pytest.mark.parametrize(
    "bad", ["5", '"x"', "null", "{}", "[-1]", "[-0]", "[1.0]", "[1.5]", "[1e3]", "[null]", "[[1]]", f"[{2**63}]"]
)
def test_the_first_list_that_is_none_is_named(parse: Any, bad: str) -> None:
    assert parse(f"[1, 2],[],{bad},[3]".encode(), 4)[2] == 2


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_leading(sizes: list[tuple[int, int]]) -> None:
    counts = np.array([max(pair) for pair in sizes], np.int64)
    wanted = np.array([min(pair) for pair in sizes], np.int64)
    rows = np.split(np.arange(counts.sum()), np.cumsum(counts)[:-1]) if len(counts) else []
    expected = [one for row, n in zip(rows, wanted, strict=True) for one in row[:n].tolist()]
    assert leading(np.arange(counts.sum()), counts, wanted).tolist() == expected


# Block size


@pytest.mark.parametrize("block", [1, 16, 512, 2**20])
def test_the_block_size_is_inferred(tmp_path: Path, block: int) -> None:
    lengths = [1, block, block + 1, 3 * block - 1, 7 * block]
    log = read(write_rows(tmp_path / "a.jsonl", *(mooncake(i, n, block) for i, n in enumerate(lengths))))
    assert log.block_tokens == block
    assert np.diff(log.starts).tolist() == [n // block for n in lengths]
    assert log.blocks[log.starts[3] : log.starts[4]].tolist() == list(range(lengths[3] // block))


def test_no_inference_where_several_sizes_fit(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", mooncake(0, 400000, 2**19), mooncake(1, 5, 16))
    with pytest.raises(LogError) as caught:
        read(path)
    expected = "hash_ids: fit blocks of 524288, 1048576 tokens alike; say which with --block-size"
    assert str(caught.value) == f"{path}: {expected}"
    assert read(path, block_tokens=524288).block_tokens == 524288
    many = write_rows(tmp_path / "b.jsonl", mooncake(0, 1, 16))
    with pytest.raises(LogError, match=r"fit blocks of 1, 2, 4, 8, 16, \.\.\., 1048576 tokens alike"):
        read(many)


def test_no_inference_where_none_fits(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", mooncake(0, 1000, 100), mooncake(1, 5000, 100), mooncake(2, 10**6, 100))
    with pytest.raises(LogError) as caught:
        read(path)
    what = "no power of two is the block size of every row; best: none fits any; say which it is with --block-size"
    assert str(caught.value) == f"{path}: hash_ids: {what}"
    assert read(path, block_tokens=100).block_tokens == 100


def test_floor_or_ceil_where_the_block_size_is_given(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 40, "output_length": 0, "hash_ids": [1, 2], "block_size": 16},
        {"timestamp": 0, "input_length": 40, "output_length": 0, "hash_ids": [3, 4, 5], "block_size": 16},
        {"timestamp": 0, "input_length": 5, "output_length": 0, "hash_ids": []},
        {"timestamp": 0, "input_length": 48, "output_length": 0, "hash_ids": [6, 7, 8], "block_size": 16},
    ]
    log = read(write_rows(tmp_path / "a.jsonl", *rows))
    assert log.block_tokens == 16
    assert log.blocks.tolist() == [1, 2, 3, 4, 6, 7, 8]
    assert log.starts.tolist() == [0, 2, 4, 4, 7]


def test_the_outputs_partial_block_goes_too(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 40, "output_length": 30, "hash_ids": [1, 2], "output_hash_ids": [8, 9, 10]},
        {"timestamp": 0, "input_length": 40, "output_length": 30, "hash_ids": [1, 2]},
        {"timestamp": 0, "input_length": 40, "output_length": 9, "hash_ids": [1, 2], "output_hash_ids": [3]},
        {"timestamp": 0, "input_length": 40, "output_length": 9, "hash_ids": [1, 2], "output_hash_ids": None},
    ]
    log = read(write_rows(tmp_path / "a.jsonl", *rows), block_tokens=16)
    assert log.output_starts is not None
    assert log.output_blocks is not None
    assert log.output_starts.tolist() == [0, 2, 2, 3, 3]
    assert log.output_blocks.tolist() == [8, 9, 3]


# Order


def test_rows_of_equal_time_keep_file_order(tmp_path: Path) -> None:
    rows = [mooncake(time_ms, 16, 16, hash_ids=[i]) for i, time_ms in enumerate([0, 5, 5, 5, 6])]
    assert read(write_rows(tmp_path / "a.jsonl", *rows), block_tokens=16).blocks.tolist() == [0, 1, 2, 3, 4]


def test_rows_are_sorted_by_seq_whatever_their_times(tmp_path: Path) -> None:
    rows = [mooncake(t, 16, 16, hash_ids=[i], seq=s) for i, (t, s) in enumerate([(3, 7), (0, 1), (9, 4)])]
    log = read(write_rows(tmp_path / "a.jsonl", *rows), block_tokens=16)
    assert log.blocks.tolist() == [1, 2, 0]
    assert log.timestamp_ms.tolist() == [0, 9, 3]
    assert log.extra["seq"].tolist() == [1, 4, 7]


def test_recordings_are_merged_by_time_and_ties_keep_the_order_given(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", *(mooncake(t, 16, 16, hash_ids=[10 + t]) for t in (0, 2, 4)))
    b = write_rows(tmp_path / "b.jsonl", *(mooncake(t, 16, 16, hash_ids=[20 + t]) for t in (1, 2, 5)))
    assert read([a, b], block_tokens=16).blocks.tolist() == [10, 21, 12, 22, 14, 25]
    assert read([b, a], block_tokens=16).blocks.tolist() == [10, 21, 22, 12, 14, 25]
    assert read([a, b, a], block_tokens=16).blocks.tolist() == [10, 21, 12, 22, 14, 25]


def test_recordings_are_merged_by_seq_where_it_tells_rows_apart(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", *(mooncake(5, 16, 16, hash_ids=[s], seq=s) for s in (0, 2)))
    b = write_rows(tmp_path / "b.jsonl", *(mooncake(5, 16, 16, hash_ids=[s], seq=s) for s in (3, 1)))
    assert read([a, b], block_tokens=16).blocks.tolist() == [0, 1, 2, 3]
    c = write_rows(
        tmp_path / "c.jsonl", *(mooncake(t, 16, 16, hash_ids=[s], seq=s) for t, s in ((3, 5), (6, 4), (7, 6)))
    )
    # c's clock was set back, but time goes on from b to c.
    assert read([c, a, b], block_tokens=16).blocks.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_recordings_of_two_servers_whose_seqs_do_not_meet_are_merged_by_time(tmp_path: Path) -> None:
    """Of one only the later files are left: by `seq` it would come behind the other, whatever the time."""
    a = write_rows(tmp_path / "a.jsonl", *(mooncake(t, 16, 16, hash_ids=[t], seq=t) for t in (0, 2, 4)))
    b = write_rows(tmp_path / "b.jsonl", *(mooncake(t, 16, 16, hash_ids=[t], seq=200 + t) for t in (1, 3, 5)))
    for files in ([a, b], [b, a]):
        log = read(files, block_tokens=16)
        assert log.blocks.tolist() == log.timestamp_ms.tolist() == [0, 1, 2, 3, 4, 5]


def test_recordings_with_seqs_of_their_own_are_merged_by_time(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", *(mooncake(t, 16, 16, hash_ids=[s], seq=s) for t, s in ((4, 1), (0, 0))))
    b = write_rows(tmp_path / "b.jsonl", *(mooncake(t, 16, 16, hash_ids=[10 + s], seq=s) for t, s in ((3, 0), (2, 1))))
    # b's clock was set back; its own order stands.
    assert read([a, b], block_tokens=16).blocks.tolist() == [0, 10, 11, 1]


def test_optional_columns(tmp_path: Path) -> None:
    rows = [
        mooncake(0, 16, 16, ttft_ms=5.5, salt="a", chat={"id": [1]}),
        mooncake(1, 16, 16),
        mooncake(2, 16, 16, loaded_tokens=7, ttft_ms=None),
    ]
    log = read(write_rows(tmp_path / "a.jsonl", *rows), block_tokens=16)
    assert set(log.extra) == {"ttft_ms", "salt", "loaded_tokens"}
    assert log.extra["salt"].tolist() == ["a", "", ""]
    assert np.array_equal(log.extra["ttft_ms"], [5.5, np.nan, np.nan], equal_nan=True)
    assert np.array_equal(log.extra["loaded_tokens"], [np.nan, np.nan, 7], equal_nan=True)


def test_columns_that_begin_in_a_later_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 300)
    rows = [mooncake(i, 16, 16, hash_ids=[i], **({"model": "m"} if i > 30 else {})) for i in range(40)]
    log = read(write_rows(tmp_path / "a.jsonl", *rows), block_tokens=16)
    assert log.blocks.tolist() == list(range(40))
    assert log.extra["model"].tolist() == [""] * 31 + ["m"] * 9


def test_windows_line_ends_a_byte_order_mark_and_no_last_newline(tmp_path: Path) -> None:
    rows = [json.dumps(mooncake(i, 40, 16)) for i in range(3)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    assert len(read(tmp_path / "a.jsonl")) == 3


def test_progress_ends_at_the_size_on_disk(tmp_path: Path) -> None:
    data = "".join(json.dumps(mooncake(i, 4000, 16)) + "\n" for i in range(500)).encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    seen: list[tuple[int, int]] = []
    read(tmp_path, progress=lambda done, total: seen.append((done, total)))
    total = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# Coding-agent sessions


def agent_request(t: float, ids: list[int], **more: Any) -> dict[str, Any]:
    return {"t": t, "type": "n", "model": "m", "in": 4 * len(ids) + 1, "out": 3, "hash_ids": ids, **more}


def write_session(path: Path, name: str, *requests: dict[str, Any], **more: Any) -> Path:
    session = {"id": name, "block_size": 4, "hash_id_scope": "local", "requests": requests, **more}
    path.write_text(json.dumps(session, indent=1))
    return path


def test_sessions_have_ids_of_their_own(tmp_path: Path) -> None:
    write_session(tmp_path / "a.json", "a", agent_request(0, [1, 2]), agent_request(2, [1, 2, 3]))
    write_session(tmp_path / "b.json", "b", agent_request(1, [1, 2]))
    log = read(tmp_path)
    assert log.block_tokens == 4
    assert log.timestamp_ms.tolist() == [0, 1000, 2000]
    assert log.extra["session_id"].tolist() == ["a", "b", "a"]
    assert log.extra["model"].tolist() == ["m", "m", "m"]
    first, other, second = np.split(log.blocks, log.starts[1:-1])
    assert second[:2].tolist() == first.tolist()
    assert not set(other.tolist()) & set(second.tolist())
    assert read(tmp_path).blocks.tolist() == log.blocks.tolist()


def test_global_ids_stay_as_they_are(tmp_path: Path) -> None:
    write_session(tmp_path / "a.json", "a", agent_request(0, [1, 2]), hash_id_scope="global")
    assert read(tmp_path).blocks.tolist() == [1, 2]


def test_sub_agents_at_any_depth(tmp_path: Path) -> None:
    inner = {"t": 13, "type": "subagent", "requests": [agent_request(14, [1, 5])]}
    mark = {"t": 10, "type": "subagent", "requests": [agent_request(11, [1, 3]), inner]}
    spawning = agent_request(20, [1, 2], requests=[agent_request(0, [1, 6]), agent_request(3, [1, 7])])
    write_session(
        tmp_path / "a.json",
        "a",
        *(agent_request(0, [1]), mark, agent_request(12, [1, 4]), spawning, agent_request(21, [8])),
        hash_id_scope="global",
    )
    log = read(tmp_path)
    assert log.timestamp_ms.tolist() == [0, 11_000, 12_000, 14_000, 20_000, 20_000, 21_000, 23_000]
    last = [part[-1] for part in np.split(log.blocks, log.starts[1:-1])]
    assert last == [1, 3, 4, 5, 2, 6, 8, 7]


def test_bad_sessions(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    mend = "mend or remove the request, or count it with --skip-bad"
    nested = {"t": 1, "type": "subagent", "requests": [agent_request(2, [1]), agent_request(3, [1], out=-1)]}
    cases = [
        (agent_request(1, [1, "x"]), f":16: requests[1].hash_ids[1]: expected int, got str; {mend}"),
        ({"t": 1, "in": 3}, f":16: requests[1].out: is missing; {mend}"),
        ({"in": 3}, f":16: requests[1].t: is missing; {mend}"),
        (17, f":16: requests[1]: expected object, got int; {mend}"),
        (nested, f":30: requests[1].requests[1].out: expected int >= 0, got -1; {mend}"),
        (agent_request(1, [1], **{"in": 99}), ":16: requests[1].hash_ids: 1 ids where 99 tokens in blocks of 4"),
    ]
    for request, message in cases:
        write_session(path, "a", agent_request(0, [1]), request)
        with pytest.raises(LogError) as caught:
            read(path)
        assert str(caught.value).removeprefix(str(path)).startswith(message)
        assert read(path, skip_bad=True).skipped == 1
    write_session(path, "a", agent_request(0, [1]), block_size=0)
    with pytest.raises(LogError, match=r"a\.json:1: block_size: expected int >= 1, got 0; mend or remove the file$"):
        read(path)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(LogError, match=r"a\.json:\d+: session: is cut short; mend or remove the file$"):
        read(path)


# Lengths


def test_lengths_alone(tmp_path: Path) -> None:
    (tmp_path / "azure.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:15:46.6805900,374,44\r\n"
        "2023-11-16 18:15:50.9951690,396,109\r\n"
        "2024-05-10 00:00:00.009930+00:00,5,6\r\n"
    )
    log = read(tmp_path / "azure.csv")
    assert log.block_tokens is None
    assert np.diff(log.timestamp_ms)[0] == pytest.approx(4314.579, abs=0.01)
    assert log.timestamp_ms[2] == pytest.approx(1715299200009.93, abs=0.01)
    assert log.input_tokens.tolist() == [374, 396, 5]
    assert log.output_tokens.tolist() == [44, 109, 6]
    assert log.starts.tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="lengths alone: without block hashes it has no chunks and no hit ratio"):
        log.chunks(512)
    (tmp_path / "burst.csv").write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45.5,GPT-4,1087,230,1317,API log\n"
    )
    burst = read(tmp_path / "burst.csv")
    assert burst.timestamp_ms.tolist() == [5000, 45500]
    assert burst.input_tokens.tolist() == [472, 1087]


# Real logs


def test_the_conversation_log(shared: Path) -> None:
    log = read(shared / "traces" / "mooncake_conversation.jsonl")
    assert (len(log), log.block_tokens, int(log.input_tokens.sum())) == (12031, 512, 144793823)
    golden = json.loads((shared / "golden" / "conversation.json").read_text())
    unbounded = {
        row["chunk_tokens"]: row for row in golden["rows"] if row["policy"] == "lru" and row["capacity_chunks"] is None
    }
    assert len(unbounded) >= 4
    for chunk_tokens, row in unbounded.items():
        coarse = log.coarsen(chunk_tokens)
        assert len(coarse.blocks) == row["chunk_accesses"]
        assert describe(coarse).unbounded_token_hit_ratio == pytest.approx(row["hit_tokens"] / row["input_tokens"])


def test_the_coding_agent_sessions(shared: Path) -> None:
    summary = describe(read(shared / "traces" / "claude_code"))
    assert (summary.requests, summary.block_tokens, summary.input_tokens) == (1654, 64, 157491108)
    assert summary.unbounded_token_hit_ratio == pytest.approx(0.9550249)


def test_numba_is_loaded_only_to_read() -> None:
    program = "import sys, kvtraces; print([name for name in ('numba', 'zstandard', 'csv') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
