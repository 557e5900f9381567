"""Tests how the outcomes of packages' own tests are read, compared and told."""

from __future__ import annotations

from pathlib import Path

from tests.packages.suites import results
from tests.packages.suites.run import outcomes
from tests.packages.suites.table import Difference, Package

PACKAGE = Package(
    "thing", "1.0", differences=(Difference("t.A.*", ("green",), "skipped", "knows the name"),)
)


def _found(stock: str, green: str) -> dict[str, dict[str, str]]:
    return {"stock": {"t.A.a": stock}, "sync": {"t.A.a": stock}, "green": {"t.A.a": green}}


def test_a_report_of_pytest_gives_each_test_one_outcome(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    cases = ["a'/>", "b'><failure/></testcase>", "c'><skipped/></testcase>"]
    cases += ["d'><failure/></testcase>", "d'><error/></testcase>"]
    body = "".join(f"<testcase classname='t.A' name='{case}" for case in cases)
    report.write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
    assert outcomes(report) == {
        "t.A.a": "passed",
        "t.A.b": "failure",
        "t.A.c": "skipped",
        "t.A.d": "error",
    }


def test_a_difference_with_a_reason_is_good_and_one_without_is_not() -> None:
    known = results.compare(PACKAGE, _found("passed", "skipped"))
    unknown = results.compare(PACKAGE, _found("passed", "failure"))
    assert [item["reason"] for item in known["different"]] == ["knows the name"]
    assert [item["reason"] for item in unknown["different"]] == [None]
    assert (results.is_good(known), results.is_good(unknown)) == (True, False)
    assert results.verdict(PACKAGE, known) == "**runs**"
    assert results.verdict(PACKAGE, unknown).startswith("**open**")


def test_a_test_that_is_not_run_here_differs() -> None:
    found = {**_found("passed", "passed"), "sync": {}}
    assert [item["here"] for item in results.compare(PACKAGE, found)["different"]] == ["not run"]


def test_stock_that_passes_nothing_is_not_good() -> None:
    assert not results.is_good(results.compare(PACKAGE, _found("error", "error")))


def test_the_page_has_the_table_of_the_kept_results() -> None:
    assert results.table(results._all()) in results.PAGE.read_text()
