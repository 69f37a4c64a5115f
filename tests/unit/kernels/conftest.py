"""Streams that run late and in any order that events allow, to find a missing wait without a GPU."""

import weakref
from collections import deque
from functools import partial

import numpy as np
import pytest

from kvkernels.streams import move_bytes


class LazyEvent:
    def __init__(self, runtime):
        self.reached = False
        self._runtime = runtime

    def query(self):
        return self.reached

    def synchronize(self):
        while not self.reached:
            assert self._runtime.step(), "an event that nothing will reach: deadlock"


class LazyStream:
    def __init__(self, runtime):
        self.queue = deque()
        self._runtime = runtime

    def wait(self, event):
        if self._runtime.honours_waits:
            self.queue.append((event, lambda: None))

    def record(self):
        event = LazyEvent(self._runtime)

        def reach():
            event.reached = True

        self.queue.append((None, reach))
        return event

    def copy(self, target, source, length):
        # The driver reads the arrays of addresses during the call, so a copy of them is what the stream sees.
        for one in self._runtime.rng.permutation(len(length)):
            ranges = [np.array([values[one]]) for values in (target, source, length)]
            self.queue.append((None, partial(move_bytes, *ranges)))

    def launch(self, kernel):
        # Like a GPU, the stream holds no reference to what its kernels read.
        held = [weakref.ref(value) if hasattr(value, "data_ptr") else value for value in kernel.args]
        function = kernel.func

        def run():
            values = [value() if isinstance(value, weakref.ref) else value for value in held]
            assert all(value is not None for value in values), "a kernel reads memory that was freed"
            function(*values)

        self.queue.append((None, run))


class LazyRuntime:
    """Executes nothing until asked; `step` runs the head of one stream, drawn among those whose wait is over."""

    needs_pinned = False

    def __init__(self, seed, *, honours_waits=True):
        self.rng = np.random.default_rng(seed)
        self.honours_waits = honours_waits
        self.main = LazyStream(self)
        self.streams = [self.main]

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

    def pinned(self, nbytes):
        return np.zeros(nbytes, np.uint8)

    def enter_thread(self):
        pass

    def step(self):
        ready = [s for s in self.streams if s.queue and (s.queue[0][0] is None or s.queue[0][0].reached)]
        if not ready:
            return False
        _, work = ready[self.rng.integers(len(ready))].queue.popleft()
        work()
        return True

    def run_all(self):
        while self.step():
            pass
        assert not any(stream.queue for stream in self.streams), "streams wait for each other: deadlock"


@pytest.fixture(scope="session")
def lazy_runtime():
    return LazyRuntime
