"""An engine in a process of its own, told what to do by lines of JSON; it can be slow inside a copy.

    python child.py MODEL ENDPOINT

Lines in: {"prompts": [[...]], "max_tokens": 8, "slow": "store" | "load" | null, "reset": bool}. Lines out: `READY`,
`COPYING` in the middle of a slow copy, `ANSWERS [...]`.
"""

import json
import sys
import time
from pathlib import Path

import harness

from kvcore.vllm.mover import Mover

SLOW_S = 1.0


class Slow:
    """Makes one copy tell that it is half-way, and then take its time."""

    def __init__(self):
        self.kind = None
        for kind in ("store", "load"):
            setattr(Mover, kind, self._wrap(kind, getattr(Mover, kind)))

    def _wrap(self, kind, copy):
        def slow(mover, pages, blocks, **rest):
            if self.kind != kind:
                return copy(mover, pages, blocks, **rest)
            self.kind = None
            transfer = mover._transfers.transfer
            planes, slots, ids = len(mover.layout.planes), mover._slots(pages), blocks.ravel()
            halves = range(planes // 2), range(planes // 2, planes)
            first, second = (ids, slots) if kind == "store" else (slots, ids)
            getattr(transfer, kind)(first, second, planes=halves[0]).wait()
            say("COPYING")
            time.sleep(SLOW_S)
            return getattr(transfer, kind)(first, second, planes=halves[1])

        return slow


def say(word, *rest):
    print(word, *rest, flush=True)


def main(model, endpoint):
    slow = Slow()
    with harness.engine(Path(model), harness.connector_config("KVCoreMPConnector", endpoint=endpoint)) as llm:
        say("READY")
        for line in sys.stdin:
            command = json.loads(line)
            if command.get("reset"):
                assert llm.reset_prefix_cache()
            slow.kind = command.get("slow")
            answers = harness.generate(llm, command["prompts"], command.get("max_tokens", 8))
            gained = {
                name: value for name, value in harness.metrics(llm).items() if "kvcore" in name or "external" in name
            }
            say("ANSWERS", json.dumps({"answers": [[a.tokens, a.logprobs] for a in answers], "metrics": gained}))


if __name__ == "__main__":
    main(*sys.argv[1:])
