"""Tests that an interpreter without the GIL is refused, and others are not."""

from __future__ import annotations

import importlib
import sys

import pytest

import pgbackend
from pgbackend import builds


def test_an_interpreter_without_the_gil_is_refused_with_cause_and_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(ImportError, match=r"free-threaded.*no wheel.*PYTHON_GIL=1"):
        importlib.reload(pgbackend)


@pytest.mark.parametrize("is_new", [False, True])
def test_an_interpreter_with_the_gil_is_taken(
    monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    if is_new:  # since Python 3.13, also of a free-threaded build that was started with a GIL
        monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True, raising=False)
    else:
        monkeypatch.delattr(sys, "_is_gil_enabled", raising=False)
    builds.check()
