"""Measures all points of a run, round by round, each beside what the model predicts for it.

The model's parameters come from two measurements that open each round, at points that are not
judged. One request alone, whose waits and statements have times of their own, tells what a wait and
a lease take beyond the times that were asked for. Requests that neither wait nor sleep tell the
processor's time of a statement.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from . import database
from .load import Flight, Measured, Work, deck
from .model import Demands, Prediction, predict

REQUESTS = (1, 16, 64, 256, 2_000, 10_000)
SHORT = Work("short", "three times: 1 s elsewhere, then a statement of 100 ms", 3, 1, 0.1, 16, 7)
LONG = Work("long", "20 s elsewhere, then a statement of 100 ms", 1, 20, 0.1, 1, 30)
BUSY = Work("busy", "three times: 50 ms elsewhere, then a statement of 4 ms", 3, 0.05, 0.004, 16, 4)
WORKS = {work.name: work for work in (SHORT, LONG, BUSY)}
_ALONE = Work("alone", "calibration", 1, 0.1, 0.02, 16, 8.0)
_RELENTLESS = Work("relentless", "calibration", 1, 0.0, 0.0, 16, 3.0)
#: The requests in flight, and the pool, of the calibration without waits.
_MANY = 32
#: A measurement of several requests has so many statements, if that takes no longer than so long.
_ENOUGH, _LONGEST = 150, 40.0


@dataclass(frozen=True)
class Curve:
    """Names a work and the size of the pool with which it is measured."""

    work: str
    pool: int


#: A work whose bound is the processor is not among them: where others use the processors, too, it
#: would measure those.
CURVES = (Curve("short", 12), Curve("short", 30), Curve("long", 80))
SIZES = {_MANY, *(curve.pool for curve in CURVES)}


@dataclass(frozen=True)
class Calibration:
    """Holds what the calibration of a round has found, in seconds for each statement."""

    beyond_wait: float
    """The time that a wait takes beyond what it was told, with all that is outside of the lease."""
    beyond_statement: float
    """The time that a lease takes beyond what the server sleeps."""
    cpu: float
    """The time of the processor."""
    cpu_held: float
    """The share of the time on the event loop that falls in the lease."""

    def demands(self, work: Work) -> Demands:
        return Demands(
            elsewhere=work.elsewhere + max(0.0, self.beyond_wait - self.cpu),
            held=work.statement + self.beyond_statement,
            cpu=self.cpu,
            cpu_held=self.cpu_held,
        )


class Round:
    """Measures one round; `share` shortens each measurement."""

    def __init__(self, url: str, share: float = 1.0) -> None:
        self.url, self.share = url, share

    def rows(self, curves: Iterable[Curve], requests: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Yield the calibration, and then each point."""
        calibration = self.calibrate()
        yield {"calibration": asdict(calibration)}
        for curve in curves:
            work = WORKS[curve.work]
            for count in requests:
                predicted = predict(calibration.demands(work), count, curve.pool)
                measured = self._measure(work, count, curve.pool, predicted)
                yield {
                    "work": curve.work,
                    "pool": curve.pool,
                    "requests": count,
                    "measured": asdict(measured),
                    "predicted": asdict(predicted),
                }

    def calibrate(self) -> Calibration:
        alone = self._run(_ALONE, 1, _MANY, 2.0, _ALONE.seconds)
        relentless = self._run(_RELENTLESS, _MANY, _MANY, 1.0, _RELENTLESS.seconds)
        return Calibration(
            beyond_wait=alone.cycle - alone.held - _ALONE.elsewhere,
            beyond_statement=alone.held - _ALONE.statement,
            cpu=relentless.cpu / relentless.rate,
            cpu_held=min(1.0, relentless.in_use / _MANY),
        )

    def _measure(self, work: Work, requests: int, pool: int, predicted: Prediction) -> Measured:
        """Measure a point, for as long as the predicted rate makes necessary."""
        # A queue is as long as it will be when each request has come through it once.
        warm = 1.2 * predicted.cycle if predicted.queued > predicted.cycle / 4 else 0.0
        enough = _ENOUGH / predicted.rate if requests > 1 else 0.0
        seconds = max(min(enough, _LONGEST), work.seconds)
        return self._run(work, requests, pool, max(warm, 1.0 + requests / 2_000), seconds)

    def _run(self, work: Work, requests: int, pool: int, warm: float, seconds: float) -> Measured:
        database.set_durations(self.url, [work.statement * card for card in deck(work.cards)])
        flight = Flight(work, requests, database.alias_of(pool))
        # The first statements take longer: Python specialises its instructions, connections open.
        warm = max(0.5, warm * self.share)
        return asyncio.run(flight.measure(warm, seconds * self.share))
