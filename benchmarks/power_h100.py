"""How much slower a GPU computes for having computed without rest: multiplied matrices, in bursts with pauses.

    python benchmarks/power_h100.py --out benchmarks/results/power-h100.json

Bursts of about 0.08 and 0.26 s (8 and 25 times ten 8192 x 4096 x 12288 products in bf16) fill shares of the time from a
fifth to all of it; the time of ten products is told for each share, of bursts in the second half of three seconds. Then
the same with memory read in the pauses, as steps of decodes do; how a GPU that has rested slows down, product by
product; and what a pause of 0.01 to 2 s gives back. The simulator's `kvsim.engine.heat` is read off this. 70 s; nothing
else may use the GPU.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

from vllm_gpu import facts, say, write

BURSTS = (8, 25)
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
PAUSES_S = (0.01, 0.03, 0.1, 0.3, 1.0, 2.0)


class Products:
    """Ten products at a time, timed on the device, and reading in between."""

    def __init__(self):
        import torch  # noqa: PLC0415 - takes seconds, and --help needs none

        self._torch = torch
        self._a, self._b = (
            torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((8192, 4096), (4096, 12288))
        )
        self._out = torch.empty(8192, 12288, device="cuda", dtype=torch.bfloat16)
        self._weights = torch.randn(65_536, 8192, device="cuda", dtype=torch.bfloat16)  # 1 GiB
        self._vector = torch.randn(8192, device="cuda", dtype=torch.bfloat16)

    def burst(self, tens):
        """Seconds of each ten products, `tens` times without rest."""
        marks = [self._torch.cuda.Event(enable_timing=True) for _ in range(tens + 1)]
        marks[0].record()
        for mark in marks[1:]:
            for _ in range(10):
                self._torch.mm(self._a, self._b, out=self._out)
            mark.record()
        self._torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]

    def read(self, seconds):
        """Multiply a matrix of 1 GiB by a vector, again and again: what a step of few decodes is, mostly."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            for _ in range(5):
                self._torch.mv(self._weights, self._vector)
            self._torch.cuda.synchronize()


def at_share(products, tens, share, pause=time.sleep):
    """Seconds of ten products in bursts that fill a share of the time, and something else the rest of it."""
    rows, begun = [], time.perf_counter()
    while time.perf_counter() - begun < 3:
        took = sum(products.burst(tens))
        rows.append(took / tens)
        pause(took * (1 - share) / share)
    return statistics.median(rows[len(rows) // 2 :])


def behind_pause(products, pause_s):
    """Seconds of ten products in a burst behind a pause, which comes behind half a second of others."""
    rows = []
    for _ in range(3):
        products.burst(40)
        time.sleep(pause_s)
        rows.append(statistics.mean(products.burst(25)))
    return statistics.median(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    products = Products()
    for _ in range(3):
        products.burst(2)
    time.sleep(3)
    result = {
        **facts(),
        "from_rest_s": products.burst(300),
        "behind_pause_s": {pause: behind_pause(products, pause) for pause in PAUSES_S},
        "shares": [
            {"burst": tens, "share": share, "seconds": at_share(products, tens, share)}
            for tens in BURSTS
            for share in SHARES
        ],
        "shares_with_reading": [
            {"burst": tens, "share": share, "seconds": at_share(products, tens, share, products.read)}
            for tens in BURSTS
            for share in SHARES[:-1]
        ],
    }
    write(given.out, result)
    for what, told in (("shares", "the time"), ("shares_with_reading", "the time, and reading")):
        for row in result[what]:
            say(f"bursts of {row['burst']}, {row['share']:.0%} of {told}: {1e3 * row['seconds']:.3f} ms")


if __name__ == "__main__":
    main()
