"""What the connectors count, in the form that vLLM carries from workers and scheduler to its own /metrics."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """Counts since they were last taken. Tokens are counted when they have been copied, never when it is planned."""

    lookups: int = 0
    lookup_seconds: float = 0.0
    matched_tokens: int = 0
    stored_tokens: int = 0
    stored_bytes: int = 0
    store_seconds: float = 0.0
    loaded_tokens: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    failed_tokens: int = 0
    """Tokens whose load failed, so that they are computed."""
    aborted_tokens: int = 0
    """Tokens that were given room and not stored."""
    refused: dict[str, int] = field(default_factory=dict)
    """Chunks that were not given room, by reason."""

    def take(self) -> dict[str, int | float]:
        """Return what was counted, without zeros, and start anew."""
        data: dict[str, int | float] = {f"refused_chunks_{reason}": count for reason, count in self.refused.items()}
        for name in NUMBERS:
            value = getattr(self, name)
            if value:
                data[name] = value
                setattr(self, name, type(value)(0))
        self.refused = {}
        return data


NUMBERS = (
    "lookups",
    "lookup_seconds",
    "matched_tokens",
    "stored_tokens",
    "stored_bytes",
    "store_seconds",
    "loaded_tokens",
    "loaded_bytes",
    "load_seconds",
    "failed_tokens",
    "aborted_tokens",
)


def add(one: dict[str, int | float], other: dict[str, int | float]) -> dict[str, int | float]:
    """Return the sum of two counts."""
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}
