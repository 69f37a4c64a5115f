"""What blocks are named after, and what the connectors' settings take."""

import os
from types import SimpleNamespace

import pytest
from engine_double import BLOCK, CHUNK, EngineRequest, engine_hashes

from kvcore.policy.hashing import Namespace, block_hashes
from kvcore.vllm import adapters, namespace
from kvcore.vllm.adapters import Adapters
from kvcore.vllm.identity import engine_namespace, lasts
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


def lora(name, path, number=1, **fields):
    return SimpleNamespace(lora_name=name, lora_path=str(path), lora_int_id=number, **fields)


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    return tmp_path


def image(identifier, offset, length=20):
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=length))


def test_equal_requests_have_equal_names():
    assert hashes() == hashes()
    assert len(hashes()) == 100 // BLOCK


def test_salt_and_adapter_change_every_name(adapter):
    seen = [hashes(), hashes(cache_salt="s")]
    seen += [hashes(lora_request=lora(name, adapter)) for name in "lk"]
    seen.append(hashes(cache_salt="s", lora_request=lora("l", adapter)))
    for i, one in enumerate(seen):
        for other in seen[i + 1 :]:
            assert not set(one) & set(other)


def overwrite(folder, changed_ns):
    os.utime(folder / "adapter_model.safetensors", ns=(changed_ns, changed_ns))


def test_adapter_that_is_overwritten_is_another_to_an_engine_that_takes_it_up_then(adapter):
    before = hashes(lora_request=lora("l", adapter))
    assert hashes(lora_request=lora("l", adapter)) == before
    overwrite(adapter, 1)
    assert not set(hashes(lora_request=lora("l", adapter))) & set(before)


def test_adapter_that_is_overwritten_under_an_engine_is_not_named_until_it_is_loaded_anew(adapter):
    """The engine goes on with what it has loaded, until it drops the adapter for others and loads it again."""
    clock = [0.0]
    hasher = Hasher(NAMESPACE, adapters=Adapters(clock=lambda: clock[0]))

    def named(**fields):
        clock[0] += 1
        return hasher(EngineRequest("a", TOKENS, lora_request=lora("l", adapter, **fields)))

    first = named()
    assert named() == first
    overwrite(adapter, 1)
    assert named() is None
    overwrite(adapter, 2)
    assert named() is None
    assert hasher.marked("m")(EngineRequest("a", TOKENS, lora_request=lora("l", adapter))) is None
    anew = named(load_inplace=True)
    assert anew
    assert not set(anew) & set(first)
    assert named() == anew
    assert named(number=2) == anew, "another number is another load"


def test_adapters_files_are_not_looked_at_in_every_request(adapter, monkeypatch):
    looked = []
    monkeypatch.setattr(adapters, "_files", lambda path: looked.append(path) or "x")
    one = Adapters(clock=lambda: 5.0)
    assert one.identity(lora("l", adapter)) == one.identity(lora("l", adapter))
    assert len(looked) == 1


def test_adapter_of_the_hub_is_named_once_it_is_here(tmp_path, monkeypatch):
    clock = [0.0]
    one = Adapters(clock=lambda: clock[0])
    monkeypatch.chdir(tmp_path)
    assert one.identity(lora("l", "org/adapter")) is None
    assert one.identity(lora("l", "/no/such/folder")) is None
    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, local_files_only: str(tmp_path / "snapshot"))
    clock[0] += 1
    assert one.identity(lora("l", "org/adapter")) == "l|org/adapter|"


def test_images_count_from_their_position_on():
    one, other = hashes(mm_features=[image("x", 40)]), hashes(mm_features=[image("y", 40)])
    assert one[:2] == other[:2] == hashes()[:2]
    assert not set(one[2:]) & set(other[2:])
    assert hashes(mm_features=[image("x", 41)])[2:] != one[2:]


def test_image_without_identity_is_not_cached():
    assert hashes(mm_features=[image("", 40)]) is None


def test_images_that_the_engine_numbers_are_not_cached_and_text_is():
    hasher = Hasher(NAMESPACE, media=False)
    assert hasher(EngineRequest("a", TOKENS, mm_features=[image("renderer0-mm-1-image-0", 40)])) is None
    assert hasher(EngineRequest("a", TOKENS)) == hashes()
    assert hasher.marked("m")(EngineRequest("a", TOKENS, mm_features=[image("x", 40)])) is None


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


def test_the_engines_hashes_do_not_tell_an_overwritten_adapter_apart_and_the_root_does(adapter):
    hasher, seen = Hasher(NAMESPACE, engine_hashes=True), []
    for changed_ns in (1, 2):
        overwrite(adapter, changed_ns)
        request = EngineRequest("a", LONG, lora_request=lora("l", adapter, load_inplace=True))
        request.block_hashes = engine_hashes(LONG, "l")
        seen.append(hasher(request))
    assert not set(seen[0]) & set(seen[1])


def test_probe_is_of_the_tokens_alone():
    one = Hasher.probe(EngineRequest("a", TOKENS, cache_salt="s"), CHUNK)
    assert one == Hasher.probe(EngineRequest("b", TOKENS), CHUNK)
    assert one != Hasher.probe(EngineRequest("b", TOKENS[1:]), CHUNK)
    assert Hasher.probe(EngineRequest("b", TOKENS[: CHUNK - 1]), CHUNK) == b""


class Config:
    """A model's configuration as transformers reads it."""

    def __init__(self, **fields):
        self.fields = fields

    def to_dict(self):
        return {**self.fields, "_name_or_path": str(id(self)), "transformers_version": str(id(self))}


def media(**kwargs):
    return SimpleNamespace(mm_processor_kwargs=kwargs)


def config(folder, **changes):
    model = {
        "model": str(folder), "revision": None, "dtype": "torch.bfloat16", "quantization": None, "max_model_len": 4096,
        "seed": 0, "hf_config": Config(rope_theta=1e6), "multimodal_config": None,
    }  # fmt: skip
    return SimpleNamespace(
        load_config=SimpleNamespace(load_format=changes.pop("load_format", "auto")),
        model_config=SimpleNamespace(**{**model, **changes}),
        cache_config=SimpleNamespace(cache_dtype=changes.pop("cache_dtype", "auto")),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=changes.pop("tensor", 1), pipeline_parallel_size=changes.pop("pipeline", 1)
        ),
        speculative_config=None,
        instance_id=changes.pop("start", "1"),
        kv_transfer_config=SimpleNamespace(engine_id="e"),
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
        {"hf_config": Config(rope_theta=5)}, {"hf_config": Config(rope_theta=1e6, rope_scaling={"factor": 4})},
        {"multimodal_config": media(max_pixels=5)}, {"load_format": "dummy"}, {"load_format": "dummy", "seed": 1},
        {"hf_config": Config(rope_parameters={"rope_type": "longrope"})},
        {"hf_config": Config(rope_parameters={"rope_type": "longrope"}), "max_model_len": 8192},
        {"quantization_config": {"linear": "fp8_per_tensor"}}, {"quantization_config": {"linear": "int4"}},
    ]  # fmt: skip
    assert digest(tmp_path, max_model_len=8192, seed=1, multimodal_config=media()) == same
    seen = {same, *(digest(tmp_path, **change) for change in changes), digest("org/model"), digest("org/other")}
    seen.add(digest("org/model", revision="abc"))
    os.utime(weights, ns=(1, 1))
    seen.add(digest(tmp_path))
    assert len(seen) == len(changes) + 5


def test_weights_of_which_nothing_tells_whether_they_have_changed_are_those_of_one_start(tmp_path):
    """vLLM makes a folder without weights for what lies in object storage, and notes where that is."""
    (tmp_path / "config.json").write_text("{}")
    stored = digest(tmp_path, model_weights="s3://bucket/a")
    assert digest(tmp_path, model_weights="s3://bucket/a") == stored
    named = {"revision": "v2", "model_weights": "s3://bucket/a"}
    seen = {stored, digest(tmp_path, model_weights="s3://bucket/b"), digest(tmp_path, **named)}
    seen.add(digest(tmp_path, model_weights="s3://bucket/a", start="2"))
    assert len(seen) == 4
    assert digest(tmp_path, **named, start="2") in seen, "the user says that they are the same"
    assert not lasts(config(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"weights")
    assert lasts(config(tmp_path / "model.gguf"))
    assert lasts(config(tmp_path, **named))
    assert digest(tmp_path, load_format="dummy") == digest(tmp_path, load_format="dummy", start="2")


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
