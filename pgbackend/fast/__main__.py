"""Prints which shortcuts are on, which are off, and why: ``python -m pgbackend.fast``.

Looks at `PGBACKEND_SHORTCUTS` in the environment, and in the settings if `DJANGO_SETTINGS_MODULE`
is set.
"""

from __future__ import annotations

import logging
import os

from django.conf import settings  # noqa: TID251 - so that conf.py has some to read

from .registry import SHORTCUTS, why_off


def main() -> None:
    if not os.environ.get("DJANGO_SETTINGS_MODULE"):
        settings.configure()
    logging.disable(logging.WARNING)  # each of them is in the table
    reasons = why_off()
    width = max(map(len, SHORTCUTS))
    for name, shortcut in SHORTCUTS.items():
        reason = reasons.get(name)
        print(f"{name:{width}}  {'off' if reason else 'on ':3}  {shortcut.stands_for}.")
        if reason:
            print(f"{'':{width}}       ({reason})")


if __name__ == "__main__":
    main()
