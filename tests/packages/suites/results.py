"""Compares the outcomes of a package's tests, keeps the result, and writes docs/packages.md."""

from __future__ import annotations

import datetime
import json
import platform
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import django

from tests.packages.suites.table import PACKAGES, Package

KEPT = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[3] / "docs" / "packages.md"
START, END = "<!-- own suites -->\n", "<!-- end of own suites -->"


class Different(TypedDict):
    """Is one test whose outcome differs from stock's; `reason` is None if it is not known."""

    test: str
    context: str
    stock: str
    here: str
    reason: str | None


class Result(TypedDict):
    """Is what a package's tests did in the contexts; `versions` says with which versions."""

    versions: dict[str, str]
    date: str
    counts: dict[str, dict[str, int]]
    failed_on_stock: list[str]
    different: list[Different]


def versions_of(package: Package) -> dict[str, str]:
    return {
        "package": package.version,
        "Python": platform.python_version(),
        "Django": django.__version__,
    }


def compare(package: Package, found: dict[str, dict[str, str]]) -> Result:
    """Return the result: how many tests have which outcome, and which differ from stock's."""
    stock = found["stock"]
    different: list[Different] = []
    for context in found.keys() - {"stock"}:
        for test in stock.keys() | found[context].keys():
            theirs, ours = stock.get(test, "not run"), found[context].get(test, "not run")
            if theirs != ours:
                reason = package.reason(test, context, ours)
                different.append(
                    Different(test=test, context=context, stock=theirs, here=ours, reason=reason)
                )
    return Result(
        versions=versions_of(package),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        counts={context: dict(Counter(tests.values())) for context, tests in found.items()},
        failed_on_stock=sorted(t for t, kind in stock.items() if kind in ("failure", "error")),
        different=sorted(different, key=lambda d: (d["context"], d["test"])),
    )


def report(package: Package, result: Result) -> bool:
    """Print the result; return whether each difference has a reason, and stock passed tests."""
    for context, counts in result["counts"].items():
        print(f"{package.name} {context:6} {sum(counts.values())} tests: {counts}", flush=True)
    for item in result["different"]:
        reason = item["reason"] or "no reason is known"
        print(f"  {item['context']}: {item['test']}: {item['stock']} -> {item['here']}: {reason}")
    return is_good(result)


def is_good(result: Result) -> bool:
    passed = result["counts"]["stock"].get("passed", 0)
    return passed > 0 and all(item["reason"] for item in result["different"])


def kept(package: Package) -> Result | None:
    """Return the result that is kept for these versions, or None."""
    result = _all().get(package.name)
    return result if result and result["versions"] == versions_of(package) else None


def keep(package: Package, result: Result) -> None:
    everything = {**_all(), package.name: result}
    KEPT.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")


def _all() -> dict[str, Result]:
    everything: dict[str, Result] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for package in PACKAGES:
        # A reason may have come into the table after the tests ran.
        if package.name in everything:
            for item in everything[package.name]["different"]:
                item["reason"] = package.reason(item["test"], item["context"], item["here"])
    return everything


def write_page() -> None:
    """Write the table between its marks in docs/packages.md."""
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}{table(_all())}{END}{after}")


def table(everything: dict[str, Result]) -> str:
    """Return the lines of the table, for the packages that have a result."""
    lines = [
        "| package | verdict | passed on stock | sync | green | fail on stock, too | tested |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    lines += [_row(p, everything[p.name]) for p in PACKAGES if p.name in everything]
    return "\n".join([*lines, "", *_remarks(everything)]) + "\n"


def _remarks(everything: dict[str, Result]) -> Iterator[str]:
    """Yield a line for each reason why a test fails on stock, or has another outcome here."""
    for package in PACKAGES:
        if package.name not in everything:
            continue
        if package.on_stock:
            yield f"- {package.name}, on stock, too: {package.on_stock}."
        reasons = Counter(
            (item["context"], item["here"], item["reason"] or "no reason is known")
            for item in everything[package.name]["different"]
        )
        for (context, outcome, reason), count in reasons.items():
            yield f"- {package.name}, {context}: {count} {outcome}: {reason}."


def _row(package: Package, result: Result) -> str:
    passed = [f"{result['counts'][c].get('passed', 0):,}" for c in ("stock", "sync", "green")]
    versions = result["versions"]
    tested = f"{result['date']}, Python {versions['Python']}, Django {versions['Django']}"
    cells = [f"{package.name} {versions['package']}", verdict(package, result), *passed]
    return f"| {' | '.join([*cells, str(len(result['failed_on_stock'])), tested])} |"


def verdict(package: Package, result: Result) -> str:
    """Return in a few words whether the package runs."""
    if not is_good(result):
        return "**open**: outcomes differ, see below"
    if package.needs:
        return f"**runs with one line**: {package.needs}"
    return "**runs**"
