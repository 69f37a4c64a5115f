"""An engine in a process that can be stopped or killed in the middle of a copy; told what to do on stdin."""

import sys

import numpy as np
from live_fakes import SyncEngine, chain, content

from kvcore.live.arena import StaleChunk, Writer


def say(*words):
    print(*words, flush=True)


def main(endpoint, what, name):
    engine = SyncEngine(endpoint, name)
    prompt = chain(f"{name}-prompt", 4)
    if what == "store":
        engine.lookup("r", prompt)
        granted = engine.ask("r", prompt)
        rooms = list(engine.rooms(granted, [prompt[at] for at in granted.chunks]))
        say("granted", *np.frombuffer(granted.pages, "<u4"))
        for line in sys.stdin:
            if line == "write\n":
                for chunk, pages, generations in rooms:
                    Writer(engine.arena).scatter(pages, generations, content(chunk, engine.nbytes))
                engine.renew()
                say("wrote")
            elif line == "commit\n":
                engine.committed("r", prompt)
                say("committed")
    else:
        engine.serve("store", prompt)
        found = engine.lookup("r", prompt)
        say("found", *np.frombuffer(found.pages, "<u4"))
        for _ in sys.stdin:
            engine.renew()
            try:
                engine.read(found, prompt)
                say("read")
            except StaleChunk:
                say("stale")


if __name__ == "__main__":
    main(*sys.argv[1:])
