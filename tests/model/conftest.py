import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # naive and machine are shared by the modules of this folder
