"""Pack what the H100 machine lacks beside vLLM, LMCache included, in one archive of wheels unpacked.

    python benchmarks/pack_h100.py OUT_DIR           # writes OUT_DIR/peers-h100.tar.xz, in about a minute

It is unpacked there into one folder on PYTHONPATH, behind vLLM's. The packages are for CPython 3.12 on x86-64 Linux and
are taken without their dependencies: what LMCache's server and its connector import was listed by starting both
(`lmcache server`, `lmcache.integration.vllm.lmcache_mp_connector`), and everything else of it is in vLLM's archive or
on that machine. LMCache's Redis and file-system libraries and its frontend are left out; of its CUDA library
only the sm_90 code is kept.
"""

import argparse
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEELS = (
    "lmcache==0.5.2",
    # LMCache imports OpenTelemetry at once, and its server writes /metrics through the Prometheus exporter. Its own
    # bounds are api <= 1.40.0 and exporter <= 0.61b0.
    "opentelemetry-api==1.40.0",
    "opentelemetry-sdk==1.40.0",
    "opentelemetry-semantic-conventions==0.61b0",
    "opentelemetry-exporter-prometheus==0.61b0",
    "importlib-metadata==8.7.1",
    "zstandard==0.25.0",  # kvcore's own
)
LEFT_OUT = (
    "lmcache/lmcache_fs.cpython-312-x86_64-linux-gnu.so",
    "lmcache/lmcache_redis.cpython-312-x86_64-linux-gnu.so",
    "lmcache/lmcache_frontend",
)
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]
FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)
KIND_PTX, KIND_CUBIN, SM = 1, 2, 90


def download(wheels, into):
    """Fetch wheels for the machine's Python, without their dependencies."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", *platforms, "-d", str(into), *wheels]
    subprocess.run(command, check=True)


def keep_one_architecture(library):
    """Zero the device code of every architecture but sm_90 in a library's fat binaries; zeros compress to nothing.

    Returns the bytes that were zeroed.
    """
    data = bytearray(library.read_bytes())
    at = zeroed = 0
    while (at := data.find(FATBIN_MAGIC, at)) >= 0:
        header, size = struct.unpack_from("<HQ", data, at + 6)
        end = at + header + size
        if header != 16 or end > len(data):  # the magic number by chance
            at += 4
            continue
        entry = at + header
        while entry < end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, entry)
            (architecture,) = struct.unpack_from("<I", data, entry + 28)
            if kind not in (KIND_PTX, KIND_CUBIN) or not 32 <= entry_header <= 512:
                break
            if (kind, architecture) != (KIND_CUBIN, SM):
                start = entry + entry_header
                data[start : start + payload] = bytes(payload)
                zeroed += payload
            entry += entry_header + payload
        at = end
    library.write_bytes(data)
    return zeroed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder that git ignores")
    parser.add_argument("--limit-mib", type=float, default=20.0, help="fail when the archive is larger")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    archive = given.out / "peers-h100.tar.xz"
    with tempfile.TemporaryDirectory() as scratch:
        wheels, site = Path(scratch) / "wheels", Path(scratch) / "site"
        print("downloading", *WHEELS, flush=True)
        download(WHEELS, wheels)
        for wheel in sorted(wheels.glob("*.whl")):
            zipfile.ZipFile(wheel).extractall(site)
        for name in LEFT_OUT:
            path = site / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for library in (site / "lmcache").glob("*.so"):
            print(
                f"{library.name}: {keep_one_architecture(library) / 2**20:.1f} MiB of device code left out", flush=True
            )
        command = ["tar", "-C", str(site), "--use-compress-program=xz -T2 -6", "-cf", str(archive), "."]
        subprocess.run(command, check=True)
    size = archive.stat().st_size / 2**20
    print(f"{archive}: {size:.1f} MiB")
    if size > given.limit_mib:
        sys.exit(f"larger than {given.limit_mib:g} MiB")


if __name__ == "__main__":
    main()
