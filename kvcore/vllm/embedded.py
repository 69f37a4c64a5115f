"""The server inside an engine's own process."""

import atexit
import logging
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvcore.live.arena import Arena, ArenaError, ArenaPaths
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
    for arena in folder.glob(f"kvcore-{_PREFIX}*.arena"):
        name = arena.stem.removeprefix("kvcore-")
        try:
            Arena.takeover(ArenaPaths(folder, name)).close()
        except ArenaError:  # its server runs, or it is another user's
            continue
        for suffix in (".sock", ".ipc", ".ipc.lock"):
            (folder / f"kvcore-{name}{suffix}").unlink(missing_ok=True)
        _LOG.info("removed %s, which a killed engine had left", arena)


class EmbeddedServer:
    """A `kvcore.live.server.Server` in a thread, which ends with its process at the latest.

    Raises kvcore.live.server.StartError, as when L1 does not fit; nothing is left behind.
    """

    def __init__(self, instance: str, given: Mapping[str, Any]) -> None:
        settings = embedded_settings(instance, given)
        remove_leftovers(Path(settings.arena_dir))
        self._server = Server(settings)
        self._server.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Stop, and remove the arena. Called again it does nothing."""
        atexit.unregister(self.stop)
        self._server.stop()
        self._server.join(5.0)
