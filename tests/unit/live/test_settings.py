import json

import pytest
import zmq.auth

from kvcore.live.settings import (
    Settings,
    SettingsError,
    check,
    http_address,
    load,
    parse_size,
    strange_variables,
)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path):
    path = tmp_path / "kvcore.toml"
    path.write_text(
        'l1-size-gb = 2\nchunk_size = 512\nttl-s = 9.5\nquota = ["a=1", "b=0.5"]\nplacement = "write-back"\n'
    )
    given = load({"config": str(path), "chunk_size": "64"}, {"KVCORE_TTL_S": "7", "KVCORE_CHUNK_SIZE": "128"})
    assert (given.l1_size_gb, given.chunk_size, given.ttl_s) == (2.0, 64, 7.0)
    assert given.quotas() == (("a", 512), ("b", 256))
    assert given.eviction_policy == "lru"
    assert load({}, {"KVCORE_CONFIG": str(path)}).chunk_size == 512
    assert load({}, {"KVCORE_BIND": "ipc:///a, ipc:///b"}).endpoints == ("ipc:///a", "ipc:///b")
    assert load({"pretouch": False}, {}).pretouch is False
    assert load({}, {"KVCORE_PRETOUCH": "false"}).pretouch is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"l1_size_gb": "0"}, "--l1-size-gb"),
        ({"l1_size_gb": "0.0001"}, "less than one page"),
        ({"l1_size_gb": "much"}, "--l1-size-gb"),
        ({"l2": "files:/l2", "l2_size_gb": "0.001"}, "--l2-size-gb 0.001: less than one page of 2097152 bytes"),
        ({"chunk_size": "0"}, "--chunk-size"),
        ({"placement": "sideways"}, "--placement"),
        ({"eviction_policy": "belady"}, "belady"),
        ({"page_size": "-4"}, "--page-size"),
        ({"bind": ("udp://x:1",)}, "--bind"),
        ({"bind": ("tcp://127.0.0.1",)}, "--bind"),
        ({"bind": ("ipc:///" + "x" * 100,)}, "at most 100 bytes"),
        ({"arena_dir": "/" + "x" * 100}, r"at most 100 bytes \(by default it is in --arena-dir\)"),
        ({"bind": ("tcp://*:5555",)}, "--curve-key"),
        ({"http": "8080"}, "--http"),
        ({"http": "::1:99999"}, "--http"),
        ({"quota": ("=x",)}, "--quota"),
        ({"quota": ("a=inf",)}, "--quota a=inf"),
        ({"quota": ("a=1e300",)}, "--quota"),
        ({"quota": ("a=nan",)}, "--quota"),
        ({"quota": ("a=-1",)}, "--quota a=-1"),
        ({"page_size": "0"}, "--page-size 0: no multiple"),
        ({"page_size": "1000"}, "--page-size 1000: no multiple"),
        *(
            ({name: value}, "--" + name.replace("_", "-"))
            for name in ("l1_size_gb", "ttl_s", "l2_size_gb", "l2_queue_gb", "lease_s")
            for value in ("inf", "1e300", "nan", "-inf")
        ),
        ({"eviction_policy": "belady"}, "--eviction-policy: no eviction policy 'belady'; there are lru"),
        ({"l2_eviction_policy": "belady"}, "--l2-eviction-policy"),
        ({"load_cost": "/no/such/file"}, "--load-cost /no/such/file: No such file"),
    ],
)
def test_what_cannot_be_is_refused_by_name(flags, message):
    with pytest.raises(SettingsError, match=message) as raised:
        load(flags, {})
    assert "\n" not in str(raised.value)


def test_an_error_names_where_its_setting_is_from(tmp_path):
    path = tmp_path / "kvcore.toml"
    path.write_text("chunk_size = 0\n")
    for flags, environment, message in (
        ({}, {"KVCORE_CHUNK_SIZE": "many"}, "KVCORE_CHUNK_SIZE: Expected `int`"),
        ({}, {"KVCORE_PAGE_SIZE": "0"}, "KVCORE_PAGE_SIZE 0: no multiple"),
        ({"config": str(path)}, {}, f"--config {path}, chunk_size: Expected `int` >= 1"),
        ({"chunk_size": "0"}, {"KVCORE_CHUNK_SIZE": "many"}, "--chunk-size: "),
    ):
        with pytest.raises(SettingsError) as raised:
            load(flags, environment)
        assert str(raised.value).startswith(message)


def test_variables_that_are_no_settings_are_told_with_the_nearest():
    variables = {"KVCORE_L1_SIZE": "50", "KVCORE_CONFIG": "x", "KVCORE_SERVER": "x", "KVCORE_TTL_S": "1", "HOME": "/"}
    assert strange_variables(variables) == ["KVCORE_L1_SIZE is no setting: did you mean KVCORE_L1_SIZE_GB?"]
    assert strange_variables({"KVCORE_QQQQQQQQQQQQQQ": ""}) == ["KVCORE_QQQQQQQQQQQQQQ is no setting"]


def test_the_store_is_shown_without_what_opens_it():
    shown = Settings(l2="redis://user:s3cr3t@host:6379/0?password=s3cr3t").shown()
    assert shown["l2"] == "redis://host:6379/0"
    assert shown["chunk_size"] == 256


@pytest.mark.parametrize(("processors", "threads"), [(1, 2), (2, 2), (7, 3), (16, 8), (128, 8)])
def test_threads_that_copy_to_and_from_l2(monkeypatch, processors, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(processors)))
    assert Settings().copying_threads == threads
    assert Settings(l2_threads=5).copying_threads == 5


def test_a_file_of_unknown_settings_is_refused(tmp_path):
    path = tmp_path / "kvcore.toml"
    path.write_text("l1-size = 2\n")
    with pytest.raises(SettingsError, match="no setting 'l1_size'"):
        load({"config": str(path)}, {})
    path.write_text("chunk_size = 64\nchunk-size = 128\n")
    with pytest.raises(SettingsError, match="'chunk_size' is there twice"):
        load({"config": str(path)}, {})
    path.write_text("l1-size-gb = \n")
    with pytest.raises(SettingsError, match=r"kvcore\.toml"):
        load({"config": str(path)}, {})


def test_sizes_and_addresses():
    assert [parse_size(text, "x") for text in ("4096", "64K", "2MiB", "1 GB", "2m")] == [
        4096,
        65536,
        2 << 20,
        1 << 30,
        2 << 20,
    ]
    assert http_address(Settings(http="off")) is None
    assert http_address(Settings(http="[::1]:80")) == ("::1", 80)


def test_the_core_is_configured_by_them(tmp_path):
    cost = tmp_path / "cost.json"
    cost.write_text(
        json.dumps(
            {
                "chunk_tokens": 256,
                "prefill_floor_ns": 1,
                "prefill_base_ns": 1,
                "prefill_linear_ns": 1,
                "prefill_quadratic_ns": 0,
                "latency_ns": [1, 2],
                "bytes_per_s": [3, 4],
            }
        )
    )
    settings = check(
        Settings(
            l1_size_gb=1,
            l2="files:/x",
            l2_size_gb=2,
            placement="write-back",
            ttl_s=0.5,
            load_cost=str(cost),
            quota=("a=1",),
        )
    )
    config = settings.core_config()
    assert [tier.pages for tier in config.tiers] == [512 - 32, 1024]
    assert config.ttl_ns == 500_000_000
    assert config.load_cost.bytes_per_s == (3, 4)
    assert Settings(l1_size_gb=1, l2="files:/x").core_config().tiers[1].pages is None
    assert Settings(l1_size_gb=1, placement="write-back").core_config().tiers[0].pages == 512


def test_tcp_beyond_loopback_takes_keys(tmp_path):
    public, secret = zmq.auth.create_certificates(tmp_path, "server")
    settings = load({"bind": ("tcp://0.0.0.0:5555",), "curve_key": secret, "curve_clients": str(tmp_path)}, {})
    assert settings.curve_key == secret != public
