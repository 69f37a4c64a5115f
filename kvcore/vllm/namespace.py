"""Names of a request's blocks, rooted in everything of the engine and the request that changes KV."""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvcore.policy.hashing import MultimodalItem, Namespace, block_hashes, token_bytes
from kvcore.vllm.requests import EngineRequest


class Hasher:
    """Names the full blocks of requests' prompts.

    Args:
        namespace: The engine's, without adapter and salt, which are the request's.
    """

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self._roots: dict[tuple[str | None, str | None], bytes] = {}

    def __call__(self, request: EngineRequest) -> list[bytes] | None:
        """Return the hash of every full block of the prompt; None where tokens alone do not say what is computed."""
        tokens = request.prompt_token_ids
        if tokens is None or getattr(request, "prompt_embeds", None) is not None:
            return None
        items = multimodal_items(getattr(request, "mm_features", None) or ())
        if items is None:
            return None
        root = self._root(adapter_identity(getattr(request, "lora_request", None)), request.cache_salt or None)
        return block_hashes(tokens, self.namespace.block_tokens, root, items)

    def marked(self, mark: str) -> "Hasher":
        """Return one that names everything differently."""
        return Hasher(replace(self.namespace, revision=f"{self.namespace.revision}#{mark}"))

    @staticmethod
    def probe(request: EngineRequest, chunk_tokens: int) -> bytes:
        """Return a digest of the first chunk's tokens, equal under every namespace; empty without a full chunk."""
        tokens: Sequence[int] = request.prompt_token_ids
        return b"" if len(tokens) < chunk_tokens else sha256(token_bytes(tokens[:chunk_tokens])).digest()[:16]

    def _root(self, lora: str | None, salt: str | None) -> bytes:
        root = self._roots.get((lora, salt))
        if root is None:
            root = replace(self.namespace, lora=lora, salt=salt).digest()
            if len(self._roots) > 10_000:
                self._roots.clear()  # salts can be as many as users
            self._roots[lora, salt] = root
        return root


def multimodal_items(features: Sequence[Any]) -> list[MultimodalItem] | None:
    """Return where a prompt's images, clips and videos lie; None where one has no identity."""
    items = []
    for feature in features:
        identifier = getattr(feature, "identifier", None) or getattr(feature, "mm_hash", None)
        if not identifier:
            return None
        position = feature.mm_position
        items.append(MultimodalItem(identifier=str(identifier), offset=position.offset, length=position.length))
    return items


def adapter_identity(lora: Any) -> str | None:
    """Return what tells a LoRA adapter from others: its name, its path, and its files' sizes and times of change.

    Two adapters may bear one name in turn; one that is copied elsewhere is taken for another, which costs hits and no
    correctness.
    """
    if lora is None:
        return None
    path = str(getattr(lora, "lora_path", "") or "")
    folder = Path(path)
    files = sorted(folder.iterdir()) if path and folder.is_dir() else []
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return "|".join([lora.lora_name, path, *(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)])
