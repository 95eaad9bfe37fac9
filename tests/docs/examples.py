"""The examples of the README and of docs/: fenced blocks, how each is tested, and what its page says about that.

A block is run unless the comment right before it says otherwise. Comments that count:
  <!-- not run: WHY -->       not run; it is still checked against the program's own parsers (commands.py, bodies.py)
  <!-- run by PATH -->        another test of the tree runs it; PATH exists and names the page
  <!-- serves -->             the command runs until the tests end, on free ports
  <!-- beside COMMAND -->     run while this command, a server, runs; it is checked and started as if it stood there
  <!-- slow -->               run by the slow tests alone
A block with `title="NAME"` is a file: it is written under that name before the page's later blocks run. A text block
with `title="prints"` is what the block before it prints. Knows no program.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```[ ]*$", re.S | re.M)
COMMENT = re.compile(r"<!-- *(?P<word>not run:|run by|serves|beside|slow)(?P<rest>.*?)-->", re.S)
LANGUAGES = ("bash", "python", "yaml", "json", "text")


@dataclass(frozen=True)
class Example:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    title: str
    text: str
    how: str
    """"not run", "run by", "serves", "beside", "slow" or "" for a block that is simply run."""
    why: str
    """The reason, the path of the test that runs it, or the server beside which it runs."""

    @property
    def name(self) -> str:
        """Where it stands: page:line."""
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """The README and every page of docs/, as paths in the repository."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found]


def examples(page: str, text: str | None = None) -> list[Example]:
    """The blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()].rstrip()
        comment = None
        if before.endswith("-->"):
            comment = COMMENT.fullmatch(before[before.rfind("<!--") :])
        language, _, rest = match["info"].strip().partition(" ")
        title = re.search(r'title="([^"]*)"', rest)
        indent = len(match["indent"])
        body = "".join(line[indent:] if line.strip() else "\n" for line in match["text"].splitlines(keepends=True))
        found.append(
            Example(
                page,
                text.count("\n", 0, match.start()) + 1,
                language,
                title[1] if title else "",
                body,
                comment["word"].rstrip(":") if comment else "",
                " ".join(comment["rest"].split()) if comment else "",
            )
        )
    return found


def unfenced(page: str) -> list[str]:
    """Lines that a page shows as code without a fence, where no test would see them."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return re.findall(r"(?<=\n\n) {4}(?:python|make|docker|curl|pip|torchrun|ray|export|kubectl) .*", text)


def problems(example: Example) -> list[str]:
    """What is wrong with the block as a block: its language, its comment, the reason in it."""
    found = []
    if example.language not in LANGUAGES:
        found.append(f"is in {example.language or 'no language'}; write one of {', '.join(LANGUAGES)}")
    if example.how == "not run" and len(example.why) < 10:
        found.append("is not run for no reason that one could read")
    if example.how == "run by":
        path = ROOT / example.why
        if not path.is_file():
            found.append(f"is run by {example.why}, which is not there")
        elif Path(example.page).name not in path.read_text(encoding="utf-8"):
            found.append(f"is run by {example.why}, which does not name the page")
    if example.how in ("serves", "beside", "slow") and example.language not in ("bash", "python"):
        found.append(f"is marked {example.how}, and {example.language} is not run")
    return found
