"""Bytes of KV a token, from the table and from a config.json."""

import json

import pytest

from kvsim.errors import UsageError
from kvsim.models import gpu, gpu_names, model, model_names
from kvsim.models.config import read_config
from kvsim.tuner.pricing import KvSize, kv_size

QWEN3_8B = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
}


def write(folder, **config):
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("qwen3-8b", 147_456),
        ("Qwen/Qwen3-8B", 147_456),
        ("qwen3_8b", 147_456),
        ("someone/Qwen3-8B-AWQ", 147_456),
        ("qwen3-30b-a3b", 48 * 4 * 128 * 2 * 2),
        ("llama-3.1-8b", 131_072),
        ("meta-llama/Llama-3.1-70B-Instruct", 327_680),
        ("llama-3.1-405b", 126 * 8 * 128 * 2 * 2),
        ("mixtral-8x7b", 131_072),
        ("deepseek-r1", 61 * 576 * 2),
        ("gpt-oss-20b", 24 * 8 * 64 * 2 * 2),
    ],
)
def test_bytes_of_known_models(name, bytes_per_token):
    assert model(name).bytes_per_token() == bytes_per_token


def test_every_model_of_the_table_has_a_size_or_a_reason():
    reasons = []
    for name in model_names():
        try:
            assert model(name).bytes_per_token() > 10_000
        except UsageError as error:
            reasons.append(str(error).removeprefix(f"{name}: "))
    assert 0 < len(reasons) < len(model_names()) / 4
    assert all("linear" in reason or "indexer" in reason or "other heads" in reason for reason in reasons)


def test_dtype_scales_and_unknown_ones_are_refused():
    shape = model("qwen3-8b")
    assert shape.bytes_per_token(kv_dtype="fp8") * 2 == shape.bytes_per_token()
    assert shape.bytes_per_token(kv_dtype="fp32") == 2 * shape.bytes_per_token()
    with pytest.raises(UsageError, match=r"'int3'.*bf16"):
        shape.bytes_per_token(kv_dtype="int3")


def test_heads_are_repeated_only_beyond_their_number():
    shape = model("qwen3-30b-a3b")  # 4 KV heads
    assert shape.bytes_per_token(tensor_parallel=4) == shape.bytes_per_token()
    assert shape.bytes_per_token(tensor_parallel=8) == 2 * shape.bytes_per_token()
    with pytest.raises(UsageError, match="4 KV heads"):
        shape.bytes_per_token(tensor_parallel=3)
    with pytest.raises(UsageError, match="at least 1"):
        shape.bytes_per_token(tensor_parallel=0)


def test_a_latent_is_stored_once_and_goes_to_every_rank():
    shape = model("deepseek-v3")
    assert shape.bytes_per_token(tensor_parallel=8) == shape.bytes_per_token()
    assert shape.moved_bytes_per_token(tensor_parallel=8) == 8 * shape.bytes_per_token()
    heads = model("llama-3.1-70b")
    assert heads.moved_bytes_per_token(tensor_parallel=8) == heads.bytes_per_token(tensor_parallel=8)


def test_sliding_layers_are_counted_whole_and_said():
    shape = model("gemma-3-27b")
    assert shape.bytes_per_token() == 62 * 16 * 128 * 2 * 2
    assert "52 of 62 layers" in shape.note()
    assert model("qwen3-8b").note() is None


def test_unknown_names_list_close_ones():
    with pytest.raises(UsageError, match=r"'qwen3-9b'.*did you mean.*qwen3-8b"):
        model("qwen3-9b")
    with pytest.raises(UsageError, match=r"'zzzz'; there are .*llama-3.1-8b"):
        model("zzzz")
    with pytest.raises(UsageError, match=r"'h101'.*did you mean.*h100"):
        gpu("h101")


def test_gpus():
    assert gpu("NVIDIA H100").name == "h100"
    assert gpu("h100-80gb") == gpu("h100")
    assert gpu("h100").memory_gib == 80
    assert len(gpu_names()) > 10


def test_config_file_and_folder(tmp_path):
    path = write(tmp_path, **QWEN3_8B)
    assert model(str(path)).bytes_per_token() == 147_456
    assert model(str(tmp_path)).bytes_per_token() == 147_456


def test_config_without_the_optional_fields(tmp_path):
    path = write(tmp_path, num_hidden_layers=32, num_attention_heads=32, hidden_size=4096, torch_dtype="float32")
    assert read_config(path).bytes_per_token() == 2 * 32 * 32 * 128 * 4


def test_config_of_a_latent_model(tmp_path):
    path = write(tmp_path, num_hidden_layers=61, num_attention_heads=128, kv_lora_rank=512, qk_rope_head_dim=64)
    assert read_config(path).bytes_per_token(tensor_parallel=8) == 61 * 576 * 2


def test_config_of_a_multimodal_model(tmp_path):
    path = write(
        tmp_path, torch_dtype="bfloat16", text_config={k: v for k, v in QWEN3_8B.items() if k != "torch_dtype"}
    )
    assert read_config(path).bytes_per_token() == 147_456


@pytest.mark.parametrize(
    ("extra", "local", "window"),
    [
        ({"sliding_window": 4096}, 36, 4096),
        ({"sliding_window": 4096, "use_sliding_window": False}, 0, 0),
        ({"sliding_window": 1024, "sliding_window_pattern": 6}, 30, 1024),
        ({"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 18}, 18, 128),
        ({"sliding_window": 128, "layer_types": ["full_attention"] * 36}, 0, 0),
    ],
)
def test_config_with_windows(tmp_path, extra, local, window):
    shape = read_config(write(tmp_path, **{**QWEN3_8B, **extra}))
    assert (shape.local_layers, shape.window_tokens) == (local, window)
    assert shape.bytes_per_token() == 147_456


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"layer_types": ["linear_attention", "full_attention"] * 18}, "linear_attention"),
        ({"hybrid_override_pattern": "M-M*"}, "hybrid_override_pattern"),
        ({"index_head_dim": 128}, "index_head_dim"),
        ({"model_type": "nemotron_h"}, "nemotron_h"),
        ({"num_hidden_layers": None}, "num_hidden_layers: missing"),
        ({"num_hidden_layers": -3}, "num_hidden_layers: -3"),
        ({"num_key_value_heads": "8"}, "num_key_value_heads: '8'"),
        ({"head_dim": True}, "head_dim: True"),
    ],
)
def test_configs_that_cannot_be_counted(tmp_path, extra, word):
    with pytest.raises(UsageError, match=word):
        read_config(write(tmp_path, **{**QWEN3_8B, **extra}))


def test_files_that_are_no_config(tmp_path):
    path = tmp_path / "config.json"
    for text, word in (("{", "not JSON"), ("[1]", "holds no object"), ("{}", "num_hidden_layers: missing")):
        path.write_text(text)
        with pytest.raises(UsageError, match=word):
            model(str(path))
    with pytest.raises(UsageError, match="no such file"):
        model(str(tmp_path / "nothing.json"))


def test_chunks_own_whole_pages():
    size = KvSize(stored_bytes_per_token=147_456, moved_bytes_per_token=147_456)
    assert size.chunk_bytes(512) == 72 << 20
    assert size.capacity_chunks(1, 512) == 14
    small = KvSize(stored_bytes_per_token=1000, moved_bytes_per_token=1000)
    assert small.chunk_bytes(64) == 2 << 20
    assert small.capacity_chunks(1, 64) == 512
    assert small.chunk_bytes(2098) == 4 << 20


def test_packed_chunks_are_a_fifth_smaller_and_only_bf16_is_packed():
    plain, packed = (kv_size("qwen3-8b", packing=packing) for packing in ("none", "lossless"))
    assert (plain.chunk_bytes(256), packed.chunk_bytes(256)) == (36 << 20, 30 << 20)  # 28.3 MiB in pages of 2 MiB
    assert packed.stored_bytes_per_token == plain.stored_bytes_per_token
    assert packed.capacity_chunks(20, 512) == 353 > plain.capacity_chunks(20, 512) == 284
    with pytest.raises(UsageError, match="not bf16"):
        kv_size("qwen3-8b", kv_dtype="fp8", packing="lossless")
