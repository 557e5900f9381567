"""Tests docs/start.md word by word: its commands and files make a project that serves its views."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.docs.snippets import ROOT
from tests.support.polling import wait_for
from tests.support.ports import free_port

PAGE = ROOT / "docs/start.md"
#: Commands that the environment of the tests has run already.
INSTALLS = ("python -m venv", "pip install")
_PART = re.compile(
    r"^`(?P<path>\S+)`:\n\n```python\n(?P<file>.*?)^```$"
    r"|^```python\n(?P<settings>.*?)^```$"
    r"|^    (?P<command>\S[^\n]*?)(?:     # [^\n]*)?$",
    re.MULTILINE | re.DOTALL,
)
SERVER = "python -m uvicorn shop.asgi:application"


class Project:
    """The project that the page makes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_port()
        names = {"DATABASE_URL", "DJANGO_SETTINGS_MODULE", "PYTHONPATH"}
        environ = {name: value for name, value in os.environ.items() if name not in names}
        programs = Path(sys.executable).parent
        self.environ = {**environ, "PATH": f"{programs}{os.pathsep}{environ['PATH']}"}

    def write_settings(self, text: str) -> None:
        """Put the page's settings in the place of `DATABASES`."""
        path = self.home / "shop/settings.py"
        without = re.sub(r"DATABASES = \{.*?\n\}\n", "", path.read_text(), flags=re.DOTALL)
        path.write_text(f"{without}\n{text}")

    def run(self, command: str) -> None:
        """Run a command in the project's directory."""
        done = subprocess.run(
            shlex.split(command),
            cwd=self.home,
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    @contextmanager
    def served(self, command: str) -> Iterator[None]:
        """Serve the project by the page's command, on a port of the test."""
        arguments = [*shlex.split(command), "--port", str(self.port)]
        process = subprocess.Popen(arguments, cwd=self.home, env=self.environ)
        try:
            wait_for(self._answers, "the server", seconds=30)
            yield
        finally:
            process.terminate()
            process.wait(20)

    def _answers(self) -> bool:
        try:
            self.get("http://127.0.0.1:8000/orders/1/")
        except OSError:
            return False
        return True

    def get(self, url: str) -> Any:
        """Return the JSON at a URL of the page."""
        with urllib.request.urlopen(url.replace("8000", str(self.port)), timeout=10) as response:
            return json.load(response)


def _in_parallel(command: str) -> tuple[str, int]:
    """Return the URL and the number of clients of the page's command with `xargs`."""
    found = re.search(r"seq (\d+) \| xargs -P (\d+) .* (http\S+)\)", command)
    assert found is not None
    assert found[1] == found[2]
    return found[3], int(found[1])


@pytest.mark.slow
def test_the_page_makes_a_project_that_serves(tmp_path: Path) -> None:
    project, answers = Project(tmp_path), []
    parts = [*_PART.finditer(PAGE.read_text())]
    at_server = next(n for n, part in enumerate(parts) if part["command"] == SERVER)
    for part in parts[:at_server]:
        if part["path"]:
            (tmp_path / part["path"]).write_text(part["file"])
        elif part["settings"]:
            project.write_settings(part["settings"])
        elif not part["command"].startswith(INSTALLS):
            project.run(part["command"])
    with project.served(SERVER):
        for part in parts[at_server + 1 :]:
            command = part["command"]
            if command.startswith("curl "):
                answers.append(project.get(command.removeprefix("curl ")))
            else:
                url, clients = _in_parallel(command)
                with ThreadPoolExecutor(clients) as threads:
                    assert [*threads.map(project.get, [url] * clients)] == [answers[-1]] * clients
    assert answers[0] == {"table": "7", "lines": ["Broth"], "paid_at": None}
    assert answers[1]["paid_at"] is not None
