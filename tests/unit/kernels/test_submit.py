"""Handing transfers over by a thread: order, failures, and what a waiting thread sees."""

import threading
import time

import pytest

from kvkernels.submit import InlineSubmitter, ThreadSubmitter, Window, Work


class Point:
    def __init__(self, reached=False):
        self.flag = threading.Event()
        if reached:
            self.flag.set()

    def query(self):
        return self.flag.is_set()

    def synchronize(self):
        self.flag.wait()


def threaded(**options):
    return ThreadSubmitter("submit", lambda: None, **options)


def steps_of(log, name, count, point=None):
    for number in range(count):
        yield point
        log.append((name, number, threading.current_thread() is threading.main_thread()))


def unexpected(error):
    raise AssertionError(error)


@pytest.mark.parametrize("make", [InlineSubmitter, threaded])
def test_works_run_to_their_end_in_order(make):
    submitter, log = make(), []
    for name in "abc":
        submitter.submit(Work(steps_of(log, name, 50), unexpected))
    submitter.until(lambda: len(log) == 150)
    assert [entry[:2] for entry in log] == [(name, number) for name in "abc" for number in range(50)]
    submitter.close()


def test_the_first_steps_are_the_callers_and_the_rest_the_threads():
    submitter, log = threaded(inline_s=0.02), []

    def slow():
        for _ in range(20):
            yield None
            log.append(threading.current_thread() is threading.main_thread())
            time.sleep(0.005)

    began = time.perf_counter()
    submitter.submit(Work(slow(), unexpected))
    assert time.perf_counter() - began < 0.08
    assert log
    assert all(log)
    submitter.close()
    assert len(log) == 20
    assert log == sorted(log, reverse=True)
    assert not log[-1]


def test_a_short_work_needs_no_thread():
    submitter, log = threaded(inline_s=10), []
    submitter.submit(Work(steps_of(log, "a", 3), unexpected))
    assert log == [("a", number, True) for number in range(3)]


def test_a_step_waits_for_the_point_that_it_names_and_the_caller_does_not():
    submitter, log, point = threaded(inline_s=10), [], Point()
    submitter.submit(Work(steps_of(log, "a", 2, point), unexpected))
    submitter.submit(Work(steps_of(log, "b", 1), unexpected))
    time.sleep(0.02)
    assert log == []
    point.flag.set()
    submitter.close()
    assert [entry[:2] for entry in log] == [("a", 0), ("a", 1), ("b", 0)]


@pytest.mark.parametrize("make", [InlineSubmitter, threaded])
@pytest.mark.parametrize("good", [0, 1, 300])
def test_a_failing_step_ends_its_work_only(make, good):
    submitter, log, told = make(), [], []

    def failing():
        yield from steps_of(log, "a", good)
        raise ValueError("no")

    submitter.submit(Work(failing(), told.append))
    submitter.submit(Work(steps_of(log, "b", 2), unexpected))
    submitter.close()
    assert [str(error) for error in told] == ["no"]
    assert len(log) == good + 2


def test_a_thread_that_cannot_use_the_device_fails_every_work():
    def enter():
        raise RuntimeError("no device")

    submitter, told = ThreadSubmitter("submit", enter, inline_s=0), []
    for _ in range(2):
        submitter.submit(Work(steps_of([], "a", 5), told.append))
    submitter.until(lambda: len(told) == 2)
    assert [str(error) for error in told] == ["no device"] * 2
    submitter.close()


def test_closing_waits_for_everything_and_another_thread_starts_later():
    submitter, log = threaded(inline_s=0), []
    for turn in range(3):
        submitter.submit(Work(steps_of(log, turn, 400), unexpected))
        submitter.close()
        assert len(log) == 400 * (turn + 1)
    assert not [one for one in threading.enumerate() if one.name == "submit"]


def test_many_threads_submit():
    submitter, log = threaded(inline_s=0.0001), []
    threads = [
        threading.Thread(target=lambda n=n: submitter.submit(Work(steps_of(log, n, 100), unexpected))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    submitter.close()
    assert sorted(entry[:2] for entry in log) == [(name, number) for name in range(8) for number in range(100)]
    for name in range(8):
        assert [number for who, number, _ in log if who == name] == list(range(100))


def test_a_full_window_waits_for_its_older_half():
    window, points = Window(4), [Point() for _ in range(7)]
    for point in points[:4]:
        assert window.full() is None
        window.add(point)
    assert window.full() is points[1]
    window.add(points[4])
    assert window.full() is None
    window.add(points[5])
    assert window.full() is points[3]
    single = Window(1)
    single.add(points[0])
    assert single.full() is points[0]
    assert single.full() is None
