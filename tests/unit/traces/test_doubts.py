"""What is doubtful of a log that can be read: it is told, and read all the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtraces import Log, LogError, Row, read
from kvtraces._chained import Followed
from kvtraces.doubts import unit_of_time


def log_of(path: Path, *rows: dict[str, Any], **options: Any) -> Log:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(path, **options)


def row(time_ms: float, *ids: int, **more: Any) -> dict[str, Any]:
    return {
        "timestamp": time_ms,
        "input_length": 16 * len(ids),
        "output_length": 1,
        "hash_ids": ids,
        "block_size": 16,
        **more,
    }


def test_ids_of_blocks_alone_are_told_with_both_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    log = log_of(path, row(0, 1, 2, 3), row(1, 1, 2, 3, 4), row(2, 1, 5, 3))
    (doubt,) = log.doubts
    assert doubt == (
        "hash_ids must stand for the whole prompt up to their block, and these do not: block 3 follows block 2 in "
        f"{path}:1 and follows block 5 in {path}:3; what is predicted of them is too good; chain them as "
        "traces/data/README.md says"
    )
    assert len(log) == 3
    assert log.head(1).doubts == log.doubts
    (doubt,) = log_of(path, row(0, 1, 2), row(1, 2)).doubts
    assert f"block 2 follows block 1 in {path}:1 and begins a prompt in {path}:2" in doubt


def test_places_are_in_their_files(tmp_path: Path) -> None:
    log_of(tmp_path / "a.jsonl", row(0, 7), row(2, 1, 2))
    log_of(tmp_path / "b.jsonl", row(1, 7), row(3, 7), row(4, 3, 2))
    (doubt,) = read(tmp_path).doubts
    assert f"{tmp_path}/a.jsonl:2 and follows block 3 in {tmp_path}/b.jsonl:3" in doubt


def test_a_trailing_partial_block_follows_whatever_it_likes(tmp_path: Path) -> None:
    short = {"input_length": 20}
    assert log_of(tmp_path / "a.jsonl", row(0, 1, 9, **short), row(1, 2, 9, **short), row(2, 1, 3)).doubts == ()


def test_a_block_twice_in_a_row_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = (row(0, 1, 2), row(1, 1, 2, 4, 2), row(2, 1, 2, 3))
    with pytest.raises(LogError, match=r"a\.jsonl:2: hash_ids: names block 2 twice; an id stands for the whole prompt"):
        log_of(path, *rows)
    log = log_of(path, *rows, skip_bad=True)
    assert (log.skipped, log.doubts, log.blocks.tolist()) == (1, (), [1, 2, 1, 2, 3])
    assert "--skip-bad" not in log.skipped_messages[0]
    with pytest.raises(LogError, match="empty log: no requests in it, 1 bad row left out"):
        log_of(path, row(0, 5, 5), skip_bad=True)


def follow_one_each(prompts: list[list[int]]) -> bool:
    before: dict[int, int] = {}
    pairs = [pair for prompt in prompts for pair in zip([-1, *prompt], prompt, strict=False)]
    return all(before.setdefault(one, last) == last for last, one in pairs)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), max_size=4, unique=True), min_size=1, max_size=5))
def test_whatever_is_no_tree_is_told(tmp_path: Path, prompts: list[list[int]]) -> None:
    log = log_of(tmp_path / "a.jsonl", *(row(i, *prompt) for i, prompt in enumerate(prompts)))
    assert (log.doubts == ()) == follow_one_each(prompts)


def test_of_a_large_log_the_first_blocks_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(0, 1, 2), row(1, 1, 2, 3), row(2, 2)]
    for most, told in ((6, 1), (5, 0), (4, 0), (1, 0)):
        monkeypatch.setattr("kvtraces.doubts.MOST_BLOCKS", most)
        assert len(log_of(tmp_path / "a.jsonl", *rows).doubts) == told
        (tmp_path / "b.jsonl").write_text((tmp_path / "a.jsonl").read_text())
        log_of(tmp_path / "a.jsonl", *rows[:1])
        assert read(tmp_path).doubts == (), "of several files together"
        (tmp_path / "b.jsonl").unlink()


def test_large_ids_are_told_apart() -> None:
    many = 100_000
    ids = np.random.default_rng(0).integers(0, 2**63 - 1, many)
    counts = np.full(many // 100, 100)
    followed = Followed(2 * many)
    assert followed.first_other(ids, counts, counts) == -1
    assert followed.first_other(ids[100:], counts[1:], counts[1:]) == -1
    assert followed.first_other(ids[7:9], np.array([2]), np.array([2])) == ids[7]


def test_a_request_id_of_several_rows_is_told(tmp_path: Path) -> None:
    names = ("a", "b", None, "b", None, "a", "b")
    log = log_of(tmp_path / "a.jsonl", *(row(i, 1, request_id=name) for i, name in enumerate(names)))
    assert log.doubts == ("3 rows have a request_id that an earlier row has, b first: is a recording there twice?",)
    assert log_of(tmp_path / "a.jsonl", *(row(i, 1, request_id=str(i)) for i in range(3))).doubts == ()


def test_timestamps_in_seconds_are_told(tmp_path: Path) -> None:
    (doubt,) = log_of(tmp_path / "a.jsonl", row(1_700_000_000, 1), row(1_700_000_009, 1)).doubts
    assert "timestamps are in milliseconds" in doubt
    assert "the first, 1700000000, is a time of 2023-11-14 then; if they are, multiply them by 1,000" in doubt
    (doubt,) = unit_of_time(np.arange(500) * 0.517)
    assert "most have fractions, and in ms they are 1,938 requests a second" in doubt
    for times in (np.arange(500) * 5.17, np.arange(500.0), np.full(500, 0.5), 1.7e12 + np.arange(500), np.zeros(1)):
        assert unit_of_time(times) == []


def test_a_log_in_order_of_completion_is_sorted_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [row(3, 1), row(1, 2), row(1, 3), row(5, 4), row(4, 5)]
    with pytest.raises(LogError, match=r"a\.jsonl:2: timestamp: 1 comes after 3: .* sort the rows \(--sort\)"):
        log_of(path, *rows)
    log = read(path, sort=True)
    assert (log.blocks.tolist(), log.timestamp_ms.tolist()) == ([2, 3, 1, 5, 4], [1, 1, 3, 4, 5])
    assert (log.doubts, log.skipped) == (("sorted by timestamp: 3 rows of 5 came after a later one",), 0)
    log_of(tmp_path / "b.jsonl", row(9, 6), row(2, 7), sort=True)
    assert read(tmp_path, sort=True).blocks.tolist() == [2, 3, 7, 1, 5, 4, 6]
    assert log_of(path, *rows[1:4], sort=True).doubts == ()


def test_seq_is_the_order_though_sorting_is_asked_for(tmp_path: Path) -> None:
    log = log_of(tmp_path / "a.jsonl", row(3, 1, seq=1), row(1, 2, seq=2), row(1, 3, seq=0), sort=True)
    assert (log.blocks.tolist(), log.doubts) == ([3, 1, 2], ())


def test_a_file_counts_once_by_whatever_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log_of(tmp_path / "a.jsonl", row(0, 1), row(1, 2))
    log_of(tmp_path / "p.jsonl", row(5, 3))
    log_of(tmp_path / "p.1.jsonl", row(5, 4), row(7, 6))
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    (tmp_path / "folder").symlink_to(tmp_path)
    for twice in ("link.jsonl", "a.jsonl", "./folder/a.jsonl"):
        assert len(read(["a.jsonl", twice, str(tmp_path / "a.jsonl")])) == 2
    assert read(["p.1.jsonl", str(tmp_path / "p.jsonl")]).blocks.tolist() == [3, 4, 6]  # one set, in its order


def test_readme_lists_every_field() -> None:
    readme = (Path(__file__).parents[3] / "traces" / "data" / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in Row.__struct_fields__)
