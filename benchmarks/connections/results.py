"""Keeps the results of a run in a file, and reduces its rounds to medians."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .model import predict
from .plan import CURVES, REQUESTS, WORKS, Calibration, Curve

FILE = Path(__file__).parent / "results.json"
#: The quantities that the model must predict, and the largest relative error.
JUDGED, CLOSE = ("in_use", "rate"), 0.15


@dataclass(frozen=True)
class Point:
    """Holds the medians of the rounds of one point."""

    requests: int
    measured: dict[str, float]
    predicted: dict[str, float]
    ratios: dict[str, float]
    """Predicted to measured, by the names in `JUDGED`: medians of the ratios of the rounds."""

    @property
    def close(self) -> bool:
        return all(abs(ratio - 1) <= CLOSE for ratio in self.ratios.values())


@dataclass(frozen=True)
class Run:
    """Holds a whole run as it was written."""

    command: str
    begun: str
    machine: dict[str, str]
    versions: dict[str, str]
    rounds: list[list[dict[str, Any]]]
    lines: dict[str, list[list[float]]]
    """The model's curves: requests, connections in use, statements a second; by curve."""

    @classmethod
    def load(cls, path: Path = FILE) -> Run:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path = FILE) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def points(self, curve: Curve) -> Iterator[Point]:
        for count in REQUESTS:
            found = [
                row
                for rows in self.rounds
                for row in rows
                if (row.get("work"), row.get("pool")) == (curve.work, curve.pool)
                and row["requests"] == count
            ]
            if found:
                yield _reduced(count, found)

    def calibration(self) -> Calibration:
        found = [row["calibration"] for rows in self.rounds for row in rows if "calibration" in row]
        return Calibration(
            **{name: statistics.median(each[name] for each in found) for name in found[0]}
        )


def _reduced(count: int, rows: list[dict[str, Any]]) -> Point:
    medians = {
        side: {name: statistics.median(row[side][name] for row in rows) for name in rows[0][side]}
        for side in ("measured", "predicted")
    }
    ratios = {
        name: statistics.median(row["predicted"][name] / row["measured"][name] for row in rows)
        for name in JUDGED
    }
    return Point(count, **medians, ratios=ratios)


def key(curve: Curve) -> str:
    return f"{curve.work}-{curve.pool}"


def lines(calibration: Calibration) -> dict[str, list[list[float]]]:
    """Return the model's curves from 1 to the most requests, eight points a decade."""
    most = max(REQUESTS)
    counts = sorted(
        {*REQUESTS, *(round(10 ** (n / 8)) for n in range(8 * len(str(most - 1)))), most}
    )
    return {key(curve): [_point(calibration, curve, n) for n in counts] for curve in CURVES}


def _point(calibration: Calibration, curve: Curve, requests: int) -> list[float]:
    found = predict(calibration.demands(WORKS[curve.work]), requests, curve.pool)
    return [requests, found.in_use, found.rate]
