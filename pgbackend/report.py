"""Prints what a bug report should tell: ``python -m pgbackend.report``.

docs/operating.md says what is in it. It has no password, and no name of a host, a user or a
database. Settings are read if `DJANGO_SETTINGS_MODULE` is set.
"""

from __future__ import annotations

import argparse
import logging

from pgbackend.operating import bug_report


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m pgbackend.report", description=__doc__)
    parser.add_argument("--no-connect", action="store_true", help="ask no server")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)  # what is logged might name hosts and users
    for line in bug_report.lines(connect=not given.no_connect):
        print(line)


if __name__ == "__main__":
    main()
