"""What each program of the project would say to the words of an example, by its own parser and without running it.

So an option, a setting, a route, a service or an extra that is gone fails. Knows no page.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.bodies import check_body
from tests.docs.examples import ROOT

COMPOSE = {"up", "run", "stop", "down", "logs", "build", "ps", "exec", "kill", "restart", "config", "start"}
COMPOSE_VALUES = {"--entrypoint", "-e", "--env", "--name", "--scale", "-v", "--timeout", "-t", "--tail"}
"""Options of Compose's commands that take a value."""


class Wrong(Exception):
    """What is wrong with a command."""


def _parse(parse: Callable[[list[str]], Any], arguments: list[str]) -> Any:
    """What a parser makes of the arguments; None for --help."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return parse(arguments)
    except SystemExit as end:
        if end.code:
            raise Wrong(said.getvalue().strip().splitlines()[-1]) from None
    return None


def server(arguments: list[str]) -> None:
    """`python -m teacher_server ...`: settings, or a command's options."""
    from teacher_server.settings import ConfigError, load

    if arguments and not arguments[0].startswith("-"):
        _command("teacher_server.commands", {"keys": "teacher_server.keys_command"}, arguments)
        return
    try:
        load([word for word in arguments if word not in ("--help", "-h")] or ["--model", "MODEL"], {})
    except ConfigError as error:
        raise Wrong(str(error)) from error


def trainer(arguments: list[str]) -> None:
    """`python main_distillation.py ...`: flags and settings, or a command's options."""
    from student_trainer.__main__ import make_parser
    from student_trainer.errors import UserError
    from student_trainer.settings import load_config

    if arguments and re.fullmatch(r"[a-z]+", arguments[0]):
        _command("student_trainer.commands", {"export": "student_trainer.export"}, arguments)
        return
    options = _parse(make_parser().parse_intermixed_args, arguments)
    if options is None:
        return
    file = options.config
    in_tree = file is not None and (ROOT / file).is_file()
    if file is not None and file.parts[0] == "config" and not in_tree:
        raise Wrong(f"the tree has no {file}")
    settings = list(options.settings)
    if isinstance(options.resume, str) and "=" in options.resume:
        settings.append(options.resume)
    try:
        load_config(ROOT / file if in_tree else None, settings, {})
    except UserError as error:
        raise Wrong(str(error)) from error


def _command(package: str, elsewhere: dict[str, str], arguments: list[str]) -> None:
    """Parses a command's arguments with its own parser: `make_parser`, or the one that its `main` gives to `run`."""
    try:
        found = importlib.import_module(elsewhere.get(arguments[0], f"{package}.{arguments[0]}"))
    except ModuleNotFoundError as error:
        raise Wrong(f"there is no command {arguments[0]}") from error
    if hasattr(found, "make_parser"):
        _parse(found.make_parser().parse_args, arguments[1:])
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(found, "run", lambda parser, given, command: parser.parse_args(given) and 0)
        _parse(found.main, arguments[1:])


def script(path: Path, arguments: list[str]) -> None:
    """Options of a script of the tree must stand in its source, or beside it, where its parser may be."""
    sources = "".join(p.read_text(encoding="utf-8") for p in [path, *path.parent.rglob("*.py")])
    for word in arguments:
        if word.startswith("--") and f'"{word.split("=")[0]}"' not in sources:
            raise Wrong(f"{path.relative_to(ROOT)} has no option {word}")


def module(name: str, arguments: list[str]) -> None:
    """The same of `python -m name`."""
    path = ROOT / (name.replace(".", "/") + ".py")
    if not path.is_file():
        raise Wrong(f"there is no module {name}")
    script(path, arguments)


def pip(arguments: list[str]) -> None:
    """`pip install` of this project: its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in arguments:
        match = re.fullmatch(r"(?:\.|strong2weak)\[([\w,-]+)\]", word)
        unknown = set(match[1].split(",")) - set(project["optional-dependencies"]) if match else set()
        if unknown:
            raise Wrong(f"there is no extra {', '.join(sorted(unknown))}")


def make(arguments: list[str]) -> None:
    """`make`: its targets."""
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for word in arguments:
        if "=" not in word and word not in targets:
            raise Wrong(f"the Makefile has no target {word}")


def curl(arguments: list[str]) -> None:
    """`curl`: a route of the teacher, and a body that this route takes."""
    from teacher_server.transports.http_app import describe_routes

    url = next((word for word in arguments if re.match(r"https?://", word)), None)
    if url is None:
        raise Wrong("curl without an address")
    path = re.sub(r"https?://[^/]*", "", url).split("?")[0] or "/"
    if path not in {route for _, route, _ in describe_routes()}:
        raise Wrong(f"the teacher has no route {path}")
    for option, value in itertools.pairwise(arguments):
        is_body = option in ("-d", "--data", "--json") and not value.startswith("@")
        if is_body and (problem := check_body(path, value)):
            raise Wrong(problem)


def docker(arguments: list[str]) -> None:
    """`docker compose` with profiles and services of the compose file; docker's other commands are not looked at."""
    if not arguments or arguments[0] != "compose":
        return
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    profiles = {name for service in services.values() for name in service.get("profiles", [])}
    parser = argparse.ArgumentParser()
    for option in ("--profile", "--file", "--env-file"):
        parser.add_argument(option, action="append", default=[])
    parser.add_argument("command", choices=sorted(COMPOSE))
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    options = _parse(parser.parse_args, arguments[1:])
    if unknown := set(options.profile) - profiles:
        raise Wrong(f"docker-compose.yml has no profile {', '.join(sorted(unknown))}")
    named = _after_options(options.rest)
    for word in named[:1] if options.command in ("run", "exec") else named:
        if word not in services:
            raise Wrong(f"docker-compose.yml has no service {word}")


def _after_options(words: list[str]) -> list[str]:
    """The words that are neither options nor their values."""
    before = ["", *words][: len(words)]
    return [w for last, w in zip(before, words, strict=True) if not w.startswith("-") and last not in COMPOSE_VALUES]


CHECKS: dict[str, Callable[[list[str]], Any]] = {
    "teacher_server": server,
    "student_trainer": trainer,
    "python main_distillation.py": trainer,
    "pip": pip,
    "make": make,
    "curl": curl,
    "docker": docker,
    "python -c": lambda arguments: compile(arguments[0], "example", "exec"),
}
