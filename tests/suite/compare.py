"""Compares three columns: the outcomes of stock, and where pgbackend's differ.

``python -m tests.suite.compare DIR`` compares the results of an earlier run in DIR.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .differences import DIFFERENCES, Difference, expected
from .results import CONTEXTS, OUTCOMES, WHOLE, Results

ABSENT = "not run"


@dataclass
class Comparison:
    """Holds the differences of one context from stock."""

    results: Results
    unexpected: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By test: stock's outcome and ours."""
    known: dict[str, Difference] = field(default_factory=dict)
    unneeded: list[Difference] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        results = self.results
        return not (self.unexpected or self.unneeded or results.faults or results.crashes)


def compare(
    stock: Results, ours: Results, differences: Iterable[Difference] = DIFFERENCES
) -> Comparison:
    """Compare `ours` with `stock` and with the list of expected differences."""
    comparison = Comparison(ours)
    listed = list(expected(ours.context, ours.django, differences))
    for test in sorted(stock.tests.keys() | ours.tests.keys()):
        theirs, mine = _outcome(stock, test), _outcome(ours, test)
        difference = next((item for item in listed if item.matches(test)), None)
        if difference is not None and mine == difference.outcome != theirs:
            comparison.known[test] = difference
        elif theirs != mine:
            comparison.unexpected[test] = (theirs, mine)
    used = set(comparison.known.values())
    comparison.unneeded = [
        item for item in listed if item not in used and any(map(item.matches, stock.tests))
    ]
    return comparison


def _outcome(results: Results, test: str) -> str:
    return results.tests[test].outcome if test in results.tests else ABSENT


def report(
    all_results: Mapping[str, Results], differences: Iterable[Difference] = DIFFERENCES
) -> bool:
    """Print the comparison; return whether nothing in it is unexpected."""
    _print_table(all_results)
    stock = all_results["stock"]
    good = not stock.crashes
    for crash in stock.crashes:
        print(f"\nstock crashed {crash}")
    for results in all_results.values():
        if results.context != "stock":
            comparison = compare(stock, results, differences)
            _print_comparison(comparison)
            good = good and comparison.is_good
    return good


def _print_table(all_results: Mapping[str, Results]) -> None:
    print(f"\n{'':20}" + "".join(f"{context:>8}" for context in all_results))
    for outcome in OUTCOMES:
        counts = [results.count(outcome) for results in all_results.values()]
        if any(counts):
            print(f"{outcome:20}" + "".join(f"{count:8}" for count in counts))
    for results in all_results.values():
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(results.connections.items()))
        if kinds:
            print(f"connections made in {results.run}: {kinds}")


def _print_comparison(comparison: Comparison) -> None:
    ours = comparison.results
    for test, (theirs, mine) in comparison.unexpected.items():
        print(f"\n{ours.run}: {test}: {theirs} in stock, {mine} here")
        if test in ours.tests:
            print(_indent(ours.tests[test].text))
    for test, difference in comparison.known.items():
        print(f"{ours.run}: {test}: {difference.outcome} as expected: {difference.reason}")
    for difference in comparison.unneeded:
        print(f"{ours.run}: {difference.test} does not differ any more: remove it from the list")
    for fault in ours.faults:
        print(f"\n{ours.run}: {fault['test']}: {fault['text']}\n{_indent(fault['stack'])}")
    for crash in ours.crashes:
        print(f"\n{ours.run} crashed {crash}")


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines()[-40:])


def load(out: Path) -> dict[str, Results]:
    """Load the results that runs have left in `out`."""
    all_results = [Results.load(path) for path in out.glob("*.json")]
    order = {context: place for place, context in enumerate((*CONTEXTS, WHOLE))}
    all_results.sort(key=lambda results: (order[results.context], results.run))
    return {results.run: results for results in all_results}


if __name__ == "__main__":
    sys.exit(not report(load(Path(sys.argv[1]))))
