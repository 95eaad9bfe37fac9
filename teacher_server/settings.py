"""Reads ServerConfig from its sources: command line over environment over file over defaults.

Every option, variable and key is made from the model's fields; a name that is none of them is refused with the nearest
one. It knows the fields' names, not their meaning.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from teacher_server.config import ServerConfig

PREFIX = "TEACHER_"
KUBERNETES = re.compile(r"TEACHER_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
"""Variables that Kubernetes sets in every pod beside a service named "teacher"; they are not ours."""


class ConfigError(ValueError):
    """The configuration cannot be used; the message has one line for each fault and names its source."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def make_parser() -> argparse.ArgumentParser:
    """The command line, one option for each field."""
    parser = _Parser(
        prog="python -m teacher_server",
        description="Serves one teacher model: scores and completions over gRPC and HTTP.",
        epilog=f"Each option is also a variable ({PREFIX}GRPC_PORT=0) and a key of the --config file (grpc_port: 0).",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for name, field in ServerConfig.model_fields.items():
        text = (field.description or "").replace("%", "%%")
        default = "" if field.is_required() or field.default in (None, "") else f" [default: {field.default}]"
        if field.annotation is bool:
            action = argparse.BooleanOptionalAction if field.default else "store_true"
            parser.add_argument(_option(name), dest=name, action=action, help=text)
        else:
            parser.add_argument(_option(name), dest=name, metavar=_metavar(name, field), help=text + default)
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings.")
    parser.add_argument("--dry-run", action="store_true", help="Print the resolved settings as YAML and stop.")
    return parser


def _metavar(name: str, field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return "{" + ",".join(map(str, get_args(field.annotation))) + "}"
    if field.annotation is str or name == "ready_file":
        return name.upper()
    return "N"


def load(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> tuple[ServerConfig, bool]:
    """(configuration, whether only to print it); ConfigError for anything that cannot be used."""
    parser = make_parser()
    parsed, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        name = unknown[0].split("=")[0]
        options = [option for action in parser._actions for option in action.option_strings]
        raise ConfigError(f"unknown argument {name}{_nearest(name, options)}")
    given = dict(vars(parsed))
    dry_run = bool(given.pop("dry_run", False))
    file = given.pop("config", None) or environ.get(f"{PREFIX}CONFIG")
    sources: dict[str, dict[str, Any]] = {
        f"file {file}": _from_file(file) if file else {},
        "environment": _from_environment(environ),
        "command line": given,
    }
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source, settings in sources.items():
        values |= settings
        origins |= dict.fromkeys(settings, source)
    try:
        return ServerConfig(**values), dry_run
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault, origins) for fault in error.errors())) from error


def _explain(fault: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    if not fault["loc"]:
        return str(fault["msg"]).removeprefix("Value error, ")
    name = str(fault["loc"][0])
    if fault["type"] == "missing":
        return f"{name} is missing: give {_option(name)}, {PREFIX}{name.upper()} or the key {name} of a file"
    return f"{name} ({origins.get(name, 'default')}): {fault['msg']}, got {fault['input']!r}"


def _from_file(path: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold keys and values, it holds a {type(loaded).__name__}")
    _refuse_unknown(loaded, ServerConfig.model_fields, f"key {{}} in {path}")
    return loaded


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    found = {name: value for name, value in environ.items() if name.startswith(PREFIX)}
    found = {name: value for name, value in found.items() if not KUBERNETES.fullmatch(name)}
    found.pop(f"{PREFIX}CONFIG", None)
    _refuse_unknown(found, [PREFIX + name.upper() for name in ServerConfig.model_fields], "environment variable {}")
    return {name.removeprefix(PREFIX).lower(): value for name, value in found.items()}


def _refuse_unknown(given: Iterable[Any], known: Iterable[str], what: str) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown {what.format(name)}{_nearest(str(name), known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def render(config: ServerConfig) -> str:
    """The resolved settings as YAML that --config takes."""
    text: str = yaml.safe_dump(config.model_dump(), sort_keys=False)
    return text


def report(error: ConfigError) -> None:
    """Prints a configuration's faults."""
    for line in str(error).splitlines():
        print(f"teacher_server: {line}", file=sys.stderr)
