"""Checks the commands of an example without running them: programs, options, settings, bodies, files of the tree.

Each program of the project is asked through its own parser, so that an option or a key that is gone fails. A program
of others (openssl, curl's own options) is only known by name; one that is not known here is a mistake in the example or
belongs into OTHERS.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.bodies import check_body
from tests.docs.examples import ROOT

OTHERS = set(
    "openssl printf cat ray git cd export curl echo mkdir source . uv ls sleep kill wait grpcurl docker".split()
)
OTHERS |= set(
    "helm kubectl tensorboard trackio nvidia-smi chmod cp scp ssh lm_eval vllm npm mkdocs for do done".split()
)


class Wrong(Exception):
    """What is wrong with a command."""


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
    while words and (words[0] in ("do", "then", "nohup", "time") or re.fullmatch(r"[A-Z_][A-Z_0-9]*=.*", words[0])):
        words = words[1:]
    return words


def check(text: str) -> None:
    """Wrong where one of a bash example's commands would not be understood."""
    for words in commands(text):
        program, arguments = _program(words)
        checker = CHECKS.get(program)
        if checker is not None:
            checker(arguments)
        elif program.startswith("python ") and (ROOT / program[7:]).is_file():
            _script(ROOT / program[7:], arguments)
        elif program.split()[0] not in OTHERS:
            raise Wrong(f"nothing is known about the program {program!r}")


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


def _parse(parse: Callable[[list[str]], Any], arguments: list[str]) -> Any:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return parse(arguments)
    except SystemExit as end:
        if end.code:
            raise Wrong(said.getvalue().strip().splitlines()[-1]) from None
    return None


def _server(arguments: list[str]) -> None:
    from teacher_server.settings import ConfigError, load

    if arguments and not arguments[0].startswith("-"):
        _subcommand("teacher_server.commands", {"keys": "teacher_server.keys_command"}, arguments)
        return
    try:
        load(arguments, {})
    except ConfigError as error:
        raise Wrong(str(error)) from error


def _trainer(arguments: list[str]) -> None:
    from student_trainer.__main__ import make_parser
    from student_trainer.errors import UserError
    from student_trainer.settings import load_config

    if arguments and re.fullmatch(r"[a-z]+", arguments[0]):
        _subcommand("student_trainer.commands", {"export": "student_trainer.export"}, arguments)
        return
    options = _parse(make_parser().parse_intermixed_args, arguments)
    if options is None:
        return
    file = options.config
    if file is not None and file.parts[0] == "config" and not (ROOT / file).is_file():
        raise Wrong(f"the tree has no {file}")
    settings = list(options.settings)
    if isinstance(options.resume, str) and "=" in options.resume:
        settings.append(options.resume)
    try:
        load_config(ROOT / file if file is not None and (ROOT / file).is_file() else None, settings, {})
    except UserError as error:
        raise Wrong(str(error)) from error


def _subcommand(package: str, elsewhere: dict[str, str], arguments: list[str]) -> None:
    """Parses a command's arguments with its own parser: `make_parser`, or the one that its `main` gives to `run`."""
    name = elsewhere.get(arguments[0], f"{package}.{arguments[0]}")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Wrong(f"there is no command {arguments[0]}") from error
    if hasattr(module, "make_parser"):
        parser = module.make_parser()
        _parse(
            getattr(parser, "parse_intermixed_args", parser.parse_args)
            if not _has_commands(parser)
            else parser.parse_args,
            arguments[1:],
        )
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run", lambda parser, given, command: parser.parse_args(given) and 0)
        _parse(module.main, arguments[1:])


def _has_commands(parser: argparse.ArgumentParser) -> bool:
    return any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)


def _script(path: Path, arguments: list[str]) -> None:
    """Options of a script of the tree must stand in its source, or in that of the package that has its parser."""
    sources = "".join(p.read_text(encoding="utf-8") for p in [path, *path.parent.rglob("*.py")])
    for word in arguments:
        if word.startswith("--") and f'"{word.split("=")[0]}"' not in sources:
            raise Wrong(f"{path.relative_to(ROOT)} has no option {word}")


def _module(arguments: list[str], name: str) -> None:
    path = ROOT / (name.replace(".", "/") + ".py")
    if not path.is_file():
        raise Wrong(f"there is no module {name}")
    _script(path, arguments)


def _pip(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in arguments:
        if match := re.fullmatch(r"(?:\.|strong2weak)\[([\w,-]+)\]", word):
            unknown = set(match[1].split(",")) - set(project["optional-dependencies"])
            if unknown:
                raise Wrong(f"there is no extra {', '.join(sorted(unknown))}")


def _make(arguments: list[str]) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for word in arguments:
        if "=" not in word and word not in targets:
            raise Wrong(f"the Makefile has no target {word}")


def _curl(arguments: list[str]) -> None:
    url = next((word for word in arguments if re.match(r"https?://", word)), None)
    if url is None:
        raise Wrong("curl without an address")
    path = re.sub(r"https?://[^/]*", "", url) or "/"
    if not _is_route(path.split("?")[0]):
        raise Wrong(f"the teacher has no route {path}")
    for option, value in zip(arguments, arguments[1:], strict=False):
        if option in ("-d", "--data", "--json") and not value.startswith("@"):
            if problem := check_body(path, value):
                raise Wrong(problem)


def _is_route(path: str) -> bool:
    from teacher_server.transports.http_app import describe_routes

    return path in {route for _, route, _ in describe_routes()}


def _docker(arguments: list[str]) -> None:
    """`docker compose`: profiles and services are those of the compose file; other docker commands are not looked at."""
    if not arguments or arguments[0] != "compose":
        return
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    services = set(compose["services"])
    profiles = {p for service in compose["services"].values() for p in service.get("profiles", [])}
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", action="append", default=[])
    parser.add_argument("-f", "--file", action="append", default=[])
    parser.add_argument("--env-file")
    parser.add_argument("command")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    options = _parse(parser.parse_args, arguments[1:])
    if unknown := set(options.profile) - profiles:
        raise Wrong(f"docker-compose.yml has no profile {', '.join(sorted(unknown))}")
    if options.command not in ("up", "run", "stop", "down", "logs", "build", "ps", "exec", "kill", "restart", "config"):
        raise Wrong(f"docker compose has no command {options.command}")
    named = [w for w in _after_options(options.rest) if w]
    for word in named if options.command not in ("run", "exec") else named[:1]:
        if word not in services:
            raise Wrong(f"docker-compose.yml has no service {word}")


def _after_options(words: list[str]) -> list[str]:
    """The words that are neither options nor their values."""
    with_value = {"--entrypoint", "-e", "--env", "--name", "--scale", "-v", "--timeout", "-t", "--tail"}
    left, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word.startswith("-"):
            skip = word in with_value
        else:
            left.append(word)
    return left


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "teacher_server": _server,
    "student_trainer": _trainer,
    "python main_distillation.py": _trainer,
    "pip": _pip,
    "make": _make,
    "curl": _curl,
    "docker": _docker,
    "python -c": lambda arguments: compile(arguments[0], "example", "exec") and None,
}
for _name in (
    "benchmarks.score_cache",
    "tests.faults.test_raw_bytes",
    "tests.faults.test_merged",
    "tests.faults.training",
):
    CHECKS[_name] = lambda arguments, name=_name: _module(arguments, name)  # type: ignore[misc]
sys.path.insert(0, str(ROOT))
