"""Seeded models and a tokenizer, built in seconds and never downloaded."""
# ruff: noqa: PLC0415 - torch and transformers take seconds to import

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCAB = 4096
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEXT = (
    "the cache holds keys and values of every token that a prompt shares with another so that prefill "
    "need not compute them again when a server loads blocks from memory into the pages of the engine"
)


def build_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer of at most `VOCAB` tokens, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def build_model(
    folder: Path, *, layers: int = 4, hidden: int = 256, heads: int = 4, kv_heads: int = 2, seed: int = 0
) -> Path:
    """Write a Qwen3 with seeded random weights, its config and a tokenizer; return the folder.

    The default has 14 MB; `layers=8, hidden=1024, heads=16, kv_heads=8` has 105 M parameters, enough for TTFT to show.
    A model that is there already is left as it is.
    """
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        initializer_range=0.08,
        eos_token_id=0,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).to(torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(folder)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(saved, indent=1))
    return folder


def build_mixed_model(folder: Path) -> Path:
    """Write a Gemma 3 of six layers, five of which attend to 128 tokens only."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=128,
        max_position_embeddings=8192,
        initializer_range=0.08,
    )
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(folder)
    Gemma3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def build_sliding_model(folder: Path) -> Path:
    """Write a Mistral of two layers that attend to 256 tokens only."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=256,
        max_position_embeddings=8192,
    )
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(folder)
    MistralForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder
