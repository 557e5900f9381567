"""Follows a page word by word: its commands are run, and its files written, in the page's order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.polling import wait_for
from tests.support.ports import free_port

#: Commands that the environment of the tests has run already.
INSTALLS = ("python -m venv", "pip install")
_PART = re.compile(
    r"`(?P<path>\S+\.py)`:\n\n```python\n(?P<file>.*?)^```$"
    r"|^```python\n(?P<settings>.*?)^```$"
    r"|^    (?P<command>\S[^\n]*?)(?:     # [^\n]*)?$",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Project:
    """The project that a page makes in `home`."""

    page: Path
    home: Path
    settings: str
    """The file in which the page replaces `DATABASES`."""
    port: int = field(default_factory=free_port)
    answers: list[bytes] = field(default_factory=list)
    """The bodies of the responses to the page's commands with `curl`."""

    def follow(self) -> None:
        """Do what the page says. Its server stops when the page ends."""
        parts = [*_PART.finditer(self.page.read_text())]
        at = next(n for n, part in enumerate(parts) if "uvicorn " in (part["command"] or ""))
        for part in parts[:at]:
            self._do(part)
        with self._served(parts[at]["command"]):
            for part in parts[at + 1 :]:
                self._ask(part["command"])

    def _do(self, part: re.Match[str]) -> None:
        if part["path"]:
            (self.home / part["path"]).write_text(part["file"])
        elif part["settings"]:
            self._set(part["settings"])
        elif not part["command"].startswith(INSTALLS):
            self._run(part["command"])

    def _set(self, text: str) -> None:
        path = self.home / self.settings
        without = re.sub(r"DATABASES = \{.*?\n\}\n", "", path.read_text(), flags=re.DOTALL)
        path.write_text(f"{without}\n{text}")

    def _run(self, command: str) -> None:
        arguments, environ = shlex.split(command), self._environ()
        done = subprocess.run(
            arguments,
            cwd=self.home,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    def _environ(self) -> dict[str, str]:
        names = {"DATABASE_URL", "DJANGO_SETTINGS_MODULE", "PYTHONPATH"}
        environ = {name: value for name, value in os.environ.items() if name not in names}
        programs = Path(sys.executable).parent
        return {**environ, "PATH": f"{programs}{os.pathsep}{environ['PATH']}"}

    @contextmanager
    def _served(self, command: str) -> Iterator[None]:
        arguments = [*shlex.split(command), "--port", str(self.port)]
        process = subprocess.Popen(arguments, cwd=self.home, env=self._environ())
        try:
            wait_for(self._answers, "the server", seconds=60)
            yield
        finally:
            process.terminate()
            process.wait(20)

    def _answers(self) -> bool:
        try:
            self.get("http://127.0.0.1:8000/")
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    def _ask(self, command: str) -> None:
        if command.startswith("curl "):
            self.answers.append(self.get(command.removeprefix("curl ")))
            return
        found = re.search(r"seq (\d+) \| xargs -P (\d+) .* (http\S+)\)", command)
        assert found is not None, command
        with ThreadPoolExecutor(int(found[2])) as threads:
            answers = [*threads.map(self.get, [found[3]] * int(found[1]))]
        assert answers == [self.answers[-1]] * int(found[1])

    def get(self, url: str) -> bytes:
        """Return the body of the response at a URL of the page, or raise HTTPError."""
        with urllib.request.urlopen(url.replace("8000", str(self.port)), timeout=20) as response:
            body: bytes = response.read()
            return body
