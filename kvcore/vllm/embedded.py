"""The server inside an engine's own process."""

import atexit
import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvcore.live.arena import ArenaPaths
from kvcore.live.server import Server
from kvcore.live.settings import Settings, load

_PREFIX = "in-"
_LOG = logging.getLogger("kvcore.vllm")


def embedded_settings(instance: str, given: Mapping[str, Any]) -> Settings:
    """Return the settings of an engine's own server: those given, then the environment's.

    It listens for its engine alone, its arena bears the engine's name, and it has no HTTP unless that is asked for.
    Raises kvcore.live.settings.SettingsError.
    """
    short = sha256(instance.encode()).hexdigest()[:12]  # a unix socket's path has no room for an engine's id
    mine = {"http": "off", **given, "name": _PREFIX + short}
    endpoint = f"ipc://{load(mine).arena_dir.rstrip('/')}/kvcore-{_PREFIX}{short}.ipc"
    return load({**mine, "bind": (endpoint,)})


def remove_leftovers(folder: Path) -> None:
    """Remove what embedded servers left that were killed: nobody else would, for an engine's id is never used again."""
    for lock in folder.glob(f"kvcore-{_PREFIX}*.lock"):
        name = lock.stem.removeprefix("kvcore-")
        if name.endswith(".ipc"):
            continue
        with _taken(lock) as free:  # until its files are gone, lest they be a new server's
            if free:
                for suffix in (".arena", ".held", ".sock", ".ipc", ".ipc.lock", ".lock"):
                    (folder / f"kvcore-{name}{suffix}").unlink(missing_ok=True)
                _LOG.info("removed what a killed engine had left: %s", lock.with_suffix(".*"))


@contextmanager
def _taken(lock: Path) -> Iterator[bool]:
    """Hold a lock, and say whether it is held: it is not where its server lives, or it is another user's."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # another user's, or gone meanwhile
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


class EmbeddedServer:
    """A `kvcore.live.server.Server` in a thread, which ends with its process at the latest.

    Raises kvcore.live.server.StartError, as when L1 does not fit; nothing is left behind.
    """

    def __init__(self, instance: str, given: Mapping[str, Any]) -> None:
        settings = embedded_settings(instance, given)
        remove_leftovers(Path(settings.arena_dir))
        self._paths = ArenaPaths(Path(settings.arena_dir), settings.name)
        self._server = Server(settings)
        self._server.start()
        atexit.register(self.stop)

    def hide(self) -> None:
        """Remove the arena's name, now that every worker has it mapped, and its table's, which the scheduler has.

        vLLM kills its processes when it stops, and a file in shared memory would outlive them with all it holds; one
        without a name does not.
        """
        self._paths.arena.unlink(missing_ok=True)
        self._paths.held.unlink(missing_ok=True)

    def stop(self) -> None:
        """Stop, and remove the arena. Called again it does nothing."""
        atexit.unregister(self.stop)
        self._server.stop()
        self._server.join(5.0)
