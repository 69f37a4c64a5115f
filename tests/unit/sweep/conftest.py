import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # plain_belady is shared by the modules of this folder
