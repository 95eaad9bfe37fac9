"""What the site does beside MkDocs: files of the repository that pages link to become pages too.

A link such as `../docker/nginx.conf` works where the pages are read in the repository. In the site, which has the pages
alone, its target gets a page under `repository/` with the file's text, and the link leads there. A link to a file that
does not exist is left as it is, so that MkDocs warns of it. It knows links and files, not what a page says.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^ *```.*?^ *```", re.S | re.M)
LANGUAGES = {".yml": "yaml", ".yaml": "yaml", ".py": "python", ".sh": "bash", ".conf": "nginx", ".proto": "protobuf"}


def repository_path(source: str, target: str) -> str | None:
    """The repository's file that `target` names in the file `source` (both with `/`); None where it is none."""
    if "://" in target or target.startswith(("/", "mailto:")):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def site_path(path: str) -> str:
    """Where a file of the repository stands among the site's sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def text_of(path: str) -> str:
    """The page of a file of the repository that is no page of `docs/`."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"# `{path}`\n\n```{language}\n{text.rstrip()}\n```\n"


def targets_in(source: str, text: str) -> list[str]:
    """The repository's files that a page links to, outside of its code."""
    found = (repository_path(source, m["target"]) for m in LINK.finditer(FENCE.sub("", text)))
    return [path for path in found if path is not None]


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each file outside of docs/ that a page, or such a file, links to."""
    sources = [(f"docs/{f.src_uri}", f.content_string) for f in files.documentation_pages()]
    while sources:
        source, text = sources.pop()
        for path in targets_in(source, text):
            where = site_path(path)
            if path.startswith("docs/") or where in files.src_uris:
                continue
            content = text_of(path)
            files.append(File.generated(config, where, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
            if path.endswith(".md"):
                sources.append((path, content))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Leads links to the repository's files to their pages."""
    uri = page.file.src_uri
    outside = uri.startswith("repository/")
    source = uri.removeprefix("repository/") if outside else f"docs/{uri}"
    if outside and not (ROOT / source).is_file():
        return markdown
    here = posixpath.dirname(uri) or "."

    def led(match: re.Match[str]) -> str:
        path = repository_path(source, match["target"])
        if path is None:
            return match[0]
        return posixpath.relpath(site_path(path), here) + (match["anchor"] or "")

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(led, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(led, markdown[end:])])
