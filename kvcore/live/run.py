"""A server as a process: signals, logging, and one line where it cannot start."""

import logging
import resource
import signal
import sys
from types import FrameType

from kvcore.live.server import Server, StartError
from kvcore.live.settings import Settings


def serve(settings: Settings) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP; return the exit code: 0, or 2 where the server cannot start."""
    logging.basicConfig(
        level=settings.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    log = logging.getLogger("kvcore.server")
    server = Server(settings)

    def stop(_signal: int, _frame: FrameType | None) -> None:
        server.stop()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the last: its terminal is gone
        signal.signal(number, stop)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # libzmq ends a process that has none left
    try:
        server.open()
    except StartError as error:
        sys.stderr.write(f"kvcore: {' '.join(str(error).split())}\n")
        return 2
    arena = server.service.parts.arena
    log.info(
        "serving on %s, HTTP %s; L1 %d pages of %d bytes in %s%s",
        ", ".join(settings.endpoints),
        settings.http,
        arena.pages,
        arena.page_bytes,
        arena.path,
        ", taken over" if arena.taken_over else "",
    )
    try:
        server.run()
    finally:
        server.close()
    log.info("stopped")
    return 0
