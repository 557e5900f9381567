"""Configures Django's suite for one worker; what differs between workers is in `SUITE_JOB`.

All settings but the databases come from the file that Django's tests are written for.
"""

from __future__ import annotations

import json
import os

from test_sqlite import *  # noqa: F403 - on the path, as a worker runs in Django's directory

from pgbackend.embedded import database_settings

_job = json.loads(os.environ["SUITE_JOB"])
_server = database_settings(_job["url"])

DATABASES = {
    alias: {
        **_server,
        "ENGINE": _job["engine"],
        "NAME": name,
        "TEST": {"NAME": f"test_{name}"},
        # A copy for each alias: Django's tests edit it in place.
        "OPTIONS": dict(_server.get("OPTIONS", {})),
    }
    for alias, name in _job["databases"].items()
}

if _job["pooler"] is not None:
    for _settings in DATABASES.values():
        _settings |= {"HOST": "127.0.0.1", "PORT": str(_job["pooler"])}
        _settings |= {"USER": "anybody", "PASSWORD": ""}
        _settings["OPTIONS"] |= {"sslmode": "disable", "gssencmode": "disable"}
        _settings["OPTIONS"] |= {"pooler": "transaction"}
