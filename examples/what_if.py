"""What if there were more traffic, one engine more, another GPU, a disk or a store below L1, or no cache?

    python examples/what_if.py [LOG]

Without a log it makes one up: chats about forty long texts, more than the engine's own cache holds. The settings run
side by side, in two processes.
"""

import sys
from dataclasses import replace

import kvsim
from kvtraces import Chat, Poisson, Spread, generate


def main() -> None:
    if len(sys.argv) > 1:
        log = kvsim.read(sys.argv[1])
    else:
        texts, answers = Spread(median=6000, sigma=0.3), Spread(median=100, sigma=0.8)
        arrivals = Poisson(sessions_per_s=0.5)
        log = generate(
            Chat(requests=600, seed=1, arrivals=arrivals, system_prompts=40, system_tokens=texts, output_tokens=answers)
        )
    h100, h200 = (kvsim.costs(model="qwen3-8b", gpu=gpu).run_profile for gpu in ("h100", "h200"))
    today = kvsim.RunSettings(profile=h100, chunk_tokens=log.block_tokens, l0_gb=8.0, l1_gb=16.0)
    what_if = {
        "today": today,
        "no cache but the engine's": replace(today, l1_gb=0.0),
        "twice the traffic": replace(today, rate_scale=2.0),
        "the same on two engines": replace(today, rate_scale=2.0, engines=2, routing="least-loaded"),
        "on an H200": replace(today, profile=h200, l0_gb=None),
        "a disk of 50 GiB": replace(today, l2_gb=50.0),  # at 1.5 GB/s: slower than to compute
        "50 GiB in a remote store": replace(today, l2_gb=50.0, l2_kind="network"),
    }
    for name, result in zip(what_if, kvsim.run_many(log, list(what_if.values())), strict=True):
        p50, p95 = result.ttft_s["p50"], result.ttft_s["p95"]
        why = "nothing served" if not result.load.requests else "overloaded"
        times = why if p50 is None else f"TTFT p50 {1e3 * p50:6.1f} ms, p95 {1e3 * p95:6.1f} ms"
        print(f"{name:26} {times}, GPU busy {result.utilisation['gpu']:.0%}")

    # The same questions to `tune`: the smallest cache that holds a target, on one engine or two.
    trial = kvsim.Trial(base=replace(today, rate_scale=2.0), engines=(1, 2), slo_ttft_p95_s=0.5, top=3)
    try:
        found = kvsim.tune(log, kvsim.costs(model="qwen3-8b", gpu="h100"), policies=["lru"], trial=trial)
    except kvsim.UsageError as error:
        sys.exit(str(error))
    chosen = found.settled.chosen
    if chosen is None:
        print(found.settled.reason)
    else:
        size = "no L1" if chosen.point is None else f"an L1 of {chosen.settings.l1_gb:g} GiB"
        print(f"within 0.5 s at p95: {size}, engines: {chosen.settings.engines}; {found.settled.reason}")


if __name__ == "__main__":
    main()
