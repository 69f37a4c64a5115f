"""Counts in plain words."""


def counted(count: int, noun: str) -> str:
    """Return "1 row" or "2,000 rows" for a noun that takes an s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
