"""Runs pytest in one context: ``python start.py CONTEXT ARGUMENTS``, in the package's directory.

In the context whole, all of it runs in a portal on an event loop, and the requests of Django's test
clients, from which those of the package derive, come through the whole stack.
"""

import asyncio
import importlib.util
import sys
from pathlib import Path

import pytest

from pgbackend.driver import bridge


class Whole:
    """Is a plugin that rebinds the clients as soon as Django can be imported."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session):
        # The package's own directory ``tests`` hides that of pgbackend.
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
    if context == "whole":
        return asyncio.run(bridge.run(pytest.main, arguments, plugins=[Whole()]))
    return pytest.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
