"""Reads ServerConfig from its sources: command line over environment over file over defaults.

Every option, variable and key is made from the model's fields; a name that is none of them is refused with the nearest
one. A field of a section, a model inside the model, is `section.field` in a file, `--section-field` as an option and
SECTION_FIELD in a variable's name. It knows the fields' names, not their meaning.
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
from pydantic import BaseModel, ValidationError
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


def _option(path: str) -> str:
    return "--" + re.sub("[._]", "-", path)


def _variable(path: str) -> str:
    return PREFIX + path.replace(".", "_").upper()


def _leaves(model: type[BaseModel] = ServerConfig, prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting by its path, `field` or `section.field`."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= _leaves(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


LEAVES = _leaves()


def make_parser() -> argparse.ArgumentParser:
    """The command line, one option for each field."""
    parser = _Parser(
        prog="python -m teacher_server",
        description="Serves one teacher model: scores and completions over gRPC and HTTP.",
        epilog="Commands: keys, ping, score and top; each has its own --help. "
        f"Each option is also a variable ({PREFIX}GRPC_PORT=0) and a key of the --config file (grpc_port: 0).",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for name, field in LEAVES.items():
        text = (field.description or "").replace("%", "%%")
        unset = field.is_required() or field.default_factory is not None or field.default in (None, "")
        default = "" if unset else f" [default: {field.default}]"
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
    if get_origin(field.annotation) is dict:
        return "JSON"
    if name.endswith("_file"):
        return "FILE"
    if field.annotation is str:
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
        return ServerConfig(**_nested(values)), dry_run
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault, origins) for fault in error.errors())) from error


def _explain(fault: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    if not fault["loc"] or fault["type"] == "value_error":
        return str(fault["msg"]).removeprefix("Value error, ")
    name = _path(fault["loc"])
    if fault["type"] == "missing":
        return f"{name} is missing: give {_option(name)}, {_variable(name)} or the key {name} of a file"
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
    flat = _flat(loaded)
    _refuse_unknown(flat, LEAVES, f"key {{}} in {path}")
    return flat


def _flat(loaded: Mapping[Any, Any]) -> dict[str, Any]:
    """The values by path; ConfigError for a section that is no mapping."""
    sections = {path.split(".")[0] for path in LEAVES if "." in path}
    found: dict[str, Any] = {}
    for name, value in loaded.items():
        if name in sections:
            if not isinstance(value, dict):
                raise ConfigError(f"the section {name} of a file must hold keys and values, got {value!r}")
            found |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            found[str(name)] = value
    return found


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the model takes them; mappings may come as text from a command line or a variable."""
    found: dict[str, Any] = {}
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        inside = found.setdefault(section, {}) if section else found
        inside[name] = _mapping(value) if get_origin(LEAVES[path].annotation) is dict else value
    return found


def _mapping(value: Any) -> Any:
    """A mapping written as JSON or YAML; what is none is left for the model to refuse."""
    if not isinstance(value, str):
        return value
    try:
        loaded = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    return {} if loaded is None else loaded


def _path(location: tuple[Any, ...]) -> str:
    """The setting in which a fault lies."""
    names = [str(part) for part in location]
    return next((path for path in (".".join(names[:2]), names[0]) if path in LEAVES), names[0])


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    paths = {_variable(path): path for path in LEAVES}
    found = {name: value for name, value in environ.items() if name.startswith(PREFIX)}
    found = {name: value for name, value in found.items() if not KUBERNETES.fullmatch(name)}
    found.pop(f"{PREFIX}CONFIG", None)
    _refuse_unknown(found, paths, "environment variable {}")
    return {paths[name]: value for name, value in found.items()}


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
