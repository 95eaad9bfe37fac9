"""The site builds without a warning, loads nothing from elsewhere, and shows what the pages say in the repository."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.examples import ROOT

TAGS = ("h2", "h3", "li", "table", "tr", "pre", "blockquote")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    pytest.importorskip("material", reason="needs mkdocs-material (pip install 'strong2weak[docs]')")
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "WARNING" not in run.stdout + run.stderr
    return folder


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(https?://[^\"]+)")
    found = {page.name: loaded.findall(page.read_text(encoding="utf-8")) for page in site.rglob("*.html")}
    assert found
    assert not {name: urls for name, urls in found.items() if urls}


def test_files_of_the_repository_that_pages_link_to_are_pages(site: Path) -> None:
    text = (site / "repository" / "docker" / "nginx.conf" / "index.html").read_text(encoding="utf-8")
    assert "grpc_pass" in text
    assert (site / "repository" / "CONTRIBUTING" / "index.html").is_file()


def test_a_page_has_as_many_headings_lists_tables_and_blocks_as_in_the_repository(site: Path) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    reader = markdown_it.MarkdownIt("gfm-like", {"linkify": False})
    differ = {}
    for page in sorted((ROOT / "docs").glob("*.md")):
        if page.stem == "index":
            continue
        here = reader.render(page.read_text(encoding="utf-8"))
        built = (site / page.stem / "index.html").read_text(encoding="utf-8")
        article = built.split("<article", 1)[1].split("</article>", 1)[0]
        counts = {tag: tuple(len(re.findall(rf"<{tag}[ >]", text)) for text in (here, article)) for tag in TAGS}
        differ |= {f"{page.name} {tag}": pair for tag, pair in counts.items() if pair[0] != pair[1]}
    assert not differ


def test_the_pictures_are_fresh() -> None:
    run = subprocess.run([sys.executable, "docs/pictures/draw.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
