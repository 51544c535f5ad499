"""Pages in headless Chromium, and what a page refers to."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
needed = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page was not opened in a browser")


class Links(HTMLParser):
    """The tags of a page, and all values that could load something."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.found += [v or "" for k, v in attributes if k in ("src", "href", "srcset", "action", "data")]


def document_of(page: str, folder: Path) -> str:
    """The page's document after its scripts have run; the console must stay empty."""
    assert CHROMIUM is not None
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    run = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--enable-logging=stderr",
            "--window-size=1200,900",
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.stdout, run.stderr[-2000:]
    assert "CONSOLE" not in run.stderr, [x for x in run.stderr.splitlines() if "CONSOLE" in x]
    return run.stdout
