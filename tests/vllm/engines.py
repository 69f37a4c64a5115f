"""Engines in other processes, and one without vLLM that fills an arena."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from harness import BLOCK, Answer
from servers import environment

from kvcore.live.arena import Arena, pieces
from kvcore.live.client import NOT_YET, Register, SchedulerClient, WorkerClient

HERE = Path(__file__).resolve().parent


class Child:
    """`child.py` in a process that can be stopped and killed."""

    def __init__(self, model, endpoint, log):
        self._log = Path(log).open("w")  # noqa: SIM115 - open as long as the process is
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "child.py"), str(model), endpoint],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(),
        )
        self.wait_for("READY")

    def say(self, **command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def wait_for(self, word):
        """Return what follows `word` on its line; whatever else vLLM prints is skipped."""
        for line in self.process.stdout:
            if line.startswith(word):
                return line[len(word) :].strip()
        raise AssertionError(f"the engine ended before it said {word}: see {self._log.name}")

    def answers(self):
        data = json.loads(self.wait_for("ANSWERS"))
        return [Answer(tokens, logprobs) for tokens, logprobs in data["answers"]], data["metrics"]

    def stop_running(self):
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self):
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stdin.close()
        self._log.close()

    def end(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()
        self._log.close()


class Filler:
    """An instance without an engine: stores chunks of one repeated byte, and looks whether they stay so."""

    def __init__(self, endpoint, block_bytes):
        sizes = {"instance": "filler", "block_tokens": BLOCK, "block_bytes": block_bytes}
        self.scheduler = SchedulerClient(endpoint, Register(role="scheduler", **sizes), wait_s=1.0)
        self.worker = WorkerClient(endpoint, Register(role="worker", **sizes))
        assert self.worker.register() is not None
        self.registered = self.scheduler.register()
        assert self.registered is not None
        self.arena = Arena.attach(Path(self.registered.arena_path))
        self.written = {}
        self._count = 0

    def fill(self, chunks):
        """Store `chunks` chunks, each as a request of its own."""
        for _ in range(chunks):
            self._count += 1
            name, request = b"filler %d" % self._count, f"filler-{self._count}"
            assert self.scheduler.lookup(request, [name]) is not NOT_YET
            self.scheduler.ask(request, [name])
            grants = []
            while not grants:
                grants = self.scheduler.granted()
            ((_, granted),) = grants
            assert not granted.refused, granted.refused
            self.scheduler.end(request)
            pages = np.frombuffer(granted.pages, "<u4")
            self._bytes(pages, self._count % 251)
            self.worker.committed(request, [name])
            self.written[name] = pages, np.frombuffer(granted.generations, "<u8"), self._count % 251
            assert self.worker.flush(2)

    def intact(self):
        """Return how many chunks still own their pages, and whether all of them hold what was written."""
        own = {
            name: one for name, one in self.written.items() if np.array_equal(self.arena.generations[one[0]], one[1])
        }
        return len(own), all(
            bool((view == byte).all()) for pages, _, byte in own.values() for view in self._views(pages)
        )

    def _bytes(self, pages, byte):
        for view in self._views(pages):
            view[:] = byte

    def _views(self, pages):
        size = self.registered.shard_bytes
        return [self.arena.data[at : at + n] for at, n in pieces(pages, self.registered.page_bytes, 0, size)]

    def close(self):
        """Leave the server."""
        self.worker.leave()
        self.scheduler.leave()
        self.arena.close()


class Timed:
    """Adds up the time that an engine spends inside its connector's methods."""

    METHODS = (
        "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta", "update_connector_output",
        "request_finished", "start_load_kv", "wait_for_save", "get_finished", "handle_preemptions",
    )  # fmt: skip

    def __init__(self, *connectors):
        self.seconds = 0.0
        self.longest = 0.0
        for connector in connectors:
            for name in self.METHODS:
                setattr(connector, name, self._wrap(getattr(connector, name)))

    def _wrap(self, method):
        def timed(*args, **kwargs):
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                took = time.perf_counter() - started
                self.seconds += took
                self.longest = max(self.longest, took)

        return timed
