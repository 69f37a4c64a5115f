"""The project's checks. `nox` runs what CI runs; `nox -l` lists the rest."""

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "types", "imports", "tests", "model"]


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
    session.install("-e", ".[live,report]", *groups("types", "tests"))
    session.run("mypy")


@nox.session
def imports(session: nox.Session) -> None:
    """The rooms of ARCHITECTURE.md, held by import-linter."""
    session.install("-e", ".[live]", *groups("imports"))
    session.run("lint-imports")


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that needs neither a GPU nor vLLM, but for the long state machines."""
    session.install("-e", ".[live,report]", *groups("tests"))
    session.run("pytest", "tests/unit", "tests/golden", "tests/agreement", *session.posargs)


@nox.session
def model(session: nox.Session) -> None:
    """Hypothesis state machines of the core against a naive model."""
    session.install("-e", ".[live,report]", *groups("tests"))
    session.run("pytest", "tests/model", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Every benchmark that this machine can run; figures go to benchmarks/results/."""
    session.install("-e", ".[live,report]", *groups("tests"))
    session.run("python", "benchmarks/run.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Run every example and the commands of README."""
    session.install("-e", ".[live,report]", *groups("tests"))
    session.run("pytest", "tests/docs", *session.posargs)
