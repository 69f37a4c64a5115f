import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # live_fakes is shared by the modules of this folder
from live_fakes import ServerProcess


@pytest.fixture
def folder():
    """A folder in shared memory, of a short name: unix sockets' paths are limited."""
    path = Path(tempfile.mkdtemp(prefix="kvt-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start(folder):
    """Start `kvcore serve` with more flags; it is stopped in the end."""
    servers = []

    def starter(*flags, **sizes):
        server = ServerProcess(folder, *flags, **sizes)
        servers.append(server)
        return server

    yield starter
    for server in servers:
        server.stop()
