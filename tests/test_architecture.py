"""Tests that the project has the shape that ARCHITECTURE.md describes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import pgbackend

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pgbackend"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "tests" / "README.md"]


def _python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_floors_hold() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(
        [*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_page_names_every_module() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    for path in PACKAGE.glob("*.py"):
        assert f"`{path.name}`" in page
    for folder in ("driver", "embedded", "operating", "wrapper"):
        for path in PACKAGE.glob(f"{folder}/[!_]*.py"):
            assert f"`{path.stem}`" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_tests_that_are_named_by_their_path_exist() -> None:
    texts = [*PAGES, *PACKAGE.rglob("*.py"), *ROOT.glob("tests/**/*.py"), ROOT / ".ci" / "run"]
    named = {(path, found) for path in texts for found in _TESTS.findall(path.read_text())}
    assert not [(str(path), found) for path, found in named if not (ROOT / found).exists()]


_TESTS = re.compile(r"\btests/\w+/test_\w+\.py\b")


def test_the_reference_lists_every_option_and_public_name() -> None:
    from pgbackend import aio, driver, options

    page = (ROOT / "docs" / "settings.md").read_text()
    errors = ast.parse((PACKAGE / "driver" / "errors.py").read_text())
    classes = {node.name for node in errors.body if isinstance(node, ast.ClassDef)}
    names = {
        *options._NUMBERS,
        *options._OTHERS,
        *options._RESETS,
        *pgbackend.__all__,
        *aio.__all__,
        *classes,
    }
    assert driver.Connection.__name__ in page
    assert not {name for name in names if f"`{name}`" not in page and f".{name}" not in page}


def test_importing_the_package_imports_neither_django_nor_psycopg() -> None:
    loaded = _python("import sys, pgbackend; print(*sys.modules)").split()
    assert not {"django", "psycopg", "psycopg_pool", "greenlet", "asgiref"} & set(loaded)


def test_every_public_name_is_found_where_it_is_said_to_be() -> None:
    assert all(getattr(pgbackend, name) is not None for name in pgbackend.__all__)
    assert set(pgbackend.__all__) <= set(dir(pgbackend))
    with pytest.raises(AttributeError):
        pgbackend.no_such_name


def _annotations(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield the annotations of arguments, results and variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            yield node.annotation
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            args = node.args
            given = [*args.args, *args.kwonlyargs, args.vararg, args.kwarg]
            found = [each.annotation for each in given if each is not None]
            yield from filter(None, [*found, node.returns])


def test_few_annotations_of_the_engine_are_a_bare_any() -> None:
    rooms = {PACKAGE / name for name in ("embedded", "fast", "gis")}
    paths = [path for path in PACKAGE.rglob("*.py") if not rooms & set(path.parents)]
    found = [each for path in paths for each in _annotations(ast.parse(path.read_text()))]
    bare = [each for each in found if isinstance(each, ast.Name) and each.id == "Any"]
    assert len(found) > 2000
    assert len(bare) <= 0.08 * len(found)


def test_no_file_of_the_package_is_longer_than_600_lines() -> None:
    lines = {
        path.relative_to(PACKAGE): len(path.read_text().splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {path: count for path, count in lines.items() if count > 600} == {}


def test_the_launcher_needs_the_standard_library_only() -> None:
    names = set()
    for path in PACKAGE.glob("embedded/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level != 1:
                names.add(node.module or ".")
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_each_of_djangos_async_unsafe_methods_is_guarded_anew() -> None:
    """A new version of Django may guard another method: guards.py must then guard it too."""
    tree = ast.parse((PACKAGE / "wrapper" / "guards.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    guarded = [
        ast.literal_eval(call.args[0])
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "guarded"
    ]
    assert sorted(guarded) == _python(_LIST_UNSAFE).split()


# In a process of its own: pytest-django puts a method of its own on the class.
_LIST_UNSAFE = """
from inspect import getattr_static
from django.db.backends.postgresql.base import DatabaseWrapper
from django.utils import asyncio

for name in sorted(dir(DatabaseWrapper)):
    code = getattr(getattr_static(DatabaseWrapper, name), "__code__", None)
    if code is not None and code.co_filename == asyncio.__file__:
        print(name)
"""


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    # Without isolation: hatchling is in the environment, so nothing is fetched.
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", tmp_path, ROOT], capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pgbackend"}
    assert "pgbackend/py.typed" in names
    for kind in ("html", "css", "js"):
        assert any(name.endswith(f"/connections.{kind}") for name in names)
    assert "pgbackend/migrations/0001_initial.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


#: Directories and files that tools make here, and that are not the project's.
_MADE = re.compile(
    r"/(\.git|\.venv[^/]*|\.nox|\.pgbackend|[^/]*_cache|__pycache__|var|build|dist)(/|$)"
)
_BINARY = (".png", ".webp", ".jpg", ".ico", ".woff2", ".pyc")
_HOMES = "root|home|work|Users"
_ELSEWHERE = re.compile(
    rf"(?<![\w.$}}-])/({_HOMES})/|py" r"pi\.org|python" r"hosted|npm" r"js\.|deb\.deb" r"ian"
)


def test_no_file_names_a_place_on_a_machine_or_a_registry() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in ROOT.rglob("*")
        if path.is_file()
        and path.suffix not in _BINARY
        and not _MADE.search(str(path)[len(str(ROOT)) :])
        for match in _ELSEWHERE.finditer(path.read_text(errors="replace"))
    ]
    assert not found


def test_the_contract_names_tests_that_exist_and_leaves_no_file_out() -> None:
    page = (ROOT / "docs/contract.md").read_text()
    files = {path.name: path.read_text() for path in (ROOT / "tests/contract").glob("test_*.py")}
    clauses = page.split("\n## ")[1:]
    assert [clause.split()[0] for clause in clauses] == [f"C{n}" for n in range(1, 20)]
    linked = set()
    for clause in clauses:
        here = re.findall(r"\[(test_c\d\d_\w+\.py)\]\(../tests/contract/\1\)", clause)
        linked |= set(here)
        named = re.findall(r"`(test_\w+)`", clause)
        assert here and named, clause
        source = "".join(files[name] for name in here)
        assert not [name for name in named if f"def {name}(" not in source]
    assert linked == set(files)
