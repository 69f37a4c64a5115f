import sys
from pathlib import Path

import pytest

from kvcore.live.stores.base import StoreError
from kvcore.live.stores.files import FileStore
from kvcore.live.stores.registry import open_store

VENDOR = """
class Vendor:
    def __init__(self, url, size_bytes):
        self.url, self.size_bytes = url, size_bytes

def needs_more(url, size_bytes):
    import a_package_that_nobody_has
"""


def test_files(tmp_path: Path) -> None:
    store = open_store(f"files:{tmp_path}/a%20store", 100)
    assert isinstance(store, FileStore)
    assert store.size_bytes == 100
    assert (tmp_path / "a store").is_dir()
    store.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("files:relative", "absolute"),
        ("files://host/folder", "absolute"),
        ("redis://localhost:port/0", "(?i)port"),
        ("redis://localhost?timeout=soon", "not a number"),
        ("s3:///prefix", "bucket"),
        ("s3://key:secret@bucket/prefix", "environment"),
        ("s3://bucket/prefix?endpont=x", "no option 'endpont'"),
        ("nosuch:x", "'nosuch': no such store; there are files, redis"),
        ("", "no such store"),
    ],
)
def test_urls_that_cannot_be_read(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_is_not_asked_at_open_and_passwords_are_not_told() -> None:
    store = open_store("valkey://:secret@127.0.0.1:1/0?prefix=x:&timeout=0.2")
    with pytest.raises(StoreError) as caught:
        store.get(b"name", [memoryview(bytearray(1))])
    assert "127.0.0.1:1" in str(caught.value)
    assert "secret" not in str(caught.value)
    store.close()


def test_a_vendors_store_comes_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kv_vendor.py").write_text(VENDOR)
    info = tmp_path / "kv_vendor-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kv-vendor\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvcore.stores]\nvendor = kv_vendor:Vendor\nmore = kv_vendor:needs_more\n")
    monkeypatch.syspath_prepend(tmp_path)
    store = open_store("vendor://somewhere", 7)
    assert (store.url, store.size_bytes) == ("vendor://somewhere", 7)
    with pytest.raises(StoreError, match="needs the Python package a_package_that_nobody_has"):
        open_store("more:x")
    with pytest.raises(StoreError, match="vendor"):
        open_store("nosuch:x")
    sys.modules.pop("kv_vendor")
