"""How far a prediction is off, and why: a recorded log against its simulation.

    python examples/validate_a_prediction.py [LOG]

A log that `kvcore serve --record` wrote has what is needed. Without one, this script records one from a simulated
server whose prefill is a quarter slower than the profile says, and the comparison finds that out.
"""

import sys
from dataclasses import replace

import kvsim
from kvtraces import Chat, Log, Poisson, generate


def main() -> None:
    profile = kvsim.costs(model="qwen3-8b", gpu="h100").run_profile
    settings = kvsim.RunSettings(profile=profile, chunk_tokens=64, l0_block_tokens=16, l0_gb=8.0, l1_gb=30.0)
    try:
        log = kvsim.read(sys.argv[1]) if len(sys.argv) > 1 else recorded(settings)
        found = kvsim.validate(log, settings)
    except (kvsim.LogError, kvsim.UsageError) as error:  # such as a log without ttft_ms
        sys.exit(f"error: {error}")
    for name, ttft in found.ttft.items():
        off = f"{ttft.error:+.1%} ({ttft.low:+.1%} to {ttft.high:+.1%})"
        print(f"{name}: recorded {ttft.recorded_s:.4f} s, predicted {ttft.predicted_s:.4f} s: {off}")
    for tier, hits in found.hits.items():
        print(f"{tier}: {hits.recorded:,} tokens hit, {hits.predicted:,} predicted")
    print("where the error lies:", ", ".join(f"{name} {part.share:.0%}" for name, part in found.parts.items()))
    worst = found.groups[0]
    print(f"worst for prompts of {worst.from_tokens:,} to {worst.to_tokens:,} tokens, mostly in {worst.why}")
    print("better than the mean TTFT by prompt length:", found.beats_baseline)


def recorded(settings: kvsim.RunSettings) -> Log:
    """Return the log that a server with slower prefill would have recorded."""
    log = generate(Chat(requests=600, seed=2, block_tokens=16, arrivals=Poisson(sessions_per_s=0.8)))
    grid = settings.profile.prefill
    slower = replace(grid, seconds=tuple(tuple(1.25 * value for value in row) for row in grid.seconds))
    server = replace(settings, profile=replace(settings.profile, prefill=slower))
    columns = kvsim.run(log, server, baseline=False).columns
    times = {f"{part}_ms": 1e3 * columns[f"{part}_s"] for part in ("ttft", "load", "prefill")}
    times["queue_ms"] = 1e3 * (columns["handling_s"] + columns["queue_s"])  # a server counts from the arrival
    hits = {name: columns[name].astype(float) for name in ("l0_tokens", "matched_l1", "loaded_tokens")}
    return replace(log, extra={**log.extra, **times, **hits})


if __name__ == "__main__":
    main()
