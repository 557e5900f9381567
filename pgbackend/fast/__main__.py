"""Prints which shortcuts are on or off, and why: ``python -m pgbackend.fast``.

Reads `PGBACKEND_SHORTCUTS` from the environment, or from the settings if `DJANGO_SETTINGS_MODULE`
is set.
"""

from __future__ import annotations

import logging
import os

from django.conf import settings  # noqa: TID251 - conf.py needs configured settings

from .registry import SHORTCUTS, why_off


def main() -> None:
    if not os.environ.get("DJANGO_SETTINGS_MODULE"):
        settings.configure()
    logging.disable(logging.WARNING)  # the table shows the same
    reasons = why_off()
    width = max(map(len, SHORTCUTS))
    for name, shortcut in SHORTCUTS.items():
        reason = reasons.get(name)
        print(f"{name:{width}}  {'off' if reason else 'on ':3}  {shortcut.stands_for}.")
        if reason:
            print(f"{'':{width}}       ({reason})")


if __name__ == "__main__":
    main()
