"""Tests that the figures which other pages cite are those of docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import excerpts


@pytest.mark.parametrize("name", excerpts.PAGES)
def test_a_page_cites_the_figures_of_the_last_run(name: str) -> None:
    text = (excerpts.DOCS / name).read_text()
    excerpt = excerpts.PAGES[name](excerpts.SOURCE.read_text())
    assert text == excerpts.written(text, excerpt), "python -m benchmarks.excerpts writes them"


def test_new_figures_are_written(tmp_path: Path) -> None:
    for name in (excerpts.SOURCE.name, *excerpts.PAGES):
        (tmp_path / name).write_text((excerpts.DOCS / name).read_text())
    source = tmp_path / excerpts.SOURCE.name
    old = excerpts.of_sync_views(source.read_text()).splitlines()[2].split("|")[3].strip()
    source.write_text(source.read_text().replace(f"| {old} |", "| 7 (0.07) |"))
    excerpts.write(tmp_path)
    assert "| 7 (0.07) |" in (tmp_path / "sync-views.md").read_text()


def test_a_page_without_a_place_is_told() -> None:
    with pytest.raises(ValueError, match="no place for the figures"):
        excerpts.written("# A page\n", "figures")
