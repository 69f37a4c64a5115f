"""Servers for the tests: in a thread of this process, or as the command that users start."""

import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from kvcore.live.client import Client
from kvcore.live.server import Server
from kvcore.live.settings import load
from kvcore.live.wire import GetMetrics, Status

ROOT = Path(__file__).resolve().parents[2]


class ServerInThread:
    """`folder` holds the endpoint and the arena."""

    def __init__(self, folder, **options):
        self.endpoint = f"ipc://{folder}/kvcore.ipc"
        settings = {"http": "off", "pretouch": False, "arena_dir": str(folder), "bind": (self.endpoint,), **options}
        self.server = Server(load(settings, {}))
        self.server.start()

    def stop(self):
        self.server.stop()
        assert self.server.join(5)


class ServerProcess:
    """`kvcore serve` in a process that can be killed, stopped and started again."""

    def __init__(self, folder, *flags):
        self.folder = Path(folder)
        self.endpoint = f"ipc://{folder}/kvcore.ipc"
        self._command = [
            sys.executable, "-m", "kvcore", "serve", "--bind", self.endpoint, "--arena-dir", str(folder),
            "--http", "off", "--no-pretouch", *flags,
        ]  # fmt: skip
        self.start()

    def start(self):
        self.process = subprocess.Popen(self._command, env=environment(), stderr=(self.folder / "server.log").open("a"))
        wait_for(lambda: responds(self.endpoint), 20)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def pause(self):
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self):
        self.process.send_signal(signal.SIGCONT)

    def stop(self):
        self.go_on()
        self.process.terminate()
        self.process.wait(10)


def environment():
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "traces"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": ":".join(paths)}


def responds(endpoint):
    with Client(endpoint) as client:
        try:
            client.ping(0.5)
        except ConnectionError:
            return False
    return True


def wait_for(what, timeout_s=10.0):
    until = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def status(endpoint):
    with Client(endpoint) as client:
        return client.call(Status()).data


def counters(endpoint):
    """The server's counters by short name, summed over labels."""
    with Client(endpoint) as client:
        data = client.call(GetMetrics()).data
    found = defaultdict(int)
    for name, *_, value in data["values"]:
        found[name.removeprefix("kvcore_")] += value
    return found
