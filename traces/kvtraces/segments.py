"""Prompts as sequences of segments, from which both token ids and block hashes follow.

A segment stands for some text: a system prompt, a document, a user's turn, an output. Its tokens follow from its id
alone, so prompts that share leading segments share leading tokens, hence leading block hashes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvcore.policy.hashing import block_hashes, trace_ids
from kvtraces.log import IntArray, Log, offsets

Tokens = NDArray[np.uint32]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


class Segment(NamedTuple):
    """Some text: `id` says which, from 0 to 2**63 - 1; `length` is in tokens."""

    id: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of a generated workload."""

    time_ms: float
    session: str
    prompt: tuple[Segment, ...]
    output: Segment

    @property
    def input_tokens(self) -> int:
        """The prompt's length."""
        return sum(segment.length for segment in self.prompt)


def segment_tokens(segment: Segment, vocabulary: int) -> Tokens:
    """Return a segment's token ids, [segment.length], each below `vocabulary`.

    They are SplitMix64's outputs (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014)
    with the segment's id as its state, so they are the same under every version of numpy.
    """
    counts = np.arange(1, segment.length + 1, dtype=np.uint64)
    mixed = np.uint64(segment.id) + counts * _GAMMA
    for shift, factor in _MIX:
        mixed = (mixed ^ (mixed >> shift)) * factor
    mixed ^= mixed >> np.uint64(31)
    return (mixed % np.uint64(vocabulary)).astype(np.uint32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """Generated requests in order of arrival, with their content: for tests and live replays, which need tokens."""

    requests: tuple[Request, ...]
    block_tokens: int
    vocabulary: int
    """Token ids are below it."""
    root: bytes
    """Parent of every prompt's block 0: a namespace's digest."""

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.requests)

    def tokens_of(self, i: int) -> Tokens:
        """Return the token ids of request i's prompt."""
        return np.concatenate([segment_tokens(segment, self.vocabulary) for segment in self.requests[i].prompt])

    def output_tokens_of(self, i: int) -> Tokens:
        """Return the token ids of request i's output, which a conversation's next prompt repeats."""
        return segment_tokens(self.requests[i].output, self.vocabulary)

    def hashes_of(self, i: int) -> list[bytes]:
        """Return the hashes of the full blocks of request i's prompt."""
        return block_hashes(self.tokens_of(i), self.block_tokens, self.root)

    def log(self, *, output_hashes: bool = False) -> Log:
        """Return the log that a server would record of these requests, with the outputs' blocks if asked for."""
        tree = _Tree(self.block_tokens, self.vocabulary, self.root)
        prompts, outputs = [], []
        for request in self.requests:
            node = tree.follow(request.prompt)
            prompts.append(node.path())
            if output_hashes:
                outputs.append(tree.child(node, request.output).ids)
        return Log(
            block_tokens=self.block_tokens,
            timestamp_ms=np.array([request.time_ms for request in self.requests], np.float64),
            input_tokens=np.array([request.input_tokens for request in self.requests], np.int64),
            output_tokens=np.array([request.output.length for request in self.requests], np.int64),
            starts=_starts(prompts),
            blocks=_joined(prompts),
            output_starts=_starts(outputs) if output_hashes else None,
            output_blocks=_joined(outputs) if output_hashes else None,
            extra={"session_id": np.array([request.session for request in self.requests], np.dtypes.StringDType())},
        )


@dataclass(slots=True, eq=False)
class _Node:
    """A prompt after some segments: the blocks that its last segment filled, and the tokens left over."""

    parent: "_Node | None"
    ids: IntArray
    last: bytes
    """Hash of the last full block."""
    tail: Tokens
    children: dict[Segment, "_Node"] = field(default_factory=dict)

    def path(self) -> IntArray:
        """Return the ids of all full blocks up to here."""
        parts = []
        node: _Node | None = self
        while node is not None:
            parts.append(node.ids)
            node = node.parent
        return np.concatenate(parts[::-1])


class _Tree:
    """Prompts that share leading segments hash them once."""

    def __init__(self, block_tokens: int, vocabulary: int, root: bytes) -> None:
        self.block_tokens = block_tokens
        self.vocabulary = vocabulary
        self.root = _Node(None, np.zeros(0, np.int64), root, np.zeros(0, np.uint32))

    def follow(self, segments: Sequence[Segment]) -> _Node:
        node = self.root
        for segment in segments:
            node = self.child(node, segment)
        return node

    def child(self, node: _Node, segment: Segment) -> _Node:
        found = node.children.get(segment)
        if found is None:
            tokens = np.concatenate([node.tail, segment_tokens(segment, self.vocabulary)])
            hashes = block_hashes(tokens, self.block_tokens, node.last)
            tail = tokens[len(hashes) * self.block_tokens :].copy()
            found = _Node(node, trace_ids(hashes), hashes[-1] if hashes else node.last, tail)
            node.children[segment] = found
        return found


def _starts(parts: Sequence[IntArray]) -> IntArray:
    return offsets(np.array([len(part) for part in parts], np.int64))


def _joined(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate([np.zeros(0, np.int64), *parts])
