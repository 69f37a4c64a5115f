"""The server inside an engine's own process."""

import atexit
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from kvcore.live.server import Server
from kvcore.live.settings import Settings, load


def embedded_settings(instance: str, given: Mapping[str, Any]) -> Settings:
    """Return the settings of an engine's own server: those given, then the environment's.

    It listens for its engine alone, its arena bears the engine's name, and it has no HTTP unless that is asked for.
    Raises kvcore.live.settings.SettingsError.
    """
    short = sha256(instance.encode()).hexdigest()[:12]  # a unix socket's path has no room for an engine's id
    mine = {"http": "off", "name": f"in-{short}", **given}
    endpoint = f"ipc://{load(mine).arena_dir.rstrip('/')}/kvcore-in-{short}.ipc"
    return load({**mine, "bind": (endpoint,)})


class EmbeddedServer:
    """A `kvcore.live.server.Server` in a thread, which ends with its process at the latest.

    Raises kvcore.live.server.StartError, as when L1 does not fit; nothing is left behind.
    """

    def __init__(self, instance: str, given: Mapping[str, Any]) -> None:
        self._server = Server(embedded_settings(instance, given))
        self._server.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Stop, and remove the arena. Called again it does nothing."""
        atexit.unregister(self.stop)
        self._server.stop()
        self._server.join(5.0)
