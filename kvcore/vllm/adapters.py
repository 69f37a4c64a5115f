"""What tells LoRA adapters apart: their names, and their files as they were when the engine took them up."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("kvcore.vllm")
_LOOK_AGAIN_S = 0.1
"""Files are not looked at more often: an engine takes longer to load an adapter."""


@dataclass(slots=True)
class _Seen:
    files: str | None
    looked_s: float
    identity: str | None


class Adapters:
    """Names adapters for one engine.

    An engine loads an adapter once, and goes on with what it loaded when the files are overwritten, until it loads it
    anew, having dropped it for others. So one whose files are no longer those that were seen first is not named any
    more, unless a request has it loaded in place (vLLM's `load_inplace`). Files that are overwritten between the load
    and the first request are not noticed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[tuple[int, str, str], _Seen] = {}

    def identity(self, lora: Any) -> str | None:
        """Return an adapter's name, path, and its files' names, sizes and times of change; None where it has none.

        One that is copied elsewhere is taken for another, which costs hits and no correctness.

        Args:
            lora: vLLM's `LoRARequest`.
        """
        key, now = (lora.lora_int_id, lora.lora_name, str(lora.lora_path)), self._clock()
        seen, anew = self._seen.get(key), bool(getattr(lora, "load_inplace", False))
        if seen is not None and not anew and now - seen.looked_s < _LOOK_AGAIN_S:
            return seen.identity
        files = _files(key[2])
        if seen is None or anew or seen.files is None:
            if files is None and seen is None:
                _LOG.warning("adapter %s is not cached: %s is no folder here, nor in the hub's cache", *key[1:])
            found = None if files is None else "|".join([key[1], key[2], files])
            self._seen[key] = _Seen(files, now, found)
            return found
        seen.looked_s = now
        if seen.identity is not None and files != seen.files:
            _LOG.warning("adapter %s is not cached any more: its files were changed without load_inplace", key[1])
            seen.identity = None
        return seen.identity


def _files(path: str) -> str | None:
    """Return names, sizes and times of change of an adapter's files; None where they are not on this host."""
    folder = _folder(path)
    if folder is None:
        return None
    try:
        stats = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    except OSError:  # it is just being replaced
        return None
    return "|".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)


def _folder(path: str) -> Path | None:
    """Return where an adapter lies, as vLLM finds it: a folder, or a repository of the hub that is here already."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_absolute() or not path:
        return None
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - vLLM brings it; only such adapters need it

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (OSError, ValueError):  # not there yet, or no name of a repository
        return None
