"""One setting under load: what TTFT is made of, and how many engines the traffic needs.

    python examples/run_under_load.py [LOG]

Without a log it makes one up: chat with shared system prompts.
"""

import sys
from dataclasses import replace

import numpy as np

import kvsim
from kvtraces import Chat, Poisson, generate


def main() -> None:
    if len(sys.argv) > 1:
        log = kvsim.read(sys.argv[1])
    else:
        log = generate(Chat(requests=1000, seed=1, arrivals=Poisson(sessions_per_s=2.0)))
    costs = kvsim.costs(model="qwen3-8b", gpu="h100")
    settings = kvsim.RunSettings(profile=costs.run_profile, chunk_tokens=4 * log.block_tokens, l1_gb=50)

    # What the engines do with it, more of them until they keep up.
    result = kvsim.run(log, settings)
    print(result.load.sentence())
    while not result.load.sustained and settings.engines < 64:
        settings = replace(settings, engines=2 * settings.engines, routing="prefix-aware")
        result = kvsim.run(log, settings)
        print(result.load.sentence())

    if not result.load.requests:
        sys.exit("no request fits the model: nothing was served")

    # Where the time goes: every request is a row of the columns.
    columns = result.columns
    for part in ("handling_s", "queue_s", "load_s", "prefill_s"):
        print(f"{part:10}  {np.nanmean(columns[part]) * 1e3:8.2f} ms on average")
    slowest = int(np.nanargmax(columns["ttft_s"]))
    waited = columns["queue_s"][slowest] / columns["ttft_s"][slowest]
    print(f"the slowest request, {slowest}, waited {waited:.0%} of its {columns['ttft_s'][slowest]:.3f} s in the queue")
    print(f"hit tokens: {result.summary()['hit_tokens']}")


if __name__ == "__main__":
    main()
