# ruff: noqa: E402  (skipped before its imports where torch is absent)
"""The pump over a driver built from C, which does everything when it is called and notes in which order."""

import ctypes
import shutil
import subprocess
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from pipelines import TorchMover, batched, loaded_right, setting, staged, stored_right

from kvkernels import DeviceError, HostArena
from kvkernels.cases import random_case, random_ids, random_slots
from kvkernels.compiled import Launch
from kvkernels.cuda_driver import CudaDriver
from kvkernels.cuda_streams import CudaEvent, CudaStream, HeldEvents, PumpSubmitter, _Writing
from kvkernels.pump import COPY, RECORD, WAIT, Pump
from kvkernels.staged import StagedTransfer
from kvkernels.streams import HostRuntime
from kvkernels.submit import Work
from kvkernels.transfer import check_request

compiler = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(compiler is None, reason="no C compiler")

DRIVER = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
typedef struct { int recorded; } event;
static int64_t noted[1 << 16][8];
static int notes;
#define NOTE(...) do { int64_t row[8] = {__VA_ARGS__}; memcpy(noted[notes++ & 0xFFFF], row, sizeof row); } while (0)
static int notes_parameters, made, early, slow_us, fails_at = -1, code_of_failure, refuses_events;
static int fails(void) {
    if (slow_us) usleep(slow_us);
    made++;
    return fails_at >= 0 && made > fails_at ? code_of_failure : 0;
}
int cuEventCreate(event **e, unsigned flags) { *e = calloc(1, sizeof **e); return 0; }
int cuEventRecord(event *e, void *s) { if (refuses_events) return 4; e->recorded++; NOTE(1, (int64_t)e, (int64_t)s);
    return 0; }
/* As the real one: an event that was never recorded is reached. */
static int reached(event *e) { if (!e->recorded && !refuses_events) early++; return 0; }
/* An event that the device is not at yet: asked again and again, of no harm. */
static volatile int far_away;
int cuEventQuery(event *e) { return far_away ? 600 : reached(e); }
int cuEventSynchronize(event *e) { NOTE(2, (int64_t)e); return reached(e); }
int cuStreamSynchronize(void *s) { return 0; }
int cuEventElapsedTime(float *ms, event *a, event *b) { *ms = 1; return !a->recorded || !b->recorded; }
int cuStreamWaitEvent(void *s, event *e, unsigned flags) {
    NOTE(3, (int64_t)e, (int64_t)s);
    return reached(e) + (flags != 0);
}
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t n, void *s) {
    int code = fails();
    if (!code) memcpy((void *)to, (void *)from, n);
    NOTE(4, to, from, n, (int64_t)s);
    return code;
}
typedef struct { int order; int a[4]; unsigned flags; } attributes;
static int batch(uint64_t *to, uint64_t *from, size_t *n, size_t count, attributes *a, size_t *starts, size_t one,
                 void *stream) {
    int code = fails();
    if (a->order != 1 || a->flags != 1 || *starts || one != 1 || !stream) return 1;
    for (size_t i = 0; i < count && !code; i++) {
        memcpy((void *)to[i], (void *)from[i], n[i]);
        NOTE(4, to[i], from[i], n[i], (int64_t)stream);
    }
    return code;
}
static int older_batch(uint64_t *to, uint64_t *from, size_t *n, size_t count, attributes *a, size_t *starts, size_t one,
                       size_t *failed, void *stream) {
    *failed = 0;
    return batch(to, from, n, count, a, starts, one, stream);
}
/* A "kernel" writes down how it was launched, and its two parameters. */
static void kernel(int64_t *what, void **parameters) {
    int64_t *said = *(int64_t **)parameters[0];
    for (int i = 0; i < 4; i++) said[i] = what[i];
    said[4] = *(int32_t *)parameters[1];
}
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *s, void **parameters, void **extra) {
    int64_t what[] = {gx, bx, shared, (int64_t)s};
    int code = fails();
    NOTE(5, gx, bx, shared, (int64_t)s);
    if (notes_parameters)
        for (int i = 1; i < notes_parameters; i++) NOTE(6, *(int64_t *)parameters[i]);
    if (gy != 1 || gz != 1 || by != 1 || bz != 1 || extra) return 1;
    if (!code) ((void (*)(int64_t *, void **))f)(what, parameters);
    return code;
}
void *kernel_at(void) { return (void *)kernel; }
int cuMemHostRegister_v2(void *p, size_t n, unsigned flags) { return 1; }
int cuMemHostUnregister(void *p) { return 1; }
int cuThreadExchangeStreamCaptureMode(int *mode) { return 0; }
int cuGetErrorName(int code, const char **name) { *name = code == 2 ? "OUT_OF_MEMORY" : "OTHER"; return 0; }
static int newest;
int cuGetProcAddress_v2(const char *symbol, void **pfn, int version, uint64_t flags, int *status) {
    *pfn = version > newest || strcmp(symbol, "cuMemcpyBatchAsync") ? 0 : version >= 13000 ? (void *)batch
           : (void *)older_batch;
    return *pfn == 0;
}
void set(int version, int slow, int at, int code, int events) {
    newest = version; slow_us = slow; fails_at = at < 0 ? -1 : made + at; code_of_failure = code;
    refuses_events = events; early = 0;
}
void be_far_away(int yes) { far_away = yes; }
int64_t *start_notes(int parameters) { notes = 0; notes_parameters = parameters; return &noted[0][0]; }
int noted_so_far(void) { return notes; }
int calls_made(void) { return made; }
int asked_too_early(void) { return early; }
"""


class Driver(CudaDriver):
    """The stand-in, with what it can be told."""

    def __init__(self, library, version=13000):
        self.standing = ctypes.CDLL(library)
        self.version = version
        self.set()
        super().__init__(library)

    def set(self, *, slow_us=0, fails_at=-1, code=2, refuses_events=False):
        self.standing.set(self.version, slow_us, fails_at, code, int(refuses_events))

    def be_far_away(self, *, yes):
        """Whether the device is not yet at any of its events."""
        self.standing.be_far_away(int(yes))

    @property
    def calls(self):
        return self.standing.calls_made()

    @property
    def asked_too_early(self):
        return self.standing.asked_too_early()


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "driver.so", folder / "driver.c"], check=True)
    return str(folder / "driver.so")


@pytest.fixture(scope="session")
def drivers(library):
    """One a version: what is compiled for a driver is kept."""
    return {version: Driver(library, version) for version in (13000, 12080, 12060)}


@pytest.fixture
def driver(drivers):
    drivers[13000].set()
    yield drivers[13000]
    drivers[13000].set()
    drivers[13000].be_far_away(yes=False)


class HostStream(CudaStream):
    def launch(self, kernel):
        if (program := self._writing.program) is not None:
            program.pump.catch_up()
        kernel()


class PumpRuntime(HostRuntime):
    """The host's memory, behind the driver's calls."""

    def __init__(self, driver, *, inline_s=1.0, enter=lambda: None):
        super().__init__()
        self._driver = driver
        self._writing = _Writing()
        self._spare = [], []
        self._streams = 0
        self._inline_s = inline_s
        self._enter = enter
        self.pumps = []
        self.main = self.stream(urgent=True)

    def stream(self, *, urgent):
        self._streams += 1
        options = {"batched": self._driver.batch is not None, "enter_thread": self._enter, "writing": self._writing}
        return HostStream(SimpleNamespace(cuda_stream=self._streams), self._driver, spare=self._spare, **options)

    def current(self):
        return self.main

    def writing(self):
        return self._writing.program

    def written(self, program, row, *, timed):
        options = {"timed": timed, "program": program, "row": row}
        return CudaEvent(0, self._driver, self._spare[timed], self._enter, **options)

    def held(self, count):
        return HeldEvents(count, self._driver, self._spare[False])

    def submitter(self, name, *, urgent):
        self.pumps.append(Pump(self._driver, name, self._enter))
        return PumpSubmitter(self.pumps[-1], self._writing, self._enter, inline_s=self._inline_s)


MAKERS = pytest.mark.parametrize("make", [staged, batched])


@MAKERS
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    version=st.sampled_from([13000, 12080, 12060]),
    inline_s=st.sampled_from([0.0, 1.0]),
    post=st.sampled_from([1, 5, 48]),
    ahead=st.sampled_from([1, 64]),
    rest_s=st.sampled_from([0.0, 0.001]),
)
def test_a_round_trip(drivers, make, seed, version, inline_s, post, ahead, rest_s):
    """In rings so small that they come round many times."""
    driver = drivers[version]
    driver.set()
    case, ids, slots, arena = setting(seed)
    empty = case.emptied()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvkernels.pump._ROWS", 16)
        patch.setattr("kvkernels.pump._POSTS", 3)
        patch.setattr("kvkernels.cuda_streams._POST_ROWS", post)
        source = make(PumpRuntime(driver, inline_s=inline_s), case.layout, case.tensors, arena, ahead=ahead)
        target = make(PumpRuntime(driver, inline_s=inline_s), case.layout, empty.tensors, arena, ahead=ahead)
        for _ in range(2):
            source.store(ids, slots, rest_s=rest_s).wait()
            assert stored_right(case, ids, slots, arena)
            handle = target.load(slots, ids)
            for layer in range(case.layout.num_layers):
                handle.wait_layer(layer)
                planes = case.layout.planes_of_layer(layer)
                for block in ids.tolist():
                    got, wanted = empty.rows(block), case.rows(block)
                    assert all(np.array_equal(got[plane], wanted[plane]) for plane in planes)
            handle.wait()
            for memory in empty.memory:
                memory.zero_()
        target.load(slots, ids).wait()
        source.close()
        target.close()
    assert loaded_right(case, empty, ids)
    assert driver.asked_too_early == 0


@MAKERS
def test_the_call_returns_before_the_driver_is_called(driver, make):
    case, ids, slots, arena = setting(4)
    empty = case.emptied()
    make(PumpRuntime(driver), case.layout, case.tensors, arena).store(ids, slots).wait()
    transfer = batched(PumpRuntime(driver), case.layout, empty.tensors, arena)  # its kernels are the pump's as well
    transfer.load(slots, ids).wait()
    for memory in empty.memory:
        memory.zero_()
    before, began = driver.calls, time.perf_counter()
    driver.set(slow_us=20_000)
    handle = transfer.load(slots, ids)
    assert driver.calls - before <= 2
    assert not handle.done()
    handle.wait_layer(case.layout.num_layers - 1)
    assert loaded_right(case, empty, ids)
    assert driver.calls - before > 3
    assert time.perf_counter() - began >= 0.02 * (driver.calls - before)
    handle.wait()
    assert handle.measured().seconds > 0
    transfer.close()
    assert driver.asked_too_early == 0


@MAKERS
@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_a_failing_call_ends_its_transfer_only(driver, make, fails_at):
    case, ids, slots, arena = setting(4)
    empty = case.emptied()
    make(PumpRuntime(driver), case.layout, case.tensors, arena).store(ids, slots).wait()
    transfer = make(PumpRuntime(driver), case.layout, empty.tensors, arena)
    before = driver.calls
    driver.set(fails_at=fails_at)
    failing = transfer.load(slots, ids)
    with pytest.raises(DeviceError, match=r"cuMemcpy(Batch)?Async: OUT_OF_MEMORY \(2\)"):
        failing.wait()
    assert driver.calls - before == fails_at + 1, "what comes behind a failed copy is left"
    with pytest.raises(DeviceError):
        failing.done()
    with pytest.raises(DeviceError):
        failing.wait_layer(0)
    assert failing.measured() is None
    driver.set()
    transfer.load(slots, ids).wait()
    assert loaded_right(case, empty, ids)
    for _ in range(2):
        with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
            failing.wait()
    transfer.close()


@MAKERS
def test_a_fault_is_not_forgotten_for_those_that_came_after_it(driver, monkeypatch, make):
    monkeypatch.setattr("kvkernels.pump._FAULTS", 4)
    case, ids, slots, arena = setting(4)
    transfer = make(PumpRuntime(driver), case.layout, case.tensors, arena)
    transfer.store(ids, slots).wait()
    driver.set(fails_at=0)
    failing = [transfer.load(slots, ids) for _ in range(7)]
    for pump in transfer._runtime.pumps:
        pump.catch_up()
    for handle in failing[:3]:
        with pytest.raises(DeviceError, match="no longer known"):
            handle.wait()
    for handle in failing[3:]:
        with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
            handle.wait()
    driver.set()
    transfer.load(slots, ids).wait()
    transfer.close()


def test_a_device_that_refuses_events_is_told(driver):
    case, ids, slots, arena = setting(4)
    transfer = batched(PumpRuntime(driver), case.layout, case.tensors, arena)
    after = transfer._runtime.current().record()
    driver.set(refuses_events=True)
    request = check_request(case.layout, arena, ids, slots, None, loading=False)
    with pytest.raises(DeviceError, match=r"cuEventRecord: OTHER \(4\)"):
        transfer.start(request, loading=False, after=after).wait()
    transfer.close()


@MAKERS
def test_a_thread_that_cannot_use_the_device_fails_every_transfer(driver, make):
    def enter():
        raise RuntimeError("no device")

    case, ids, slots, arena = setting(4)
    runtime = PumpRuntime(driver)
    transfer = make(runtime, case.layout, case.tensors, arena)
    for pump in runtime.pumps:
        pump._enter_thread = enter
    for _ in range(2):
        with pytest.raises(DeviceError, match="cannot use the device: no device"):
            transfer.store(ids, slots).wait()
    transfer.close()


def test_what_a_step_raises_ends_its_transfer_only(driver):
    case, ids, slots, arena = setting(4)
    runtime = PumpRuntime(driver)
    transfer = staged(runtime, case.layout, case.tensors, arena)
    gather, calls = TorchMover.gather, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("no")
        gather(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchMover, "gather", failing)
        with pytest.raises(ValueError, match="no"):
            transfer.store(ids, slots).wait()
    transfer.store(ids, slots).wait()
    assert stored_right(case, ids, slots, arena)
    transfer.close()


def test_a_kernel_is_launched_as_it_was_written(driver):
    said = np.zeros(5, np.int64)
    pump = Pump(driver, "pump", lambda: None)
    driver.standing.kernel_at.restype = ctypes.c_void_p
    program, function = pump.program(), driver.standing.kernel_at()
    for turn in range(3):
        program.launch(function, 3, 64, 1000, 77, [said.ctypes.data, -7 - turn])
        pump.catch_up()
        assert said.tolist() == [3, 64, 1000, 77, -7 - turn]
    driver.launch(function, 5, 32, 0, 78, [said.ctypes.data, 9])
    assert said.tolist() == [5, 32, 0, 78, 9]
    assert program.fault() is None
    pump.close()


def test_rows_are_carried_out_in_order_and_what_they_need_is_held_until_then(driver):
    pump, target = Pump(driver, "pump", lambda: None), np.zeros(1, np.int64)
    program, sources = pump.program(), np.arange(1, 20_001)
    driver.set(slow_us=10)
    for place in range(0, 20_000, 5):
        ranges = np.array([[target.ctypes.data] * 5, sources.ctypes.data + 8 * np.arange(place, place + 5), [8] * 5])
        program.copy_batch(ranges, 77)
        del ranges
        if place % 35 == 0:
            pump.post()
    assert len(pump._kept) <= 4000
    pump.catch_up()
    assert target[0] == 20_000
    pump.close()
    assert not pump._kept


def test_closing_carries_everything_out_and_another_thread_starts_later(driver):
    pump, target, source = Pump(driver, "a pump", lambda: None), np.zeros(1, np.int64), np.zeros(1, np.int64)
    driver.set(slow_us=1000)
    for turn in range(1, 4):
        source[0] = turn
        for _ in range(20):
            pump.program().copy_each(np.array([[target.ctypes.data], [source.ctypes.data], [8]]), 77)
        pump.close()
        assert target[0] == turn
        assert "a pump" not in [thread.name for thread in threading.enumerate()]
    pump.close()


@MAKERS
def test_threads_that_store_and_load_over_one_transfer(driver, make):
    case, ids, slots, arena = setting(7)
    empty = case.emptied()
    source = make(PumpRuntime(driver, inline_s=0.0001), case.layout, case.tensors, arena)
    target = make(PumpRuntime(driver, inline_s=0.0001), case.layout, empty.tensors, arena)
    mine = ids.reshape(len(slots), -1)

    def there_and_back(chunk):
        for _ in range(10):
            source.store(mine[chunk], [slots[chunk]]).wait()
            handle = target.load([slots[chunk]], mine[chunk])
            handle.wait_layer(case.layout.num_layers - 1)
        handle.wait()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(there_and_back, [*range(len(slots))] * 2))
    source.close()
    target.close()
    assert loaded_right(case, empty, ids)
    assert driver.asked_too_early == 0


@pytest.fixture
def storing(driver):
    """A transfer to store by, whose device is not yet at what a store comes behind."""
    case, ids, slots, arena = setting(4)
    transfer = batched(PumpRuntime(driver), case.layout, case.tensors, arena)
    driver.be_far_away(yes=True)
    yield SimpleNamespace(
        store=lambda rest_s: transfer.store(ids, slots, rest_s=rest_s),
        stored_right=lambda: stored_right(case, ids, slots, arena),
    )
    driver.be_far_away(yes=False)
    transfer.close()
    assert driver.asked_too_early == 0


def test_a_store_rests_behind_the_work_that_it_comes_after(driver, storing):
    before = driver.calls
    handle = storing.store(0.05)
    with ThreadPoolExecutor(1) as waiting:
        waited = waiting.submit(handle.wait)
        time.sleep(0.1)
        assert driver.calls == before
        assert not handle.done()
        assert not waited.done()
        driver.be_far_away(yes=False)
        reached = time.perf_counter()
        waited.result(10)
    assert time.perf_counter() - reached >= 0.05
    assert driver.calls > before
    assert storing.stored_right()


def test_a_store_without_a_rest_is_on_its_way_at_once(driver, storing):
    before = driver.calls
    storing.store(0.0)
    until = time.perf_counter() + 10
    while driver.calls == before and time.perf_counter() < until:
        time.sleep(0.001)
    assert driver.calls > before


def test_who_may_not_overwrite_the_sources_yet_ends_the_rest(driver, storing):
    handles = [storing.store(3600.0) for _ in range(3)]
    began = time.perf_counter()
    handles[-1].wait_sources()
    assert time.perf_counter() - began < 10
    driver.be_far_away(yes=False)
    for handle in handles:
        handle.wait()
    assert storing.stored_right()


def test_a_ring_full_of_rows_ends_the_rest(driver, storing, monkeypatch):
    monkeypatch.setattr("kvkernels.pump._ROWS", 16)
    case, ids, slots, arena = setting(5)
    transfer = batched(PumpRuntime(driver), case.layout, case.tensors, arena)
    before = driver.calls
    handles = [transfer.store(ids, slots, rest_s=3600.0) for _ in range(9)]
    assert driver.calls > before
    handles[-1].wait_sources()
    driver.be_far_away(yes=False)
    for handle in handles:
        handle.wait()
    assert stored_right(case, ids, slots, arena)
    transfer.close()


def test_what_a_rest_ended_for_is_over_then_and_the_next_one_rests(driver, storing):
    storing.store(3600.0).wait_sources()
    before = driver.calls
    handle = storing.store(3600.0)
    time.sleep(0.05)
    assert driver.calls == before
    handle.wait_sources()
    assert driver.calls > before


def test_an_event_of_another_pump_is_recorded_before_it_is_waited_for(driver):
    runtime = PumpRuntime(driver)
    first, second = (runtime.submitter(name, urgent=True) for name in ("first", "second"))
    one, other = runtime.stream(urgent=True), runtime.stream(urgent=True)
    source, target = np.zeros(1, np.int64), np.zeros(1, np.int64)
    where = [np.array([value]) for value in (target.ctypes.data, source.ctypes.data, 8)]
    events = []

    def copying():
        one.copy(*where)
        events.append(one.record())
        yield None

    def waiting():
        other.wait(events[0])
        yield events[0]

    driver.set(slow_us=20_000)
    first.submit(Work(copying(), lambda error: None))
    second.submit(Work(waiting(), lambda error: None))
    second.close()
    assert events[0].query()
    first.close()
    assert driver.asked_too_early == 0


@MAKERS
@pytest.mark.parametrize("left", [2, 4, 6])
def test_a_transfer_that_cannot_be_given_up_is_over_when_nothing_of_it_runs(driver, monkeypatch, make, left):
    """The device makes no more events, half-way and where the transfer is to be ended; its copies are slow."""
    case, ids, slots, arena = setting(4)
    empty, runtime = case.emptied(), PumpRuntime(driver)
    make(PumpRuntime(driver), case.layout, case.tensors, arena).store(ids, slots).wait()
    transfer = make(runtime, case.layout, empty.tensors, arena)
    whole, made, finished = driver.new_event, [], []

    def new_event(*, timed=False):
        made.append(timed)
        if len(made) > left:
            raise DeviceError("cuEventCreate: OUT_OF_MEMORY (2)")
        return whole(timed=timed)

    def finish(stream):
        finished.append((stream, [pump.carried_out(pump.written) and not pump.pending for pump in runtime.pumps]))
        if len(finished) == 1:
            raise DeviceError("cuStreamSynchronize: OTHER (4)")

    driver.set(slow_us=50_000)
    monkeypatch.setattr(driver, "new_event", new_event)
    monkeypatch.setattr(driver, "finish", finish)
    handle = transfer.load(slots, ids)
    with pytest.raises(DeviceError, match="cuEventCreate"):
        handle.wait()
    assert handle.over()
    for memory in empty.memory:  # the blocks are somebody else's now
        memory.zero_()
    for pump in runtime.pumps:
        pump.catch_up()
    assert not any(memory.view(torch.uint8).any() for memory in empty.memory)
    streams = {stream.handle for stream in transfer._in.streams()}
    assert len(streams) == (3 if make is staged else 2)
    assert {stream for stream, _ in finished} == streams
    assert all(all(handed_over) for _, handed_over in finished)
    transfer.close()


class KernelMover(TorchMover):
    """Its kernels are the stand-in's, which only note how they were launched; `ready`: they have run."""

    def __init__(self, driver, *, rejects, ready):
        driver.standing.kernel_at.restype = ctypes.c_void_p
        self.function = driver.standing.kernel_at()
        self.rejects = rejects
        self.ready = ready
        self.said = np.zeros(5, np.int64)

    def launch_of(self, piece, pointers):
        sizes = (piece.planes.start, piece.chunks.start, piece.blocks.start, piece.rows)
        values = (self.said.ctypes.data, *pointers, *sizes, 0)
        given = tuple(place for place, value in enumerate(values[: 1 + len(pointers)]) if not value)
        return Launch(self.function, 3 + piece.rows, 32 + piece.row_bytes % 7, 1000, values, given)

    def gather(self, stream, ids, piece, staging, rejected):
        further = [rejected.ctypes.data] if self.rejects else []
        self.launch(stream, self.launch_of(piece, [ids.data_ptr(), staging.data_ptr(), *further]))

    def scatter(self, stream, ids, piece, staging):
        self.launch(stream, self.launch_of(piece, [ids.data_ptr(), staging.data_ptr()]))

    def launch(self, stream, one):
        stream.launch_compiled(one.function, one.programs, one.threads, one.shared, one.values)

    def written(self, piece, *, gather):
        return self.launch_of(piece, [0] * (2 + (gather and self.rejects))) if self.ready else None


class Noting(PumpRuntime):
    """Calls what it hands out by names, not by addresses."""

    def __init__(self, driver):
        super().__init__(driver)
        self.names, self.memory = {}, []

    def staging(self, nbytes):
        return self.named("staging", super().staging(nbytes))

    def upload(self, values, stream):
        return self.named("ids", super().upload(values, stream))

    def pinned(self, nbytes):
        return self.named("marks", torch.zeros(nbytes, dtype=torch.uint8)).numpy()

    def named(self, kind, memory):
        self.memory.append(memory)
        first = memory.data_ptr()
        self.names[first] = (len(self.memory), kind, first + max(1, memory.nbytes))
        return memory

    def name(self, value):
        for first, (number, kind, stop) in self.names.items():
            if first <= value < stop:
                return kind, number, value - first
        return value


def noted(driver, make, asks):
    """What the driver is asked to do for transfers one after another, whatever events are called."""
    driver.standing.start_notes.restype = ctypes.POINTER(ctypes.c_int64)
    runtime = Noting(driver)
    transfer = make(runtime)
    notes = driver.standing.start_notes(8)
    handles = []
    for way, what, planes in asks:
        handles.append(getattr(transfer, way)(*what, planes=planes))
        for pump in runtime.pumps:
            pump.catch_up()  # or it would note its calls among those of the next one's caller
    transfer.close()
    for handle in handles:
        for event in [handle._begin, *handle._last, *handle._sources, *(event for _, (event,) in handle._marks)]:
            pump = event._program.pump
            row = pump._rows[(event._row - 1) % len(pump._rows)]
            if pump.written - event._row < len(pump._rows):  # it is still there
                assert (row[0], row[2]) == (RECORD, event.handle), "it counts as recorded when this is carried out"
    records, calls, made = {}, [], 0
    for at in range(driver.standing.noted_so_far()):
        kind, first, *rest = notes[8 * at : 8 * at + 8]
        if kind == 1:
            records[first] = made = made + 1
        named = records.get(first, "?") if kind in (1, 2, 3) else runtime.name(first)
        calls.append((kind, named, *map(runtime.name, rest)))
    assert [handle._fault() for handle in handles] == [None] * len(handles)
    assert all(handle.measured() is not None for handle in handles)
    marks = [[stop for stop, _ in handle._marks] for handle in handles]
    return calls, marks, [records[events[0].handle] for handle in handles for _, events in handle._marks]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    data=st.data(),
    rejects=st.booleans(),
    ahead=st.sampled_from([1, 3, 64]),
    ring=st.sampled_from([0, 16]),
)
def test_all_at_once_the_driver_is_asked_for_the_same_as_step_by_step(drivers, seed, data, rejects, ahead, ring):
    driver = drivers[13000]
    driver.set()
    rng = np.random.default_rng(seed)
    case = random_case(rng, block_tokens=16)
    layout = case.layout
    most = min(4, layout.num_blocks // layout.chunk_blocks)
    slots, nbytes = random_slots(rng, layout, most)
    arena, asks = HostArena(np.zeros(nbytes, np.uint8)), []
    for _ in range(data.draw(st.integers(1, 4))):
        chunks, planes = data.draw(st.integers(1, most)), range(data.draw(st.integers(1, len(layout.planes))))
        ids, mine = random_ids(rng, layout, chunks), slots[:chunks]
        asks.append(("load", (mine, ids), planes) if data.draw(st.booleans()) else ("store", (ids, mine), planes))
    row, rows = max(plane.row_bytes for plane in layout.planes), data.draw(st.integers(1, 12))
    sizes = {"staging_bytes": 2 * 3 * rows * row, "buffers": 3, "copy_bytes": 4 * row, "group_bytes": row}

    def made(ready):
        mover = KernelMover(driver, rejects=rejects, ready=ready)
        return lambda runtime: StagedTransfer(layout, arena, runtime, mover, name="x", ahead=ahead, **sizes)

    # One direction at a time: two pumps would note their calls in any order.
    for way in ("load", "store"):
        mine = [ask for ask in asks if ask[0] == way]
        steps = noted(driver, made(ready=False), mine)
        with pytest.MonkeyPatch.context() as patch:
            if ring:  # it comes round while the driver is still at its rows
                patch.setattr("kvkernels.pump._ROWS", ring)
                driver.set(slow_us=20)
            assert noted(driver, made(ready=True), mine) == steps
        driver.set()


def test_what_rows_point_to_is_held_until_they_are_carried_out(driver):
    pump, target, source = Pump(driver, "pump", lambda: None), np.zeros(1, np.int64), np.ones(1, np.int64)
    driver.set(slow_us=100_000)
    rows = np.zeros((2, 8), np.int64)
    rows[:, 0] = COPY
    rows[:, 2:5] = target.ctypes.data, source.ctypes.data, 8
    kept = torch.zeros(1)
    gone = weakref.ref(kept)
    pump.program().extend(rows, np.zeros((0, 3), np.int64), kept)
    del kept
    assert gone() is not None
    pump.catch_up()
    pump.program().copy_each(np.array([[target.ctypes.data], [source.ctypes.data], [8]]), 77)
    pump.post()
    assert gone() is None
    pump.close()


@pytest.mark.parametrize("loading", [True, False])
def test_an_event_that_is_waited_for_is_no_other_transfers_meanwhile(driver, loading):
    """Of a transfer that is over, and whose handle nobody has any more: its place in the window is left."""
    case, ids, slots, arena = setting(15)  # of 48 pieces
    row, runtime = max(plane.row_bytes for plane in case.layout.planes), PumpRuntime(driver)
    mover = KernelMover(driver, rejects=False, ready=True)
    sizes = {"staging_bytes": 2 * 3 * row, "buffers": 3, "copy_bytes": row, "group_bytes": row, "ahead": 8}
    transfer = StagedTransfer(case.layout, arena, runtime, mover, name="x", **sizes)
    go = (lambda: transfer.load(slots, ids)) if loading else (lambda: transfer.store(ids, slots))
    go().wait()
    (pump,) = (pump for pump in runtime.pumps if pump.written)
    driver.set(slow_us=300_000)
    target, source = np.zeros(1, np.int64), np.ones(1, np.int64)
    pump.program().copy_each(np.array([[target.ctypes.data], [source.ctypes.data], [8]]), 77)
    before = pump.written
    handle = go()
    waited = [int(pump._rows[at, 2]) for at in range(before, pump.written) if pump._rows[at, 0] == WAIT]
    spare = {*runtime._spare[False], *runtime._spare[True]}
    assert not pump.carried_out(before), "none of it"
    assert len(waited) > 10
    assert not spare.intersection(waited)
    driver.set()
    handle.wait()
    transfer.close()


def test_a_pointer_that_a_kernel_would_misread_is_refused(driver):
    class Askew(PumpRuntime):
        def upload(self, values, stream):
            return torch.zeros(len(values) + 2, dtype=torch.int64)[1:]

    case, ids, slots, arena = setting(4)
    mover = KernelMover(driver, rejects=False, ready=True)
    transfer = StagedTransfer(case.layout, arena, Askew(driver), mover, name="x")
    before = driver.calls
    with pytest.raises(ValueError, match="divisible by 16"):
        transfer.load(slots, ids).wait()
    assert driver.calls == before
    assert not transfer._in.window._points, "events that nothing will record, for which a later transfer would wait"
    transfer.close()


def ends(what, within_s=5.0):
    """What it raised, if it returns at all."""
    raised = []

    def run():
        try:
            what()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(within_s)
    assert not thread.is_alive(), "it hangs"
    return raised


def no_device():
    raise RuntimeError("no device")


def test_a_pump_that_cannot_use_the_device_never_stops_who_writes(driver, monkeypatch):
    monkeypatch.setattr("kvkernels.pump._POSTS", 4)
    pump = Pump(driver, "pump", no_device)

    def write():
        for _ in range(10):
            pump.program().record(1, 1, None)
            pump.post()
            time.sleep(0.02)

    assert not ends(write)


@pytest.mark.parametrize("inline_s", [0.0, 1.0])
def test_a_thread_that_cannot_be_started_fails_the_transfer(driver, monkeypatch, inline_s):
    case, ids, slots, arena = setting(4)
    transfer = batched(PumpRuntime(driver, inline_s=inline_s), case.layout, case.tensors, arena)
    whole = threading.Thread.start

    def start(thread):
        if thread.name.startswith("cuda_batch-store"):
            raise RuntimeError("can't start new thread")
        whole(thread)

    monkeypatch.setattr(threading.Thread, "start", start)

    def twice():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="thread"):
                transfer.store(ids, slots).wait()
        transfer.close()

    assert not ends(twice)


def test_what_a_thread_that_cannot_use_the_device_leaves_is_over_with_its_handle(driver):
    """The rest of a transfer is another thread's, which has no device: no copy comes behind its end."""
    broken = threading.Event()

    def enter():
        if broken.is_set() and threading.current_thread().name == "cuda_batch-store":
            no_device()

    case, ids, slots, arena = setting(4)
    runtime = PumpRuntime(driver, inline_s=0.0, enter=enter)
    transfer = batched(runtime, case.layout, case.tensors, arena)
    for pump in runtime.pumps:  # they have their threads
        pump.program().record(driver.new_event(), 1, None)
        pump.catch_up()
    broken.set()
    handle = transfer.store(ids, slots)
    with pytest.raises(RuntimeError, match="no device"):
        handle.wait()
    assert handle.over()
    assert [pump.pending for pump in runtime.pumps] == [0, 0], "rows that the next transfer would hand over"
    before = driver.calls
    for pump in runtime.pumps:
        pump.catch_up()
    assert driver.calls == before
    transfer.close()


def test_a_step_that_is_interrupted_does_not_keep_the_transfer_open(driver, monkeypatch):
    """As where a signal's handler ends the process."""

    def gather(*_):
        raise SystemExit

    case, ids, slots, arena = setting(4)
    transfer = staged(PumpRuntime(driver), case.layout, case.tensors, arena)
    monkeypatch.setattr(TorchMover, "gather", gather)
    with pytest.raises(SystemExit):
        transfer.store(ids, slots)
    assert not ends(transfer.close)
