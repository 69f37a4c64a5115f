"""The words that every part of the core shares."""

from typing import TypeAlias

Chunk: TypeAlias = bytes | int
"""The name of a chunk: a SHA-256 digest in a live server, its first 63 bits in a log."""
