"""Runs pytest in one context: ``python start.py CONTEXT ARGUMENTS``, in a package's directory.

`SUITE_DATABASE` has the settings of the database that takes the place of each of the package's own.
In the context green, all of it runs in a portal on an event loop, and the requests of Django's test
clients come through the whole stack.
"""

import asyncio
import copy
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from django.conf import LazySettings, Settings

from pgbackend.driver import bridge

DATABASE = json.loads(os.environ["SUITE_DATABASE"])


def replace_databases():
    """Let each way to configure Django end with our database, whatever the package says."""
    load, configure = Settings.__init__, LazySettings.configure

    def loading(self, *args, **kwargs):
        load(self, *args, **kwargs)
        self.DATABASES = replaced(self.DATABASES)

    def configuring(self, *args, **options):
        configure(self, *args, **{**options, "DATABASES": replaced(options.get("DATABASES", {}))})

    Settings.__init__, LazySettings.configure = loading, configuring


def replaced(databases):
    """Return the package's aliases, each with a database of its own on our server."""
    ours = {}
    for alias in databases or {"default": {}}:
        ours[alias] = copy.deepcopy(DATABASE)
        ours[alias]["TEST"] = {"NAME": f"test_{DATABASE['NAME']}_{alias}"}
    return ours


class Green:
    """Is a plugin that rebinds the test clients as soon as Django can be imported."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session):
        # A package's own directory ``tests`` hides that of pgbackend.
        path = Path(__file__).parents[2] / "suite" / "whole_stack.py"
        spec = importlib.util.spec_from_file_location("whole_stack", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # responses, which are pickled, refer to a class in it
        spec.loader.exec_module(module)
        module.install()
        self.module = module

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.write_line(f"requests through the whole stack: {self.module.served}")


def main():
    context, *arguments = sys.argv[1:]
    replace_databases()
    if context == "green":
        return asyncio.run(bridge.run(pytest.main, arguments, plugins=[Green()]))
    return pytest.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
