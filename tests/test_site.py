"""The documentation as a site: every link leads somewhere, and no page loads anything from the network."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import NoReturn

import pytest

from tests.processes import REPO, Finished

LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "use": "href"}


class Loads(HTMLParser):
    """What a page loads by itself."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Takes up what a tag loads; a link to the page itself, for search engines, loads nothing."""
        given = dict(attributes)
        if tag in LOADING and given.get("rel") != "canonical":
            self.found.append(given.get(LOADING[tag]) or "")


@pytest.mark.long
def test_the_site_is_whole_and_opens_without_a_network(
    run: Callable[..., Finished], missing: Callable[[str], NoReturn], tmp_path: Path
) -> None:
    if not importlib.util.find_spec("material"):
        missing("mkdocs-material is not here: pip install -e '.[docs]'")
    site = tmp_path / "site"
    built = run("-m", "mkdocs", "build", "--strict", "-d", site, cwd=REPO, env={"NO_MKDOCS_2_WARNING": 1})
    assert built.rc == 0, built  # a dead link, also to a heading, is a warning, and fails
    pages = sorted(site.rglob("*.html"))
    for page in pages:
        for target in Loads(page).found:
            assert not re.match(r"(https?:)?//", target), f"{page.name} loads {target}"
            path = target.partition("#")[0].partition("?")[0]
            if page.name != "404.html" and not target.startswith("data:"):
                assert (page.parent / path).exists(), f"{page.name}: there is no {target}"
        assert 'class="mermaid"' not in page.read_text()  # for which the theme would load a program
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", style.read_text()), style
    ours = {path.stem for path in (REPO / "docs").glob("*.md")} | {"index", "changelog", "contributing"}
    assert ours <= {page.stem for page in site.glob("*.html")}
    home = (site / "index.html").read_text()
    assert all(f'href="{name}.html"' in home for name in ours - {"index"})  # each is in the navigation
    assert "examples/own_model.py" in (site / "files/examples/own_model.py.html").read_text()
    index = (site / "search/search_index.js").read_text()  # which needs no server
    found = json.loads(index.removeprefix("var __index = "))["docs"]
    assert any(entry["location"].startswith("guarantees.html") for entry in found)
    assert not any(entry["location"].startswith("files/") for entry in found)
