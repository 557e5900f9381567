"""Settings of Django's suite for one worker; what differs between workers is in `SUITE_JOB`."""

from __future__ import annotations

import json
import os

from pgbackend.embedded import database_settings

_job = json.loads(os.environ["SUITE_JOB"])
_server = database_settings(_job["url"])

DATABASES = {
    alias: {
        **_server,
        "ENGINE": _job["engine"],
        "NAME": name,
        "TEST": {"NAME": f"test_{name}"},
        # A copy for each: Django's tests edit it in place.
        "OPTIONS": dict(_server.get("OPTIONS", {})),
    }
    for alias, name in _job["databases"].items()
}

SECRET_KEY = "django_tests_secret_key"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
USE_TZ = False
