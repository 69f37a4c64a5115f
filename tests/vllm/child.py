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

from kvkernels.reference import ReferenceTransfer

SLOW_S = 1.0


class Slow:
    """Makes the backend tell of every copy of one kind, half-way, and then take its time."""

    def __init__(self):
        self.kind = None
        for kind in ("store", "load"):
            setattr(ReferenceTransfer, kind, self._wrap(kind, getattr(ReferenceTransfer, kind)))

    def _wrap(self, kind, copy):
        def slow(transfer, first, second, *, planes=None):
            if self.kind != kind:
                return copy(transfer, first, second, planes=planes)
            half = len(transfer.layout.planes) // 2
            copy(transfer, first, second, planes=range(half))
            self.kind = None
            say("COPYING")
            time.sleep(SLOW_S)
            return copy(transfer, first, second, planes=range(half, len(transfer.layout.planes)))

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
