"""The driver binding against a stand-in for libcuda, built from C with the real functions' signatures."""

import shutil
import subprocess
import sys
import textwrap

import pytest

compiler = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(compiler is None, reason="no C compiler")

# Types and signatures as in cuda.h of CUDA 12.8 and 13.0.
STAND_IN = r"""
#include <string.h>
#include <stdint.h>
#include <stdlib.h>
typedef int CUresult; typedef unsigned long long CUdeviceptr; typedef struct CUstream_st *CUstream;
typedef struct { int type; int id; } CUmemLocation;
typedef struct { int srcAccessOrder; CUmemLocation srcLocHint, dstLocHint; unsigned int flags; } CUmemcpyAttributes;
static int calls;
static struct { uintptr_t start; size_t n; } slices[8];
/* The real driver refuses a copy that begins in one registered range and ends beyond it. */
static int crosses(CUdeviceptr p, size_t n) {
    for (int i = 0; i < 8; i++) {
        uintptr_t end = slices[i].start + slices[i].n;
        if (p >= slices[i].start && p < end && p + n > end) return 1;
    }
    return 0;
}
CUresult cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t n, CUstream s) {
    if (s != (CUstream)77) return 400;
    if (crosses(dst, n) || crosses(src, n)) return 1;
    memcpy((void *)dst, (void *)src, n); calls++; return 0;
}
static CUresult copies(CUdeviceptr *d, CUdeviceptr *s, size_t *n, size_t count, CUmemcpyAttributes *a, size_t *ai,
                       size_t na, CUstream stream) {
    if (stream != (CUstream)77 || na != 1 || ai[0] != 0 || a->srcAccessOrder != 1 || a->flags != 1) return 1;
    for (size_t i = 0; i < count; i++) if (crosses(d[i], n[i]) || crosses(s[i], n[i])) return 1;
    for (size_t i = 0; i < count; i++) memcpy((void *)d[i], (void *)s[i], n[i]);
    calls += 1000; return 0;
}
static CUresult copies_v1(CUdeviceptr *d, CUdeviceptr *s, size_t *n, size_t count, CUmemcpyAttributes *a, size_t *ai,
                          size_t na, size_t *fail, CUstream stream) {
    *fail = ~(size_t)0;
    return copies(d, s, n, count, a, ai, na, stream);
}
CUresult cuGetProcAddress_v2(const char *symbol, void **pfn, int version, uint64_t flags, int *status) {
    int newest = atoi(getenv("STAND_IN_CUDA"));
    *pfn = 0; *status = 1;
    if (version > newest) return 1;
    if (strcmp(symbol, "cuMemcpyBatchAsync") || newest < 12080) return 0;
    *pfn = version >= 13000 ? (void *)copies : (void *)copies_v1; *status = 0; return 0;
}
CUresult cuMemHostRegister_v2(void *p, size_t n, unsigned flags) {
    for (int i = 0; i < 8 && flags == 1 && n; i++)
        if (!slices[i].n) { slices[i].start = (uintptr_t)p; slices[i].n = n; return 0; }
    return 1;
}
struct event { CUstream stream; int recorded, queries, timed; };
static int events, ordered, no_context;
CUresult cuEventCreate(struct event **e, unsigned flags) {
    if (flags != 3 && flags != 1) return 1;
    *e = calloc(1, sizeof **e); (*e)->timed = flags == 1; events++; return 0;
}
CUresult cuEventElapsedTime(float *ms, struct event *a, struct event *b) {
    if (no_context) return 201;
    if (!a->timed || !b->timed) return 400;
    *ms = 12.5f; return 0;
}
CUresult cuEventRecord(struct event *e, CUstream s) { e->stream = s; e->recorded = 1; return 0; }
CUresult cuEventQuery(struct event *e) {
    if (no_context) return 201;
    return e->recorded ? (e->queries++ ? 0 : 600) : 1; /* reached when asked for the second time */
}
CUresult cuStreamSynchronize(void *stream) { return stream == (void *)77 ? 0 : 400; }
CUresult cuEventSynchronize(struct event *e) { return no_context ? 201 : e->recorded ? 0 : 1; }
CUresult cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream s, void **arguments, void **extra) {
    if (f != (void *)5 || gy != 1 || gz != 1 || by != 1 || bz != 1 || extra) return 1;
    *(uint64_t *)*(uint64_t **)arguments[0] = gx * bx + shared + *(int32_t *)arguments[1]; return 0;
}
CUresult cuStreamWaitEvent(CUstream s, struct event *e, unsigned flags) {
    if (flags || s == e->stream) return 1;
    ordered++; return 0;
}
int stand_in_events(void) { return events; }
int stand_in_ordered(void) { return ordered; }
void stand_in_context(int missing) { no_context = missing; }
static int capture_mode;
CUresult cuThreadExchangeStreamCaptureMode(int *mode) {
    int before = capture_mode; capture_mode = *mode; *mode = before; return 0;
}
int stand_in_capture_mode(void) { return capture_mode; }
CUresult cuMemHostUnregister(void *p) { return 713; }
CUresult cuGetErrorName(CUresult e, const char **name) {
    *name = e == 713 ? "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED" : "CUDA_ERROR_INVALID_VALUE"; return 0;
}
int stand_in_calls(void) { return calls; }
"""

SCRIPT = """
import ctypes, sys
sys.modules["cuda.bindings"] = None  # the stand-in is no full driver; look functions up without cuda-python
import numpy as np
from kvkernels.cuda_driver import cuda_driver
from kvkernels.errors import DeviceError

driver = cuda_driver()
source, target = np.arange(256, dtype=np.uint8), np.zeros(256, np.uint8)
starts, lengths = np.array([0, 100, 7]), np.array([5, 50, 3])
offsets = np.array([200, 20, 0])
wanted = target.copy()
for start, offset, length in zip(starts, offsets, lengths):
    wanted[offset : offset + length] = source[start : start + length]
where = np.array((target.ctypes.data + offsets, source.ctypes.data + starts, lengths))
driver.copy_each(where, 77)
assert (target == wanted).all()
target[:] = 0
if driver.batch is not None:
    driver.copy_batch(where, 77)
    assert (target == wanted).all()
    try:
        driver.copy_batch(where, 1)
        raise SystemExit("an error code was not raised")
    except DeviceError as error:
        assert "cuMemcpyBatchAsync: CUDA_ERROR_INVALID_VALUE (1)" in str(error)
driver.register(source.ctypes.data, 100)
driver.register(source.ctypes.data + 100, 156)
across = np.array([[target.ctypes.data], [source.ctypes.data + 90], [20]])
for copy in [driver.copy_each] + [driver.copy_batch] * (driver.batch is not None):
    try:
        copy(across, 77)
        raise SystemExit("a copy across two registered ranges was not refused")
    except DeviceError as error:
        assert "CUDA_ERROR_INVALID_VALUE (1)" in str(error)
event = driver.new_event()
driver.record(event, 77)
assert [driver.reached(event), driver.reached(event), driver.wait(event)] == [False, True, True]
driver.order(78, event)
stand_in = ctypes.CDLL("libcuda.so.1")
assert (stand_in.stand_in_events(), stand_in.stand_in_ordered()) == (1, 1)
try:
    driver.order(77, event)
    raise SystemExit("an error code was not raised")
except DeviceError as error:
    assert "cuStreamWaitEvent" in str(error)
stand_in.stand_in_context(1)
assert [driver.reached(event), driver.wait(event)] == [None, None]
stand_in.stand_in_context(0)
from types import SimpleNamespace
from kvkernels.compiled import CompiledKernel
said = np.zeros(2, np.uint64)
where = said.ctypes.data + -said.ctypes.data % 16
metadata = SimpleNamespace(num_warps=2, shared=1000)
kernel = CompiledKernel(SimpleNamespace(function=5, metadata=metadata))
stream = SimpleNamespace(launch_compiled=lambda f, n, t, s, a: driver.launch(f, n, t, s, 77, a))
kernel.launch(stream, 3, [where], [-7])
assert 3 * 64 + 1000 - 7 in said
try:
    kernel.launch(stream, 3, [where + 8], [-7])
    raise SystemExit("a pointer that the code would misread was not refused")
except ValueError as error:
    assert "divisible by 16" in str(error)
from kvkernels.cuda_streams import CudaStream, _Writing
entered, spare, timed = [], [event], []
where = SimpleNamespace(cuda_stream=77)
enter = lambda: entered.append(stand_in.stand_in_context(0))
options = {"batched": True, "enter_thread": enter, "writing": _Writing()}
stream = CudaStream(where, driver, spare=(spare, timed), **options)
first, second = stream.record(), stream.record()
assert (first.handle, spare, stand_in.stand_in_events()) == (event, [], 2)
stand_in.stand_in_context(1)
assert second.query() is False and len(entered) == 1 and second.query() is True
stand_in.stand_in_context(1)
first.synchronize()
assert len(entered) == 2
other = CudaStream(SimpleNamespace(cuda_stream=78), driver, spare=([], []), **options)
stream.synchronize()
try:
    other.synchronize()
    raise SystemExit("an error code was not raised")
except DeviceError as error:
    assert "cuStreamSynchronize" in str(error)
other.wait(first)
assert stand_in.stand_in_ordered() == 2
del first
assert spare == [event] and stream.record().handle == event
begin, end = stream.record(timed=True), stream.record(timed=True)
stand_in.stand_in_context(1)
assert end.since(begin) == 0.0125 and len(entered) == 3
try:
    end.since(second)
    raise SystemExit("a time since an event without timing")
except DeviceError as error:
    assert "cuEventElapsedTime" in str(error)
handle = begin.handle
del begin
assert timed == [handle] and handle not in spare
for _ in range(2):
    try:
        with driver.capture_relaxed():
            assert stand_in.stand_in_capture_mode() == 2
            raise KeyError
    except KeyError:
        assert stand_in.stand_in_capture_mode() == 0
driver.relax_capture()
with driver.capture_relaxed():
    pass
assert ctypes.CDLL("libcuda.so.1").stand_in_capture_mode() == 2
try:
    driver.unregister(source.ctypes.data)
    raise SystemExit("an error code was not raised")
except DeviceError as error:
    assert "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED" in str(error)
print(driver.batch is not None, ctypes.CDLL("libcuda.so.1").stand_in_calls())
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("libcuda")
    (folder / "cuda.c").write_text(STAND_IN)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "cuda.c"],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.mark.parametrize(
    ("newest", "says"), [(13000, "True 1003"), (12090, "True 1003"), (12060, "False 3")], ids=["13.0", "12.9", "12.6"]
)
def test_copies_and_errors(library, newest, says):
    environment = {"LD_LIBRARY_PATH": str(library), "STAND_IN_CUDA": str(newest), "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == says


def test_a_machine_without_cuda_is_told():
    script = "from kvkernels.cuda_driver import cuda_driver; cuda_driver()"
    environment = {"LD_LIBRARY_PATH": "/nonexistent", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        pytest.skip("this machine has libcuda")
    assert "DeviceError: libcuda.so.1" in run.stderr
