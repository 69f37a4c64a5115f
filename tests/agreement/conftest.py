import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "live"))  # live_fakes: real servers
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def shm():
    """A folder in shared memory, of a short name."""
    path = Path(tempfile.mkdtemp(prefix="kva-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)
