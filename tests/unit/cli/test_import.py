"""`import kvsim` is light, and what is slow to load is loaded when it is used."""

import importlib
import json
import os
import subprocess
import sys

import kvsim

HEAVY = ("numba", "simpy", "typer", "rich", "plotly", "numpy", "msgspec")


def fresh(code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(printed.stdout)


def test_import_is_fast_and_loads_nothing_heavy():
    code = (
        "import json, sys, time; t = time.perf_counter(); import kvsim; t = time.perf_counter() - t; "
        f"print(json.dumps([t, [m for m in {HEAVY!r} if m in sys.modules]]))"
    )
    runs = [fresh(code) for _ in range(3)]
    assert min(seconds for seconds, _ in runs) <= 0.3
    assert runs[0][1] == []


def test_commands_load_neither_simpy_nor_plotly_for_help():
    code = (
        "import json, sys; sys.stdout.write(''); import kvsim.cli; "
        "print(json.dumps([m for m in ('numba', 'numpy', 'simpy', 'plotly') if m in sys.modules]))"
    )
    assert fresh(code) == []


def test_every_public_name_is_there():
    for name in kvsim.__all__:
        assert getattr(kvsim, name) is not None
        assert name in dir(kvsim)
    assert kvsim.sweep.lru_curve


def test_a_function_is_not_hidden_by_the_module_it_lives_in():
    for module in ("api", "calibration.measure", "runner", "tuner.run", "validation"):
        importlib.import_module(f"kvsim.{module}")
    for name in ("calibrate", "run", "simulate", "tune", "validate"):
        assert callable(getattr(kvsim, name))
