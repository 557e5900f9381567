"""Declares the checks, and the versions to check with: ``nox -l`` is the menu."""

from __future__ import annotations

import sys

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "types", "imports", "tests"]
nox.options.error_on_missing_interpreters = False

#: Each Django with the Pythons that it supports.
VERSIONS = {
    "5.2": ("3.11", "3.12", "3.13", "3.14"),
    "6.0": ("3.12", "3.13", "3.14"),
    "6.1": ("3.12", "3.13", "3.14", "3.15"),
}
MATRIX = [(python, django) for django, pythons in VERSIONS.items() for python in pythons]


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and spelling."""
    _install(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("codespell")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly in the driver."""
    _install(session, "lint")
    session.run("mypy", *session.posargs)


@nox.session
def imports(session: nox.Session) -> None:
    """Check the floors of ARCHITECTURE.md."""
    _install(session, "lint")
    session.run("lint-imports")


@nox.session
@nox.parametrize("python,django", MATRIX)
def tests(session: nox.Session, django: str) -> None:
    """Run the tests; arguments after ``--`` are pytest's."""
    _install(session, "test", f"Django=={django}.*")
    session.run("pytest", *session.posargs)


@nox.session
@nox.parametrize("python,django", MATRIX)
def suite(session: nox.Session, django: str) -> None:
    """Run Django's own tests; arguments after ``--`` are those of ``python -m tests.suite``."""
    _install(session, "suite", f"Django=={django}.*")
    session.run("python", "-m", "tests.suite", *session.posargs)


@nox.session(venv_backend="none")
def matrix(session: nox.Session) -> None:
    """Run the cells of docs/versions.md; arguments after ``--`` are those of ``tests.matrix``."""
    session.run(sys.executable, "-m", "tests.matrix", *session.posargs)


@nox.session
def packages(session: nox.Session) -> None:
    """Run packages' own tests; arguments are those of ``python -m tests.packages.suites``."""
    _install(session, "test")
    session.run("python", "-m", "tests.packages.suites", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Serve the order desk."""
    _install(session, "demo")
    session.run("python", "-m", "proj")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure beside the peers, and write docs/benchmarks.md if no arguments come after ``--``."""
    _install(session, "demo")
    session.run("python", "-m", "benchmarks.web", *session.posargs)
    if not session.posargs:
        session.run("python", "-m", "benchmarks.web.report")


def _install(session: nox.Session, group: str, *packages: str) -> None:
    if session.venv_backend != "uv":
        session.install("pip>=25.1")  # the first release that knows dependency groups
    session.install("--editable", ".", "--group", group, *packages)
