"""Measures connections in use, throughput and response times: ``python -m benchmarks.connections``.

From 1 to 10,000 requests are in flight in one process, on pools of several sizes, and a model
(`model.py`) predicts each figure from a calibration at other points. The results go to a file, and
into docs/scale-out.md (`report.py`). ``--quick`` measures a few points for seconds, and writes
nothing. The program uses the server of ``DATABASE_URL``, or starts one of its own.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from benchmarks.web import machine
from pgbackend import embedded

from . import database, report
from .plan import CURVES, REQUESTS, SIZES, Curve, Round
from .results import Run, lines

Told: TypeAlias = Callable[[dict[str, Any]], str]
#: The curves and numbers of requests that ``--quick`` measures, in a fraction of the time.
_QUICK = ([Curve("busy", 12)], [1, 16])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few points, and no page")
    parser.add_argument("--json", action="store_true", help="print each point as JSON")
    options = parser.parse_args(arguments)
    told = json.dumps if options.json else _told
    with embedded.server() as server, database.prepared(server.url) as version:
        database.configure(server.url, SIZES)
        if options.quick:
            _rows(Round(server.url, share=0.1), *_QUICK, told)
            return
        run = _run(server.url, version, options.rounds, told)
    run.save()
    for path in report.write(run):
        print(f"written: {path}")


def _run(url: str, version: str, rounds: int, told: Told) -> Run:
    begun = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
    described, versions = machine.machine(), machine.versions(sys.executable, version)
    found = [_rows(Round(url), CURVES, REQUESTS, told) for _ in range(rounds)]
    command = f"python -m benchmarks.connections --rounds {rounds}"
    run = Run(command, begun, described, versions, found, {})
    return Run(command, begun, described, versions, found, lines(run.calibration()))


def _rows(
    this: Round, curves: Sequence[Curve], requests: Sequence[int], told: Told
) -> list[dict[str, Any]]:
    """Measure a round; print each point when it is known."""
    found = []
    for row in this.rows(curves, requests):
        found.append(row)
        print(told(row), flush=True)
    return found


def _told(row: dict[str, Any]) -> str:
    if "calibration" in row:
        rounded = {name: round(value, 6) for name, value in row["calibration"].items()}
        return f"calibration, seconds and a share: {rounded}"
    measured, predicted = row["measured"], row["predicted"]
    figures = ", ".join(
        f"{title} {measured[name]:.4g} (model {predicted[name]:.4g}, "
        f"{predicted[name] / measured[name]:.2f})"
        for title, name in (("in use", "in_use"), ("statements/s", "rate"), ("cycle s", "cycle"))
    )
    head = f"{row['work']:6} pool {row['pool']:2} {row['requests']:6,} in flight"
    busy = f"cpu {measured['cpu']:.0%}, kept off {measured['kept_off']:.1%}"
    return f"{head}: {figures}, peak {measured['peak']}, {busy}"


if __name__ == "__main__":
    main()
