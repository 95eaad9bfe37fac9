"""Cuts a bash example into its commands and has each checked by what programs.py knows of its program.

It runs nothing. A program of others (openssl, ray) is only known by name; one that nobody knows is a mistake in the
example, or belongs into OTHERS.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from tests.docs.examples import ROOT
from tests.docs.programs import CHECKS, Wrong, module, script

OTHERS = {
    *("openssl", "printf", "cat", "ray", "git", "cd", "export", "echo", "mkdir", "source", ".", "uv", "ls", "sleep"),
    *(
        "kill",
        "wait",
        "grpcurl",
        "helm",
        "kubectl",
        "tensorboard",
        "trackio",
        "nvidia-smi",
        "chmod",
        "cp",
        "scp",
        "ssh",
    ),
    *("lm_eval", "lm-eval", "vllm", "npm", "mkdocs", "for", "done"),
}
"""Programs of others, of which nothing but the name is known."""


def check(text: str, files: frozenset[str] = frozenset()) -> None:
    """Wrong where one of a bash example's commands would not be understood; `files` are scripts of its page."""
    for words in commands(text):
        program, arguments = _program(words)
        if program in CHECKS:
            CHECKS[program](arguments)
        elif program.startswith(("benchmarks.", "tests.", "tiny_pair.")):
            module(program, arguments)
        elif program.startswith("python ") and (ROOT / program[7:]).is_file():
            script(ROOT / program[7:], arguments)
        elif program.split()[0] not in OTHERS and program.removeprefix("python ") not in files:
            raise Wrong(f"nothing is known about the program {program!r}")


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a bash example as words, without comments, redirections and variables before them."""
    for piece in _pieces(text.replace("\\\n", " ")):
        if words := _simple(shlex.split(piece)):
            yield words


def _pieces(text: str) -> Iterator[str]:
    """A script cut at line ends, `;`, `&` and `|` that are not in quotes, without comments."""
    piece, quote, at = "", "", 0
    while at < len(text):
        char = text[at]
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == "#" and (not piece or piece[-1].isspace()):
            at = text.find("\n", at)
            at = len(text) if at < 0 else at
            continue
        elif char in "\n;|" or (char == "&" and not piece.endswith(">")):
            yield piece
            piece, at = "", at + 1
            continue
        piece, at = piece + char, at + 1
    yield piece


def _simple(words: list[str]) -> list[str]:
    """Words of one command without what comes before and after it: `do`, VARIABLE=value, `> file`."""
    cut = next((i for i, word in enumerate(words) if word in (">", ">>", "<", "2>", "2>&1", ">&")), len(words))
    words = words[:cut]
    while words and (words[0] in ("do", "nohup", "time", "exec") or re.fullmatch(r"[A-Z_][A-Z_0-9]*=.*", words[0])):
        words = words[1:]
    return words


def _program(words: list[str]) -> tuple[str, list[str]]:
    """(program, arguments): launchers are taken off, `python -m module` is the module."""
    if words[0] in ("torchrun", "accelerate"):
        at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if at is None:
            raise Wrong(f"{words[0]} starts no script: {' '.join(words)}")
        return f"python {words[at]}", words[at + 1 :]
    if re.fullmatch(r"(\.venv[\w-]*/bin/)?python3?", words[0]) and len(words) > 1:
        if words[1] == "-m" and len(words) > 2:
            return words[2], words[3:]
        return f"python {words[1]}", words[2:]
    return words[0], words[1:]
