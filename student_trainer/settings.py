"""Where a configuration comes from: command line over environment over file over defaults.

It turns these into one `Config`, and everything wrong with them into lines that name the source and the key. It writes
configurations too, with each field's documentation. It starts nothing and imports neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from student_trainer.config import Config
from student_trainer.errors import UserError, one_line
from student_trainer.section import keys

ENV_PREFIX = "STRONG2WEAK_"
DEFAULT_FILE = Path("config/distillation_config.yaml")

KeyPath = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of YAML 1.2 (5e-5 is one, 1:30 is none), and which refuses a key given twice."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:int")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN))$"
    ),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (str, int, float, bool)) and key in keys:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key} is given twice", key_node.start_mark)
        if isinstance(key, (str, int, float, bool)):
            keys.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def load_config(
    file: Path | None,
    overrides: Sequence[str],
    environment: Mapping[str, str],
    flags: Mapping[KeyPath, Any] | None = None,
) -> Config:
    """The configuration; UserError with one line for everything that is wrong.

    `file` None takes config/distillation_config.yaml where it exists. `overrides` are `section.key=value`; `flags` are
    values of command-line flags such as --resume and win over all others.
    """
    if file is None and DEFAULT_FILE.is_file():
        file = DEFAULT_FILE
    content = {} if file is None else read_file(file)
    return make_config(content, str(file), overrides, environment, flags)


def make_config(
    content: Any,
    source: str,
    overrides: Sequence[str],
    environment: Mapping[str, str],
    flags: Mapping[KeyPath, Any] | None = None,
) -> Config:
    """As `load_config`, from a file's `content` that was read already; `source` names it in errors."""
    values: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    problems: list[str] = []
    sources = [
        *_file_values(content, source),
        *_environment_values(environment),
        *_override_values(overrides, problems),
    ]
    sources += [(path, value, "command line") for path, value in (flags or {}).items()]
    for path, value, origin in _single_keys(sources):
        if _check_known(path, origin, problems):
            _put(values, path, value)
            origins[path] = origin
    if not problems:
        try:
            return Config.model_validate(values)
        except ValidationError as error:
            problems = list(_render(error, origins))
    raise UserError("\n".join(problems))


def _file_values(content: Any, source: str) -> Iterator[tuple[KeyPath, Any, str]]:
    if not isinstance(content, dict):
        raise UserError("not a configuration: sections with keys are expected", source, _HOW)
    yield from (((str(section),), inner, source) for section, inner in content.items())


def _single_keys(sources: Iterable[tuple[KeyPath, Any, str]]) -> Iterator[tuple[KeyPath, Any, str]]:
    """The values with whole sections taken apart; a section that is named and left empty says nothing."""
    for path, value, source in sources:
        if len(path) > 1 or path[0] not in Config.model_fields:
            yield path, value, source
        elif isinstance(value, dict):
            yield from (((*path, str(key)), inner, source) for key, inner in value.items())
        elif value is not None:
            yield path, value, source


_HOW = "write one with --create_config and change it"


def read_file(file: Path) -> Any:
    """The content of a JSON or YAML file; UserError naming the line where it is broken."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError("no such configuration file", str(file), f"check --config, or {_HOW}") from None
    except UnicodeDecodeError as error:
        raise UserError("not a text file in UTF-8", str(file), _HOW) from error
    if not text.strip():
        raise UserError("the configuration file is empty", str(file), _HOW)
    if file.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"not valid JSON: {error.msg}", f"{file}, line {error.lineno}", "mend that line") from error
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader; JSON is YAML too
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or one_line(str(error))
        where = f"{file}, line {mark.line + 1}" if mark else str(file)
        raise UserError(f"not valid YAML: {what}", where, "mend that line") from error


def _environment_values(environment: Mapping[str, str]) -> Iterator[tuple[KeyPath, Any, str]]:
    for name in sorted(environment):
        if name.startswith(ENV_PREFIX):
            path = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
            yield path, _value(environment[name]), f"environment {name}"


def _override_values(overrides: Sequence[str], problems: list[str]) -> Iterator[tuple[KeyPath, Any, str]]:
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            problems.append(f"command line: {text} is neither a flag nor section.key=value; see --help")
            continue
        yield tuple(key.strip().split(".")), _value(raw), "command line"


def _value(raw: str) -> Any:
    """A value of the command line or environment as YAML; as it stands where it is plain text."""
    try:
        value = yaml.load(raw, Loader=_Loader)
    except yaml.YAMLError:
        return raw
    if isinstance(value, str) and not raw.lstrip().startswith(("'", '"')):
        return raw
    if isinstance(value, dict) and not raw.lstrip().startswith("{"):
        return raw
    return value


def _put(values: dict[str, Any], path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            inner = values[key] = {}
        values = inner
    values[path[-1]] = value


def _check_known(path: KeyPath, source: str, problems: list[str]) -> bool:
    """Whether the configuration has this key; adds a problem with the nearest name where not."""
    model: type[BaseModel] = Config
    for depth, key in enumerate(path):
        if key not in keys(model):
            problems.append(f"{source}: unknown key {'.'.join(path)}{_nearest(path, depth)}")
            return False
        annotation = keys(model)[key].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            if depth + 1 < len(path) and "dict" not in str(annotation):
                problems.append(
                    f"{source}: {'.'.join(path[: depth + 1])} is one value, it has no key {path[depth + 1]}"
                )
                return False
            return True
        model = annotation
    return True


def _nearest(path: KeyPath, depth: int) -> str:
    """The words that name the keys nearest to an unknown one whose first `depth` parts are known."""
    names, leaf = list(_all_keys()), path[-1]
    inside = ".".join((*path[:depth], ""))
    if depth:
        leaves = [name.removeprefix(inside) for name in names if name.startswith(inside)]
        matches = [inside + match for match in difflib.get_close_matches(leaf, leaves, n=1)]
    else:
        matches = [section for section in Config.model_fields if section.startswith(path[0])]
        matches = matches[:1] or difflib.get_close_matches(path[0], list(Config.model_fields), n=1, cutoff=0.7)
        matches = [".".join((*matches, *path[1:]))] if matches else []
    if not matches:
        leaves = sorted({name.rpartition(".")[2] for name in names})
        close = difflib.get_close_matches(leaf, leaves, n=1)
        matches = [name for name in names if close and name.rpartition(".")[2] == close[0]]
    return f", did you mean {' or '.join(matches)}?" if matches else "; --create_config writes a file with every key"


def _all_keys() -> Iterator[str]:
    for section, field in Config.model_fields.items():
        yield section
        assert isinstance(field.annotation, type)
        yield from (f"{section}.{key}" for key in keys(field.annotation))


def _render(error: ValidationError, origins: Mapping[KeyPath, str]) -> Iterator[str]:
    """One line for each key that pydantic refused: source, key and what is wrong; alternatives of a type are joined."""
    found: dict[KeyPath, tuple[list[str], str]] = {}
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
        value = problem.get("input")
        plain = problem["type"] != "value_error" and not isinstance(value, dict)
        got = f", got {json.dumps(value, default=str)}" if plain else ""
        place = problem["loc"]
        deep = len(place) > 2 and isinstance(place[2], int)  # an entry of a list of routes
        path = tuple(str(part) for part in place[: 4 if deep else 2])
        found.setdefault(path, ([], got))[0].append(message[:1].lower() + message[1:])
    for path, (messages, got) in found.items():
        named = (s for p, s in reversed(list(origins.items())) if p[: len(path)] == path and p[-1] in messages[0])
        source = origins.get(path) or origins.get(path[:2]) or next(named, "configuration")
        yield f"{source}: {'.'.join(path)}: {' or '.join(messages)}{got}"


def to_yaml(config: Config, comments: bool = False) -> str:
    """The configuration as YAML that loads back equal; with `comments`, each field's documentation above it."""
    lines: list[str] = []
    for name, field in type(config).model_fields.items():
        if comments:
            lines += ["", *_comment(field.description, "")]
        lines.append(f"{name}:")
        section = getattr(config, name)
        for plain, inner in type(section).model_fields.items():
            if comments:
                lines += _comment(inner.description, "  ")
            lines.append(f"  {inner.alias or plain}: {_scalar(getattr(section, plain))}")
    return "\n".join(lines).lstrip("\n") + "\n"


def _comment(text: str | None, indent: str) -> list[str]:
    return [f"{indent}# {line.strip()}" for line in (text or "").splitlines()]


def _scalar(value: Any) -> str:
    """A value on one line that YAML 1.1 and 1.2 read alike."""
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return f"{mantissa}{'' if '.' in mantissa else '.0'}e{exponent}" if e else mantissa
    if isinstance(value, BaseModel):
        return _scalar(value.model_dump(mode="json", exclude_none=True))
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(str(key))}: {_scalar(inner)}' for key, inner in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)


def create_config(file: Path) -> str:
    """Writes the documented defaults to `file`; a line that says what was done. UserError where another is there."""
    text = "# Every setting with its default. `python main_distillation.py --config FILE` reads it.\n" + to_yaml(
        Config(), comments=True
    )
    if file.exists():
        if file.read_text(encoding="utf-8") == text:
            return f"{file} is there already and holds the defaults"
        step = f"move it away, or write another one: --create_config --config {file.with_name('new_config.yaml')}"
        raise UserError("the file exists and was changed; it is left as it is", str(file), step)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return f"wrote {file} with every setting and its default"
