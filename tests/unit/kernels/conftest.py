"""Streams that run late and in any order that events allow, to find a missing wait without a GPU; Triton both ways."""

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from kvkernels.errors import DeviceError
from kvkernels.streams import move_bytes

sys.path.insert(0, str(Path(__file__).parent))  # pipelines is shared by the modules of this folder


class LazyEvent:
    def __init__(self, runtime, timed):
        self.reached = False
        self._runtime = runtime
        self._timed = timed
        self._when = None

    def query(self):
        return self.reached

    def synchronize(self):
        while not self.reached:
            assert self._runtime.step(), "an event that nothing will reach: deadlock"

    def reach(self):
        self.reached = True
        self._when = self._runtime.steps

    def since(self, earlier):
        assert self._timed, "as cuEventElapsedTime refuses an event without timing"
        assert earlier._timed
        return float(self._when - earlier._when)

    def fault(self):
        return None


class LazyStream:
    def __init__(self, runtime):
        self.queue = deque()
        self.copies_queued = 0
        self._runtime = runtime

    def wait(self, event):
        self._runtime.count_call(self)
        if self._runtime.honours_waits:
            self.queue.append((event, lambda: None))

    def record(self, *, timed=False):
        self._runtime.count_call(self)
        event = LazyEvent(self._runtime, timed)
        self.queue.append((None, event.reach))
        return event

    def copy(self, target, source, length):
        for ranges in (target, source):
            self._runtime.refuse_crossing(ranges, length)
        self._runtime.count_copy()
        # The driver reads the arrays of addresses during the call, so a copy of them is what the stream sees.
        for one in self._runtime.rng.permutation(len(length)):
            ranges = [np.array([values[one]]) for values in (target, source, length)]
            self.queue.append((None, partial(self._move, *ranges)))
            self.copies_queued += 1

    def _move(self, target, source, length):
        self.copies_queued -= 1
        move_bytes(target, source, length)

    def launch(self, kernel):
        self._runtime.count_call(self)
        # Like a GPU, the stream holds no reference to what its kernels read.
        held = [weakref.ref(value) if hasattr(value, "data_ptr") else value for value in kernel.args]
        function = kernel.func

        def run():
            values = [value() if isinstance(value, weakref.ref) else value for value in held]
            assert all(value is not None for value in values), "a kernel reads memory that was freed"
            function(*values)

        self.queue.append((None, run))


class LazySubmitter:
    """Runs a drawn number of steps in the call, and each of the rest when the runtime's turn falls on it."""

    def __init__(self, runtime):
        self._runtime = runtime
        self._works = deque()

    def submit(self, work):
        with self._runtime.lock:
            self._works.append((work, None))
            for _ in range(self._runtime.rng.integers(0, 4)):
                if len(self._works) == 1 and self.ready():
                    self.step()

    def until(self, reached):
        while not reached():
            assert self._runtime.step(), "a point that no step will reach: deadlock"

    def close(self):
        self.until(lambda: not self._works)

    def ready(self):
        return bool(self._works) and (self._works[0][1] is None or self._works[0][1].reached)

    def step(self):
        work, _ = self._works[0]
        more, before = work.step()
        self._works[0] = (work, before)
        if not more:
            self._works.popleft()


class LazyRuntime:
    """Executes nothing until asked.

    `step` draws one among the streams whose wait is over and the transfers that are still being handed over, and runs
    its head: what a thread that submits does next to the device, in any order that events allow; the slowest stream's
    only where there is no other. Every step is a second of its clock.
    """

    needs_pinned = False

    def __init__(self, seed, *, honours_waits=True):
        self.rng = np.random.default_rng(seed)
        self.honours_waits = honours_waits
        self.main = LazyStream(self)
        self.streams = [self.main]
        self.submitters = []
        self.registered = []
        self.copies_left = None
        self.calls_left = None
        self.slowest = None
        self.steps = 0
        self.lock = threading.RLock()

    def stream(self, *, urgent):
        self.streams.append(LazyStream(self))
        return self.streams[-1]

    def current(self):
        return self.main

    def staging(self, nbytes):
        import torch  # noqa: PLC0415  (the fixture is skipped without it)

        return torch.full((nbytes,), 0xA5, dtype=torch.uint8)

    def upload(self, values, stream):
        import torch  # noqa: PLC0415  (the fixture is skipped without it)

        uploaded = torch.zeros(len(values), dtype=torch.int64)
        late = weakref.ref(uploaded)
        source = np.array(values)

        def fill():
            late().copy_(torch.from_numpy(source))

        stream.queue.append((None, fill))
        return uploaded

    def register(self, address, nbytes):
        """Know a host range as an allocation of its own, as cuMemHostRegister does."""
        self.registered.append((address, nbytes))

    def refuse_crossing(self, ranges, length):
        """What the driver answers to a copy that begins in one registered range and ends in another."""
        for address, nbytes in self.registered:
            inside = (ranges >= address) & (ranges < address + nbytes)
            if (ranges + length > address + nbytes)[inside].any():
                raise DeviceError("cuMemcpyAsync: CUDA_ERROR_INVALID_VALUE (1)")

    def count_call(self, stream):
        """Fail once, in place of the wait, record or launch before which as many were left."""
        if self.calls_left is not None and stream is not self.main:
            self.calls_left -= 1
            if self.calls_left < 0:
                self.calls_left = None
                raise DeviceError("CUDA_ERROR_OUT_OF_MEMORY (2)")

    def count_copy(self):
        """Fail once the copies that were left are used up."""
        if self.copies_left is not None:
            self.copies_left -= 1
            if self.copies_left < 0:
                raise DeviceError("cuMemcpyAsync: CUDA_ERROR_OUT_OF_MEMORY (2)")

    def pinned(self, nbytes):
        return np.zeros(nbytes, np.uint8)

    def writing(self):
        return None

    def enter_thread(self):
        pass

    def submitter(self, name, *, urgent):
        self.submitters.append(LazySubmitter(self))
        return self.submitters[-1]

    def step(self):
        with self.lock:
            streams = [s for s in self.streams if s.queue and (s.queue[0][0] is None or s.queue[0][0].reached)]
            ready = [*streams, *(one for one in self.submitters if one.ready())]
            if not ready:
                return False
            ready = [one for one in ready if one is not self.slowest] or ready
            self.steps += 1
            chosen = ready[self.rng.integers(len(ready))]
            if isinstance(chosen, LazySubmitter):
                chosen.step()
            else:
                _, work = chosen.queue.popleft()
                work()
            return True

    def run_all(self):
        while self.step():
            pass
        assert not any(stream.queue for stream in self.streams), "streams wait for each other: deadlock"
        assert not any(one._works for one in self.submitters), "a transfer that nothing lets go on: deadlock"


@pytest.fixture(scope="session")
def lazy_runtime():
    return LazyRuntime


_LIBRARY = {}


def fresh_module(monkeypatch, name, *, interpret):
    """A backend's module, its kernels decorated anew for one mode, and gone from sys.modules afterwards."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
    language = importlib.import_module("triton.language")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    for function in ("max", "sum", "cumsum"):  # kernels of Triton's own, which had one mode since it was imported
        plain = _LIBRARY.setdefault(function, getattr(language, function))
        monkeypatch.setattr(language, function, interpreter.InterpretedFunction(plain.fn) if interpret else plain)
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    return module


@pytest.fixture(scope="session")
def fresh():
    return fresh_module


def compiled_for_h100(*jobs):
    """Kernels as compiled for an H100, from nothing: see `compile_child.py`."""
    child = Path(__file__).with_name("compile_child.py")
    with tempfile.TemporaryDirectory(prefix="kvkernels-compiled-") as cache:
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
        command = [sys.executable, str(child)]
        run = subprocess.run(command, input=pickle.dumps(jobs), capture_output=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr.decode()[-3000:]
    return pickle.loads(run.stdout)


@pytest.fixture(scope="session")
def compile_for_h100():
    return compiled_for_h100
