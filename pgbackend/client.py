"""`DatabaseClient`: Django's for PostgreSQL; keeps the password out of the environment of psql.

Whoever may look into a process can read its environment, and psql passes it on to each command that
it runs. So `dbshell` gives psql the password in a file that only the user can read, and that is
deleted when psql ends.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from django.db import connections
from django.db.backends.postgresql.client import DatabaseClient as PostgresDatabaseClient

from . import credentials
from .driver.asking import ConnectArguments
from .options import LIBPQ_NAMES

#: The arguments of psql, and what is added to its environment.
_Call: TypeAlias = tuple[list[str], dict[str, str] | None]


class DatabaseClient(PostgresDatabaseClient):
    @classmethod
    def settings_to_cmd_args_env(cls, settings_dict: dict[str, Any], parameters: Any) -> _Call:
        """Return psql's arguments and environment; options that are functions are asked now."""
        found = [alias for alias, given in connections.settings.items() if given is settings_dict]
        resolved = credentials.resolve_settings(found[0] if found else "", settings_dict)
        return super().settings_to_cmd_args_env(resolved, parameters)

    def runshell(self, parameters: Any) -> None:
        """Run psql with what the wrapper would connect with; keep the password in a file."""
        with tempfile.TemporaryDirectory(prefix="pgbackend-") as directory:
            # Django calls this method of the object; a derived class may have its own.
            make, passfile = self.settings_to_cmd_args_env, Path(directory, "passfile")
            vars(self)["settings_to_cmd_args_env"] = functools.partial(self._call, make, passfile)
            try:
                super().runshell(parameters)
            finally:
                del vars(self)["settings_to_cmd_args_env"]

    def _call(
        self,
        make: Callable[[dict[str, Any], Any], _Call],
        passfile: Path,
        settings_dict: dict[str, Any],
        parameters: Any,
    ) -> _Call:
        """Return psql's arguments and environment, and write the password to `passfile`."""
        wrapper: Any = self.connection
        if wrapper.has_own_parameters():
            given = wrapper.get_connection_params()
            settings_dict = ConnectArguments(settings_dict, OPTIONS=given)
            settings_dict["NAME"] = given.get("dbname")
            settings_dict |= {key: given.get(name, "") for key, name in LIBPQ_NAMES.items()}
        else:
            settings_dict = credentials.resolve_settings(wrapper.alias, settings_dict)
        args, env = make(settings_dict, parameters)
        password = (env or {}).get("PGPASSWORD")
        if not env or not password or "\n" in password:  # which no such file can have
            return args, env
        _write(passfile, password)
        del env["PGPASSWORD"]
        env["PGPASSFILE"] = str(passfile)
        if "PGPASSWORD" in os.environ:
            env["PGPASSWORD"] = ""  # psql would prefer it
        return args, env


def _write(passfile: Path, password: str) -> None:
    """Write a password file for any server; only the user may read it."""
    escaped = password.replace("\\", "\\\\").replace(":", "\\:")
    passfile.touch(0o600)
    passfile.write_text(f"*:*:*:*:{escaped}\n")
