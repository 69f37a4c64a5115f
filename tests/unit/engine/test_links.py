import pytest
import simpy

from kvsim.engine.links import Link
from kvsim.profiles import TransferCurve


@pytest.fixture
def send():
    def send(copies, *, rates=(100.0, 50.0), duplex=1.0, latency=0.0):
        env = simpy.Environment()
        curves = tuple(
            TransferCurve(sizes=(1000,), bytes_per_s=(1 / (latency / 1000 + 1 / rate),), latency_s=latency)
            for rate in rates
        )
        link = Link(env, curves, duplex)
        ends = {}

        def one(name, at, direction, size):
            yield env.timeout(at)
            link.send(direction, size, lambda: ends.__setitem__(name, env.now))

        for name, (at, direction, size) in enumerate(copies):
            env.process(one(name, at, direction, size))
        env.run()
        return [ends[name] for name in range(len(copies))], link

    return send


def test_copies_of_one_direction_queue(send):
    ends, link = send([(0, 0, 100), (0, 0, 200), (5, 0, 100)])
    assert ends == pytest.approx([1, 3, 6])
    assert link.busy_s[0] == pytest.approx(4)
    assert link.bytes == [400, 0]
    assert link.queued_bytes == [0, 0]


def test_latency_is_paid_by_each_copy(send):
    ends, _ = send([(0, 0, 100), (0, 0, 100)], latency=0.5)
    assert ends == pytest.approx([1.5, 3.0])


def test_directions_do_not_wait_for_each_other_but_slow_each_other(send):
    assert send([(0, 0, 100), (0, 1, 50)])[0] == pytest.approx([1, 1])
    ends, link = send([(0, 0, 100), (0, 1, 100)], duplex=0.8)
    assert ends[0] == pytest.approx(1.25)
    assert ends[1] == pytest.approx(1.25 + (2 - 0.8 * 1.25))
    assert link.busy_s[1] == pytest.approx(ends[1])


def test_a_copy_that_comes_in_between_slows_the_rest_only(send):
    ends, _ = send([(0, 0, 100), (0.5, 1, 100)], duplex=0.5)
    assert ends[0] == pytest.approx(1.5)
    assert ends[1] == pytest.approx(0.5 + 1.0 + 1.5)


def test_half_duplex_conserves_bandwidth(send):
    ends, _ = send([(0, 0, 100), (0, 1, 100)], rates=(100.0, 100.0), duplex=0.5)
    assert ends == pytest.approx([2, 2])


def test_nothing_takes_no_time_and_ends_within_the_call():
    env = simpy.Environment()
    curve = TransferCurve(sizes=(1,), bytes_per_s=(1.0,))
    link = Link(env, (curve, curve), 1.0)
    done = []
    link.send(0, 0, lambda: done.append("done"), lambda: done.append("started"))
    assert done == ["started", "done"]


@pytest.mark.timeout(30)
def test_copies_end_however_long_the_clock_has_run(send):
    copies = [(i * 0.37, i % 2, 13 + i) for i in range(200)]
    soon = send(copies, duplex=0.6)[0]
    late = send([(at + 1e7, *copy) for at, *copy in copies], duplex=0.6)[0]
    assert [end - 1e7 for end in late] == pytest.approx(soon, abs=1e-6)
