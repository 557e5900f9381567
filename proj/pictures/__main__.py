"""Makes the pictures of the order desk, ``python -m proj.pictures``: some two minutes.

It starts PostgreSQL and the order desk, sends a rush and draws what it saw; then it opens the pages
in Chromium, and films them. ``--only`` makes some of the pictures; ``--quick`` a trial of all,
``--into`` elsewhere than in the documentation.
"""

import argparse
import asyncio
from pathlib import Path

from proj import serving
from proj.pictures import desk as running
from proj.pictures import plot, samples

PICTURES = running.ROOT / "docs" / "_static" / "pictures"
KINDS = ("plot", "screens", "film")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m proj.pictures", description=__doc__)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, help="some kinds")
    parser.add_argument("--quick", action="store_true", help="a short rush, and a short film")
    parser.add_argument("--into", type=Path, default=PICTURES, help="the directory to write to")
    asked = parser.parse_args(argv)
    asked.into.mkdir(parents=True, exist_ok=True)
    serving.raise_open_files()
    with running.database() as url:
        if "plot" in asked.only:
            _plot(url, asked.into, quick=asked.quick)
        if {"screens", "film"} & {*asked.only}:
            from proj.pictures import browser  # needs Selenium and Pillow

            browser.make(url, asked.into, only=asked.only, quick=asked.quick)


def _plot(url, into, *, quick):
    asked = {"pool": 8, "service_seconds": 0.5 if quick else 10}
    rush = {"seconds": 2, "rate": 20} if quick else {"seconds": 24, "rate": 80}
    with running.desk(url, **asked, status_seconds=0.1) as desk:
        taken = asyncio.run(samples.take(desk, **asked, **rush))
    (into / "rush.json").write_text(samples.to_text(taken))
    (into / "rush.svg").write_text(plot.picture(taken))
    print(plot.headline(taken), plot.figures(taken))


if __name__ == "__main__":
    main()
