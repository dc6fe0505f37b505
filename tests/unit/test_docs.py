"""What README and docs say is so: links, commands, files, configs, and the picture of the mask."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pizero.agent.config import primary_configs
from pizero.model import Segment, TokenLayout

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    text = page.read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made = re.findall(r"(?:^|`)make (?:[A-Z_]+=\S+ )*([a-z]+)", text, re.MULTILINE)
    assert set(made) <= targets
    named = re.findall(r"--config-name=(\w+)", text)
    assert set(named) - {"NAME"} <= set(primary_configs())
    scripts = re.findall(r"\b(?:scripts|slurm)/\w+\.(?:py|sh|txt)", text)
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\(docs/([\w.]+)\)", (ROOT / "README.md").read_text()))
    assert linked == {page.name for page in PAGES if page.name != "README.md"}


def test_tree_in_the_readme_is_the_tree():
    """Two columns of files below the folder that is indented less."""
    tree = re.search(r"```\nconfig/.*?```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree is not None
    folders: list[tuple[int, str]] = []
    found = 0
    for line in tree.group().splitlines()[1:-1]:
        indent = len(line) - len(line.lstrip())
        for name in re.findall(r"(?:^ *|  )([\w]+(?:/|\.py))(?=\s)", line):
            folders = [(depth, folder) for depth, folder in folders if depth < indent]
            path = Path(*(folder for _, folder in folders), name)
            assert (ROOT / path).exists(), path
            found += 1
            if name.endswith("/") and indent < 10:
                folders.append((indent, name))
    assert found > 20


def test_picture_of_the_mask_is_the_mask():
    layout = TokenLayout(
        Segment("image", 1, block=0, expert="vlm"),
        Segment("text", 1, block=0, expert="vlm"),
        Segment("state", 1, block=1, expert="action"),
        Segment("action", 1, block=2, expert="action"),
    )
    assert layout.show() in (ROOT / "README.md").read_text()
