"""From a request log to an L1 size, in Python: what `kvsim tune` does, with the arrays at hand.

    python examples/tune_a_log.py [LOG]

Without a log it makes one up: chat with shared system prompts, in bursts.
"""

import sys

import numpy as np

import kvsim
from kvtraces import Bursty, Chat, generate


def main() -> None:
    if len(sys.argv) > 1:
        log = kvsim.read(sys.argv[1])
    else:
        log = generate(Chat(requests=2000, seed=1, arrivals=Bursty(sessions_per_s=0.5)))
    costs = kvsim.costs(model="qwen3-8b", gpu="h100")
    print(f"{len(log):,} requests; a token of KV takes {costs.kv.stored_bytes_per_token:,} bytes")

    # One setting: which requests hit, and how much.
    one = kvsim.simulate(log, chunk_tokens=4 * log.block_tokens, capacity_chunks=500, policy="lru")
    print(f"500 chunks of {one.chunk_tokens} tokens: {one.token_hit_ratio:.1%} of the prompt tokens are found")
    print(f"requests that find nothing: {np.count_nonzero(one.hit_chunks == 0):,}")

    # All settings, and one of them recommended.
    result = kvsim.tune(log, costs, policies=["lru", "s3fifo"], l1_points=8)
    best = result.point
    setting = f"chunks of {best.chunk_tokens} tokens, {best.l1_size_gb:g} GiB, {best.policy}"
    print(f"recommended: {setting}" if result.pays else f"nothing is recommended: {result.notes[0]}")

    # The sweep as columns: hit ratio by L1 size at the best chunk size and policy.
    columns = result.columns()
    rows = (columns["chunk_tokens"] == best.chunk_tokens) & (columns["policy"] == best.policy)
    for size, ratio in zip(columns["l1_size_gb"][rows], columns["token_hit_ratio"][rows], strict=True):
        print(f"{size:8.2f} GiB  {ratio:6.1%}  {'#' * round(60 * ratio)}")

    # Whom it helps: time to first token of each request with and without.
    saved = result.no_cache_s - result.ttft_s
    print(f"a quarter of the requests save at least {np.quantile(saved, 0.75) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
