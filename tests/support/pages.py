"""Pages of HTML as tests see them: their links, and which of them lead nowhere."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id" and value:
                self.anchors.add(value)


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text())
    return page


def links_of(path: Path) -> list[str]:
    """Every link and picture of a page, but those that are in the page themselves (data:)."""
    return [link for link in _read(path).links if not link.startswith("data:")]


def broken_links(path: Path) -> list[str]:
    """Links of a page to files or anchors that are not there; links to the web are not tried."""
    page, broken = _read(path), []
    for link in links_of(path):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / unquote(file)) if file else path
        is_there = target.is_file()
        if is_there and anchor and target.suffix == ".html":
            anchors = page.anchors if target == path else _read(target).anchors
            is_there = bool({anchor, unquote(anchor)} & anchors)  # as browsers look it up
        if not is_there:
            broken.append(link)
    return broken
