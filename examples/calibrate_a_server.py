"""A cost profile of a live server, and what it predicts.

    python examples/calibrate_a_server.py http://localhost:8000 [MODEL] [GPU] [OUT.json]

The server must be idle, with prefix caching on. Run again after an interruption, it goes on where it stopped.
"""

import sys
from pathlib import Path

import kvsim
from kvsim.calibration import HttpEndpoint, make_plan
from kvsim.calibration.facts import gather
from kvsim.profiles.load import to_json


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    url, model, gpu, out = (sys.argv[1:] + ["qwen3-8b", "h100", "profile.json"][len(sys.argv) - 2 :])[:4]
    endpoint = HttpEndpoint(url)
    longest = endpoint.max_model_len() or 8192
    plan = make_plan(max_model_len=longest, max_num_batched_tokens=512, max_num_seqs=4, repeats=1)
    profile = kvsim.calibrate(
        endpoint,
        plan,
        gather(model, gpu, max_model_len=longest),
        state=Path(f"{out}.partial"),
        progress=lambda done, total, what: print(f"{done:4} of {total}: {what}", file=sys.stderr),
    )
    Path(out).write_text(to_json(profile))
    print(f"{out}: {profile.name}")
    print(f"a prompt of 500 tokens takes {1e3 * (profile.prefill_s(500) + profile.handling_s(500)):.1f} ms")
    print(f"a token for each of 4 requests takes {1e3 * profile.decode_step_s(4, 1000):.1f} ms")


if __name__ == "__main__":
    main()
