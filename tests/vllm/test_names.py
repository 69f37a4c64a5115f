"""What blocks are named after, and what the connectors' settings take."""

import os
from types import SimpleNamespace

import pytest
from engine_double import BLOCK, CHUNK, EngineRequest, engine_hashes

from kvcore.policy.hashing import Namespace, block_hashes
from kvcore.vllm import namespace
from kvcore.vllm.identity import engine_namespace
from kvcore.vllm.namespace import Hasher
from kvcore.vllm.settings import read
from kvcore.vllm.stats import Counters, add

NAMESPACE = Namespace(model="m", kv_dtype="float32", layout="x", block_tokens=BLOCK)
TOKENS = list(range(100))
LONG = list(range(40 * BLOCK + 5))
REMEMBERED = 32 * BLOCK
"""Tokens of LONG that are remembered: whole runs of 16 blocks."""


def hashes(**fields):
    return Hasher(NAMESPACE)(EngineRequest("a", TOKENS, **fields))


def lora(name, path=""):
    return SimpleNamespace(lora_name=name, lora_path=str(path))


def image(identifier, offset, length=20):
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=length))


def test_equal_requests_have_equal_names():
    assert hashes() == hashes()
    assert len(hashes()) == 100 // BLOCK


def test_salt_and_adapter_change_every_name():
    seen = [hashes(), hashes(cache_salt="s"), hashes(lora_request=lora("l")), hashes(lora_request=lora("k"))]
    seen.append(hashes(cache_salt="s", lora_request=lora("l")))
    for i, one in enumerate(seen):
        for other in seen[i + 1 :]:
            assert not set(one) & set(other)


def test_adapter_that_is_overwritten_under_its_name_is_another(tmp_path):
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"one")
    before = hashes(lora_request=lora("l", tmp_path))
    assert hashes(lora_request=lora("l", tmp_path)) == before
    os.utime(weights, ns=(1, 1))
    assert not set(hashes(lora_request=lora("l", tmp_path))) & set(before)


def test_images_count_from_their_position_on():
    one, other = hashes(mm_features=[image("x", 40)]), hashes(mm_features=[image("y", 40)])
    assert one[:2] == other[:2] == hashes()[:2]
    assert not set(one[2:]) & set(other[2:])
    assert hashes(mm_features=[image("x", 41)])[2:] != one[2:]


def test_image_without_identity_is_not_cached():
    assert hashes(mm_features=[image("", 40)]) is None


def test_what_the_engine_hashed_alike_is_named_once_and_the_same(monkeypatch):
    hasher, named = Hasher(NAMESPACE, engine_hashes=True), []
    monkeypatch.setattr(namespace, "block_hashes", lambda *a, **k: named.append(len(a[0])) or block_hashes(*a, **k))
    changed = [*LONG[:300], 7, *LONG[301:]]
    for tokens, fields, hashed in [
        (LONG, {}, len(LONG)),
        (LONG, {}, len(LONG) - REMEMBERED),
        ([*LONG, *range(40)], {}, len(LONG) - REMEMBERED + 40),
        (LONG[:REMEMBERED], {}, None),
        (LONG[: REMEMBERED - 1], {}, REMEMBERED // 2 - 1),
        (changed, {}, len(LONG) - REMEMBERED // 2),  # the run that it differs in, and what lies behind
        (LONG, {"cache_salt": "s"}, len(LONG)),
        (LONG, {"mm_features": [image("x", 40)]}, len(LONG)),
    ]:
        request = EngineRequest("a", tokens, **fields)
        request.block_hashes = engine_hashes(tokens, repr(fields))
        named.clear()
        ours = hasher(request)
        assert named == ([] if hashed is None else [hashed])
        assert ours == Hasher(NAMESPACE)(EngineRequest("b", tokens, **fields))


def test_the_memory_of_names_is_bounded(monkeypatch):
    monkeypatch.setattr(namespace, "_MOST_RUNS", 3)
    hasher = Hasher(NAMESPACE, engine_hashes=True)
    for seed in range(6):
        tokens = [seed, *LONG]
        for _ in range(2):
            request = EngineRequest("a", tokens)
            request.block_hashes = engine_hashes(tokens)
            assert hasher(request) == Hasher(NAMESPACE)(EngineRequest("b", tokens))
            assert len(hasher._known) <= 5


def test_images_count_from_their_position_behind_a_remembered_prefix_too():
    hasher = Hasher(NAMESPACE, engine_hashes=True)
    for tokens in (LONG, [*LONG, *range(40)]):
        request = EngineRequest("a", tokens, mm_features=[image("x", 590)])
        request.block_hashes = engine_hashes(tokens, "x at 590")
        assert hasher(request) == Hasher(NAMESPACE)(EngineRequest("b", tokens, mm_features=[image("x", 590)]))


@pytest.mark.parametrize("theirs", [[], engine_hashes(LONG)[:-1], engine_hashes(LONG, block=BLOCK // 2)])
def test_engine_hashes_in_other_units_are_ignored(theirs):
    hasher = Hasher(NAMESPACE, engine_hashes=True)
    for tokens in (LONG, LONG[::-1]):
        request = EngineRequest("a", tokens)
        request.block_hashes = theirs
        assert hasher(request) == Hasher(NAMESPACE)(EngineRequest("b", tokens))


def test_the_engines_hashes_do_not_tell_an_overwritten_adapter_apart_and_the_root_does(tmp_path):
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"one")
    hasher, seen = Hasher(NAMESPACE, engine_hashes=True), []
    for changed_ns in (1, 2):
        os.utime(weights, ns=(changed_ns, changed_ns))
        request = EngineRequest("a", LONG, lora_request=lora("l", tmp_path))
        request.block_hashes = engine_hashes(LONG, "l")
        seen.append(hasher(request))
    assert not set(seen[0]) & set(seen[1])


def test_probe_is_of_the_tokens_alone():
    one = Hasher.probe(EngineRequest("a", TOKENS, cache_salt="s"), CHUNK)
    assert one == Hasher.probe(EngineRequest("b", TOKENS), CHUNK)
    assert one != Hasher.probe(EngineRequest("b", TOKENS[1:]), CHUNK)
    assert Hasher.probe(EngineRequest("b", TOKENS[: CHUNK - 1]), CHUNK) == b""


def config(folder, **changes):
    model = {"model": str(folder), "revision": None, "dtype": "torch.bfloat16", "quantization": None, "hf_config": None}
    return SimpleNamespace(
        model_config=SimpleNamespace(**{**model, **changes}),
        cache_config=SimpleNamespace(cache_dtype=changes.pop("cache_dtype", "auto")),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=changes.pop("tensor", 1), pipeline_parallel_size=changes.pop("pipeline", 1)
        ),
        speculative_config=None,
    )


def digest(folder, **changes):
    return engine_namespace(config(folder, **changes), layout="x", isa="vec", block_tokens=BLOCK).digest()


def test_engine_namespace_tells_apart_what_changes_kv(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    same = digest(tmp_path)
    assert digest(tmp_path) == same
    changes = [
        {"dtype": "torch.float32"}, {"quantization": "fp8"}, {"cache_dtype": "fp8"}, {"tensor": 2}, {"pipeline": 2},
        {"hf_overrides": {"rope_theta": 5}},
    ]  # fmt: skip
    seen = {same, *(digest(tmp_path, **change) for change in changes), digest("org/model"), digest("org/other")}
    seen.add(digest("org/model", revision="abc"))
    os.utime(weights, ns=(1, 1))
    seen.add(digest(tmp_path))
    assert len(seen) == len(changes) + 5


def test_settings_come_from_the_config_then_the_environment():
    environ = {"KVCORE_ENDPOINT": "ipc:///e", "KVCORE_LOAD_MODE": "async"}
    assert read({}, environ).endpoint == "ipc:///e"
    assert read({"load_mode": "sync"}, environ).load_mode == "sync"
    assert read({}, {"KVCORE_ARENA_DIR": "/tmp/x"}).endpoint.startswith("ipc:///tmp/x/")
    assert read({"chunk_size": 128}, {}, embedded=True).server == {"chunk_size": 128}


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"chunk_size": 128}, "no key chunk_size"),
        ({"load_mode": "fast"}, "load_mode"),
        ({"deadline_ms": "soon"}, "deadline_ms"),
        ({"layerwise": "perhaps"}, "layerwise"),
        ({"curve_server": "key"}, "go together"),
    ],
)
def test_settings_that_do_not_fit_are_named(extra, said):
    with pytest.raises(ValueError, match=said):
        read(extra, {})


def test_counters_are_taken_once_and_added_up():
    counters = Counters()
    counters.loaded_tokens += 3
    counters.refused["room"] = 2
    first = counters.take()
    assert first == {"loaded_tokens": 3, "refused_chunks_room": 2}
    assert counters.take() == {}
    assert add(first, {"loaded_tokens": 1, "lookups": 1}) == {
        "loaded_tokens": 4,
        "refused_chunks_room": 2,
        "lookups": 1,
    }
