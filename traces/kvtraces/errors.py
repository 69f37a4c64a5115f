"""What can be wrong with a log, in one line."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_COUNT = ", or count it with --skip-bad"
MEND = f"mend or remove the row{_COUNT}"
KEPT_MESSAGES = 5


class LogError(ValueError):
    """A log that cannot be read as it is: where, and what to do about it, in one line."""

    def __init__(self, path: Path | str, line: int | None, field: str | None, message: str) -> None:
        self.path = Path(path)
        self.line = line
        self.field = field
        self.message = message
        place = str(path) if line is None else f"{path}:{line}"
        super().__init__(": ".join(part for part in (place, field, message) if part))

    def __reduce__(self) -> tuple[Callable[..., "LogError"], tuple[Path, int | None, str | None, str]]:
        """Make the error survive a process boundary: its arguments are not those of ValueError."""
        return (LogError, (self.path, self.line, self.field, self.message))


@dataclass(slots=True)
class BadRows:
    """Where readers report a bad row: it is raised, or counted with the first few messages kept."""

    skip: bool
    count: int = 0
    messages: list[str] = field(default_factory=list)

    def report(self, error: LogError) -> None:
        """Raise `error` from where it happened, or count it. Raises LogError unless bad rows are skipped."""
        if not self.skip:
            raise error
        self.count += 1
        if len(self.messages) < KEPT_MESSAGES:
            self.messages.append(str(error).removesuffix(_COUNT))
