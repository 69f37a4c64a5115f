"""Names of a request's blocks, rooted in everything of the engine and the request that changes KV."""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

from kvcore.policy.hashing import MultimodalItem, Namespace, block_hashes, token_bytes
from kvcore.vllm.adapters import Adapters
from kvcore.vllm.requests import EngineRequest

_MOST_ROOTS = 10_000  # salts can be as many as users
_RUN = 16  # blocks that are remembered together: a dictionary of single ones takes longer than it saves
_LONG = 64  # blocks: shorter prompts are named in less time than a question to the server takes
_MOST_RUNS = 1 << 14  # about 20 MB: the blocks of 4 M tokens at 16 a block


class Hasher:
    """Names the full blocks of requests' prompts.

    Args:
        namespace: The engine's, without adapter and salt, which are the request's.
        engine_hashes: Whether the engine's own block hashes (`block_hashes` of a request) are cryptographic ones. Equal
            ones then mean equal blocks behind equal prompts, and what was computed for one is not computed again: a
            long prompt that comes back is named in a tenth of the time.
        media: Whether the engine names images and the like by their content; prompts with some are not named otherwise.
        adapters: Names LoRA adapters.
    """

    def __init__(
        self,
        namespace: Namespace,
        *,
        engine_hashes: bool = False,
        media: bool = True,
        adapters: Adapters | None = None,
    ) -> None:
        self.namespace = namespace
        self._engine_hashes = engine_hashes
        self._media = media
        self._adapters = adapters or Adapters()
        self._roots: dict[tuple[str | None, str | None], bytes] = {}
        self._known: dict[tuple[bytes, bytes], list[bytes]] = {}
        """Hashes of runs of blocks, by root and the engine's hash of the run's last block."""

    def __call__(self, request: EngineRequest) -> list[bytes] | None:
        """Return the hash of every full block of the prompt; None where tokens alone do not say what is computed."""
        items, root, tokens = self._items(request), self._root_of(request), request.prompt_token_ids
        if items is None or root is None:
            return None
        theirs, block = self._theirs(request), self.namespace.block_tokens
        known = self._remembered(root, theirs)
        start = len(known) * block
        if len(tokens) - start < block:
            return known
        new = block_hashes(tokens[start:], block, known[-1] if known else root, items, start=start)
        self._remember(root, theirs[len(known) :], new)
        known += new
        return known

    def new_head(self, request: EngineRequest, blocks: int) -> bytes | None:
        """Return the hash of block `blocks - 1` of a long prompt whose first blocks were not named before; else None.

        It takes microseconds a block, as all names do, and the other blocks of such a prompt can wait for theirs.
        """
        theirs = self._theirs(request)
        if len(theirs) < max(blocks, _LONG):
            return None
        items, root = self._items(request), self._root_of(request)
        if items is None or root is None or (root, theirs[_RUN - 1]) in self._known:
            return None
        block = self.namespace.block_tokens
        return block_hashes(request.prompt_token_ids[: blocks * block], block, root, items)[-1]

    def marked(self, mark: str) -> "Hasher":
        """Return one that names everything differently."""
        namespace = replace(self.namespace, revision=f"{self.namespace.revision}#{mark}")
        return Hasher(namespace, engine_hashes=self._engine_hashes, media=self._media, adapters=self._adapters)

    @staticmethod
    def probe(request: EngineRequest, chunk_tokens: int) -> bytes:
        """Return a digest of the first chunk's tokens, equal under every namespace; empty without a full chunk."""
        tokens: Sequence[int] = request.prompt_token_ids
        return b"" if len(tokens) < chunk_tokens else sha256(token_bytes(tokens[:chunk_tokens])).digest()[:16]

    def _items(self, request: EngineRequest) -> list[MultimodalItem] | None:
        """Return where the prompt's images and the like lie; None where tokens and these do not say what it is."""
        if request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None:
            return None
        features = getattr(request, "mm_features", None) or ()
        return multimodal_items(features) if self._media or not features else None

    def _root_of(self, request: EngineRequest) -> bytes | None:
        """Return what the prompt's names begin with; None for an adapter that has no identity."""
        adapter, lora, salt = getattr(request, "lora_request", None), None, request.cache_salt or None
        if adapter is not None and (lora := self._adapters.identity(adapter)) is None:
            return None
        root = self._roots.get((lora, salt))
        if root is None:
            root = replace(self.namespace, lora=lora, salt=salt).digest()
            if len(self._roots) > _MOST_ROOTS:
                self._roots.clear()
            self._roots[lora, salt] = root
        return root

    def _theirs(self, request: EngineRequest) -> Sequence[bytes]:
        """Return the engine's hashes of the prompt's full blocks; none where they are not of the prompt's blocks."""
        theirs: Sequence[bytes] = getattr(request, "block_hashes", None) or () if self._engine_hashes else ()
        block = self.namespace.block_tokens
        if len(theirs) != request.num_tokens // block:
            return ()  # hashed in other units, or not at all
        return theirs[: len(request.prompt_token_ids or ()) // block]

    def _remembered(self, root: bytes, theirs: Sequence[bytes]) -> list[bytes]:
        found: list[bytes] = []
        for last in theirs[_RUN - 1 :: _RUN]:
            run = self._known.get((root, last))
            if run is None:
                break
            found += run
        return found

    def _remember(self, root: bytes, theirs: Sequence[bytes], ours: list[bytes]) -> None:
        if len(self._known) > _MOST_RUNS:
            self._known.clear()
        for stop in range(_RUN, len(theirs) + 1, _RUN):
            self._known[root, theirs[stop - 1]] = ours[stop - _RUN : stop]


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
