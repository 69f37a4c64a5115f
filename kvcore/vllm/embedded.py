"""The server inside an engine's own process."""

from collections.abc import Mapping
from typing import Any

from kvcore.live.settings import Settings, load


def embedded_settings(instance: str, given: Mapping[str, Any]) -> Settings:
    """Return an embedded server's settings: those given, then the environment's; listening for its engine only."""
    base = load({"http": "off", "name": f"in-{instance}", **given})
    endpoint = f"ipc://{base.arena_dir.rstrip('/')}/kvcore-in-{instance}.ipc"
    return load({"http": "off", "name": f"in-{instance}", **given, "bind": (endpoint,)})


class EmbeddedServer:
    def __init__(self, instance: str, given: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def stop(self) -> None: ...
