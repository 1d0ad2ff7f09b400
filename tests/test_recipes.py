"""The pages in docs/recipes: every Python block runs, and the index has every page."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread", "warnings_format")
RECIPES = Path(__file__).resolve().parent.parent / "docs" / "recipes"
PAGES = sorted(p.stem for p in RECIPES.glob("*.md") if p.stem != "README")
OWN = {"torch", "resfast"}


def blocks(page: str) -> list[str]:
    text = (RECIPES / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def _as_torchrun_would(monkeypatch):
    """The environment of the only process, on a free port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for name, value in (
        ("RANK", 0),
        ("WORLD_SIZE", 1),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", port),
    ):
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():  # a page that failed half-way
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_as_torchrun_would")
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run_in_turn(page, tmp_path, monkeypatch):
    """In one namespace a page; what is not installed skips the rest of it."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "recipe"}
    assert blocks(page)
    for i, block in enumerate(blocks(page)):
        for module in re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE):
            if module not in OWN:
                pytest.importorskip(module, reason=f"block {i} of {page} needs {module}")
        exec(compile(block, f"{page}.md, block {i}", "exec"), namespace)


def test_the_index_has_every_page_and_the_readme_the_index():
    linked = re.findall(r"\]\((\w+)\.md\)", (RECIPES / "README.md").read_text(encoding="utf-8"))
    assert sorted(linked) == PAGES
    readme = (RECIPES.parent.parent / "README.md").read_text(encoding="utf-8")
    assert "docs/recipes/README.md" in readme
