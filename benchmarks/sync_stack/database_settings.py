"""Gives the settings of both projects what differs between the ways to serve them."""

import json
import os
from typing import Any

from pgbackend.embedded import database_settings


def databases() -> dict[str, Any]:
    """Return the setting `DATABASES`, from the environment variable `SYNC_STACK`."""
    given = json.loads(os.environ["SYNC_STACK"])
    found = database_settings(given["url"])
    options = {**found.get("OPTIONS", {}), "application_name": given["name"], **given["options"]}
    return {
        "default": {
            **found,
            "ENGINE": given["engine"],
            "CONN_MAX_AGE": given["max_age"],
            "OPTIONS": options,
        }
    }


LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler", "level": "ERROR"}},
    "loggers": {"django": {"handlers": ["console"], "propagate": False}},
}
