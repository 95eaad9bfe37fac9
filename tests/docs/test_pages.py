"""The pages say what the code says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_generated_pages_are_fresh() -> None:
    run = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    "page", sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
)
def test_links_to_files_of_the_tree_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) if "://" not in t]
    missing = [t for t in targets if not ((ROOT / page).parent / t).exists()]
    assert not missing


def test_the_readme_names_every_top_level_folder() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {line.split("/")[0] for line in listed.splitlines() if "/" in line} - {".ci"}
    readme = (ROOT / "README.md").read_text()
    assert folders
    assert not [f for f in sorted(folders) if f"{f}/" not in readme]


def test_every_page_has_its_place_in_the_readme_on_the_home_page_and_in_the_navigation() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "docs/*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    pages = {Path(line).name for line in listed.splitlines()} - {"index.md"}
    places = {
        "README.md": r"\(docs/([\w-]+\.md)[)#]",
        "docs/index.md": r"\(([\w-]+\.md)[)#]",
        "mkdocs.yml": r": ([\w-]+\.md)$",
    }
    missing = {
        place: sorted(pages - set(re.findall(pattern, (ROOT / place).read_text(), re.M)))
        for place, pattern in places.items()
    }
    assert len(pages) > 20
    assert not {place: names for place, names in missing.items() if names}
