"""Tests what the matrix chooses, installs, keeps and shows; the cells run by themselves."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from . import environments, page
from .cells import PYTHONS, SERVERS, Cell, all_cells, covering, named, supported
from .interpreters import RELEASES, ROOT, CannotMake, Interpreter, interpreter
from .journal import Entry, Journal, code
from .running import read_report
from .servers import PACKS

CELL = Cell("3.12", "6.0", "16", "asyncio")


def entry(**changes: object) -> Entry:
    usual = Entry(
        CELL.name, "tests", passed=True, outcome="3 passed", day="2026-01-02", code=code(),
        versions={"Python": "3.12.9", "Django": "6.0.1", "PostgreSQL": "16.2"},
    )  # fmt: skip
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


def test_the_cells_cover_each_pair_that_is_supported_with_few_runs() -> None:
    chosen = covering()
    wanted = {
        ((one, a), (other, b))
        for django, pythons in PYTHONS.items()
        for one, first, other, second in (
            ("python", pythons, "django", [django]),
            ("django", [django], "postgresql", SERVERS[django]),
            ("python", pythons, "postgresql", SERVERS[django]),
            ("python", pythons, "loop", ["asyncio", "uvloop"]),
            ("postgresql", SERVERS[django], "loop", ["asyncio", "uvloop"]),
        )
        for a in first
        for b in second
    }
    assert wanted <= {pair for cell in chosen for pair in cell.pairs()}
    assert set(chosen) <= set(supported())
    pythons_with_servers = {(cell.python, cell.postgresql) for cell in supported()}
    assert len(chosen) <= len(pythons_with_servers) + 2
    uvloops = [cell for cell in chosen if cell.loop == "uvloop"]
    assert abs(len(chosen) - 2 * len(uvloops)) <= 2


def test_no_pair_is_covered_that_django_does_not_support() -> None:
    pairs = {(cell.python, cell.django) for cell in all_cells()}
    assert ("3.11", "6.1") not in pairs
    assert ("3.15", "5.2") not in pairs
    assert not [cell for cell in all_cells() if (cell.django, cell.postgresql) == ("6.1", "14")]


def test_a_cell_is_named_and_an_unknown_one_is_refused() -> None:
    assert [(cell.python, cell.django) for cell in named(["3.12-5.2-14"])] == [("3.12", "5.2")]
    assert named([]) == all_cells()
    with pytest.raises(ValueError, match="no cell is named 3.11-6.1-18"):
        named(["oldest", "3.11-6.1-18"])


def test_each_version_has_a_source_and_nox_knows_the_same_pairs() -> None:
    assert set(PACKS) == {server for servers in SERVERS.values() for server in servers}
    assert set(RELEASES) <= {python for pythons in PYTHONS.values() for python in pythons}
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    versions = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VERSIONS"
    )
    assert versions == PYTHONS


def test_the_oldest_cell_has_each_dependency_at_its_floor() -> None:
    pins = environments.floors()
    text = (ROOT / "pyproject.toml").read_text()
    for pin in pins:
        name, _, version = pin.partition("==")
        plain = name.removesuffix("-binary")
        assert re.search(rf'"{plain}(\[.*\])?>={re.escape(version)}[,"]', text), pin
    assert {"Django", "psycopg", "psycopg-binary", "psycopg-pool", "greenlet", "asgiref"} == {
        pin.partition("==")[0] for pin in pins
    }
    (oldest,) = named(["oldest"])
    assert environments.installations(oldest)[-1] == ["--no-deps", *pins]


def test_a_python_that_cannot_be_had_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(CannotMake, match="there is no Python 3.4: install it"):
        interpreter("3.4", tmp_path)
    here = Interpreter("python3")
    assert here.command("a", Path("b")) == ["a", "b"]
    inside = Interpreter("python3", tmp_path / "root", tmp_path)
    assert inside.command("a", "b c")[-2:] == ["a", "b c"]


def test_a_step_runs_again_unless_it_passed_with_this_code_and_as_many_tests(
    tmp_path: Path,
) -> None:
    def has_passed(kept: Entry, *, quick: bool = True) -> bool:
        Journal(tmp_path / "journal.json").add(kept)
        return Journal(tmp_path / "journal.json").has_passed(CELL, "tests", quick=quick)

    assert has_passed(entry())
    assert has_passed(entry(), quick=False)
    assert not has_passed(entry(code="another"))
    assert not has_passed(entry(passed=False))
    assert has_passed(entry(quick=True))
    assert not has_passed(entry(quick=True), quick=False)
    assert not Journal(tmp_path / "none.json").has_passed(CELL, "tests", quick=True)


def test_the_report_of_pytest_is_counted_with_the_reasons_of_skips(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite><testcase/><testcase/><testcase><failure/></testcase>"
        "<testcase><error/></testcase>"
        "<testcase><skipped message='no PgBouncer'/></testcase></testsuite></testsuites>"
    )
    assert read_report(report) == (
        "2 passed, 1 failed, 1 errors, 1 skipped",
        {"no PgBouncer": 1},
    )


def test_the_table_shows_each_cell_and_the_text_around_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "versions.md")
    page.PAGE.write_text(f"# Versions\n\n{page.BEGIN}\nold\n{page.END}\nbelow\n")
    journal = Journal(tmp_path / "journal.json")
    (other,) = (cell for cell in covering() if cell.name == CELL.name)
    journal.add(entry(quick=True, loop=other.loop))
    journal.add(entry(cell="oldest", passed=False, outcome="1 failed"))
    journal.add(entry(cell="next", passed=False, outcome="none yet", versions={}))
    assert "3.13-6.1-18" not in {cell.name for cell in all_cells()}
    journal.add(entry(cell="3.13-6.1-18", loop="uvloop"))  # it was named
    for _ in range(2):
        page.write(journal)
    text = page.PAGE.read_text()
    assert text.startswith("# Versions\n")
    assert text.endswith(f"{page.END}\nbelow\n")
    assert "old\n" not in text
    assert (
        f"| `{CELL.name}` | 3.12.9 | 6.0.1 | 16.2 | {other.loop} | 3 passed (the quick ones) "
        "| not run yet | 2026-01-02 |\n" in text
    )
    assert "| `oldest` | 3.12.9 | 6.0.1 | 16.2 | asyncio | **no**: 1 failed | not run yet |" in text
    assert "| `next` | (3.14) | (6.1) | (18) | asyncio | not run: none yet | not run yet |" in text
    assert "| `3.13-6.1-18` | 3.12.9 | 6.0.1 | 16.2 | uvloop |" in text
    assert text.count("\n| `") == len(all_cells()) + 1
    page.PAGE.write_text("# Versions\n")
    with pytest.raises(ValueError, match="has no place for the table"):
        page.write(journal)


def test_the_page_shows_what_the_journal_has() -> None:
    assert page.table(Journal()) in page.PAGE.read_text()
