"""The compiled code kept on disk."""

import os
from pathlib import Path

from kvsim.sweep.jit import drop_stale_code


def test_code_older_than_any_source_is_dropped(tmp_path: Path) -> None:
    cache = tmp_path / "__pycache__"
    cache.mkdir()
    for name, when in (
        ("kernel.py", 100),
        ("part.py", 200),
        ("__pycache__/old.nbi", 150),
        ("__pycache__/new.nbi", 250),
    ):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (when, when))
    drop_stale_code(tmp_path)
    assert [path.name for path in cache.iterdir()] == ["new.nbi"]
