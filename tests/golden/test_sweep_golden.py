"""The sweep against exact numbers from an independent program."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvsim.sweep import chains, lru_curve, point, sweep
from kvtraces import Log, read

COLUMNS = ("requests", "chunk_accesses", "hit_chunks", "hit_tokens", "input_tokens")


@pytest.fixture(scope="module")
def rows(shared: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((shared / "golden" / "conversation.json").read_bytes())["rows"]
    assert {row["policy"] for row in found} == {"lru", "fifo", "lfu", "belady"}
    return found


@pytest.fixture(scope="module")
def log(shared: Path) -> Log:
    return read(shared / "traces" / "mooncake_conversation.jsonl")


def test_every_row(log: Log, rows: list[dict[str, Any]]) -> None:
    """All chunk sizes in one sweep, so that coarse chunks come from the nodes of fine ones."""
    sizes = sorted({row["chunk_tokens"] for row in rows})
    capacities = {
        size: sorted({row["capacity_chunks"] for row in rows if row["chunk_tokens"] == size}, key=lambda c: c or 0)
        for size in sizes
    }
    points = {
        (p.chunk_tokens, p.policy, p.capacity_chunks): p
        for p in sweep(log, chunk_tokens=sizes, capacities=capacities, policies=["lru", "fifo", "lfu", "belady"])
    }
    for row in rows:
        found = points[row["chunk_tokens"], row["policy"], row["capacity_chunks"]]
        assert {name: getattr(found, name) for name in COLUMNS} == {name: row[name] for name in COLUMNS}
        assert round(found.token_hit_ratio, 6) == row["token_hit_ratio"]


def test_settings_alone(log: Log, rows: list[dict[str, Any]]) -> None:
    """Each chunk size by itself, from its own nodes."""
    for size in sorted({row["chunk_tokens"] for row in rows}):
        each = chains(log, size)
        curve = lru_curve(each)
        for row in rows:
            if row["chunk_tokens"] == size:
                assert point(each, row["policy"], row["capacity_chunks"]).hit_chunks == row["hit_chunks"]
                if row["policy"] == "lru":
                    capacity = row["capacity_chunks"]
                    assert curve[each.unique if capacity is None else capacity] == row["hit_chunks"]
