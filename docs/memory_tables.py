"""The memory estimates of the ready configurations, as docs/models.md and the configurations' own comments show them.

A configuration names the command in a comment; what it prints goes into the page, its conclusions after the comment.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

from student_trainer.commands import memory
from student_trainer.commands.common import configuration

ROOT = Path(__file__).resolve().parent.parent
COMMAND = re.compile(r"^#   python -m student_trainer memory (.*)$", re.MULTILINE)
CONCLUSIONS = re.compile(r"^(Student|Teacher|stage [12]|it does NOT|\d.* GiB are left)")
BEGIN, END = "<!-- estimates begin -->", "<!-- estimates end -->"


def ready() -> list[str]:
    """The ready configurations: those that name the command."""
    files = sorted((ROOT / "config").glob("*.yaml"))
    return [f"config/{file.name}" for file in files if COMMAND.search(file.read_text("utf-8"))]


def printed(file: str) -> list[str]:
    """What the command that a configuration names prints."""
    found = COMMAND.search((ROOT / file).read_text("utf-8"))
    assert found is not None
    options = memory.make_parser().parse_intermixed_args(shlex.split(found[1]))
    return list(memory.report(configuration(ROOT / options.config, options.settings), options))


def commented(file: str) -> str:
    """A configuration with the present conclusions after its command."""
    text = (ROOT / file).read_text("utf-8")
    head, says, rest = text.partition("# says\n")
    assert says, f"{file} has no line '# says' after its command"
    rest = re.sub(r"\A(#   .*\n)*", "", rest)
    return head + says + "".join(f"#   {line}\n" for line in printed(file) if CONCLUSIONS.match(line)) + rest


def page() -> str:
    """docs/models.md with the present tables between its markers."""
    text = (ROOT / "docs/models.md").read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = []
    for file in ready():
        command = COMMAND.search((ROOT / file).read_text("utf-8"))
        assert command is not None
        lines = "\n".join(printed(file))
        parts.append(f"### {file}\n\n```text\n$ python -m student_trainer memory {command[1]}\n{lines}\n```\n")
    return f"{before}{BEGIN}\n\n" + "\n".join(parts) + f"\n{END}{after}"


def pages() -> dict[str, Callable[[], str]]:
    """What docs/generate.py writes."""
    return {"docs/models.md": page, **{file: partial(commented, file) for file in ready()}}
