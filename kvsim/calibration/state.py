"""What a calibration has measured so far, on disk: an interrupted one goes on where it stopped."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from kvsim.calibration.endpoint import EndpointError
from kvsim.errors import UsageError

Point = tuple[str, int, int]
"""`prefill`, new and cached tokens; or `decode`, batch and context."""


class CalibrationError(UsageError):
    """A calibration that cannot go on; one line."""


class State:
    """Measurements by point, appended to a JSONL file as they come.

    Args:
        path: The file; None keeps them in memory only.
        about: What is measured; a file about something else is refused.

    Raises:
        CalibrationError: The file is no calibration's, or another one's.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.seconds: dict[Point, list[float]] = {}
        self.rounds: Counter[Point] = Counter()
        """How often each point has been measured, a few times each time."""
        self.failed: dict[Point, str] = {}
        self.resumed = 0
        """How often it was gone on with; what was cut off may have left its prompt in the engine's cache."""
        self._path = path
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            self._read(path, about)
            self.resumed += 1
            self._append({"resumed": self.resumed})
        else:
            path.write_text(json.dumps({"calibration": about}) + "\n", encoding="utf-8")

    def add(self, point: Point, seconds: list[float]) -> None:
        """Keep what was measured at a point in one round, beside what was before."""
        self._keep(point, seconds)
        self._append({"point": point, "seconds": seconds})

    def _keep(self, point: Point, seconds: list[float]) -> None:
        self.seconds.setdefault(point, []).extend(seconds)
        self.rounds[point] += 1

    def fail(self, point: Point, error: EndpointError) -> None:
        """Keep that a point cannot be measured; it is tried again by the next run."""
        self.failed[point] = str(error)

    def _append(self, row: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _read(self, path: Path, about: dict[str, Any]) -> None:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        try:
            head = json.loads(lines[0])["calibration"]
        except (ValueError, LookupError, TypeError):
            raise CalibrationError(f"{path}: not a calibration's state; name another file or remove it") from None
        if head != about:
            different = ", ".join(key for key in about if head.get(key) != about[key])
            raise CalibrationError(f"{path}: belongs to another calibration ({different} differ)")
        if not lines[-1].endswith("\n"):  # it was cut off while writing this line
            path.write_text("".join(lines[:-1]), encoding="utf-8")
            lines = lines[:-1]
        for number, line in enumerate(lines[1:], 2):
            try:
                row = json.loads(line)
                if "resumed" in row:
                    self.resumed = int(row["resumed"])
                    continue
                kind, a, b = row["point"]
                self._keep((kind, int(a), int(b)), [float(value) for value in row["seconds"]])
            except (ValueError, LookupError, TypeError):
                raise CalibrationError(f"{path}, line {number}: not a measurement") from None
