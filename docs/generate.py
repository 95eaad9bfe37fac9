"""Writes the pages that follow from code: `python docs/generate.py`; `--check` only says whether they are stale.

docs/configuration.md from the two configuration models and their docstrings, docs/api.md from the .proto's comments,
the error table, the HTTP routes and the metrics. It knows pages, not how anything works.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import memory_tables  # noqa: E402

NOTICE = "<!-- Written by docs/generate.py from the code; edit the docstrings there. -->\n\n"


def cell(text: str) -> str:
    """A text as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def type_name(annotation: Any) -> str:
    """How a field's type reads in a table."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"(typing\.|student_trainer\.teacher_section\.|annotated_types\.|pathlib\.)", "", text)
    text = re.sub(r"Annotated\[(\w+), .*\]", r"\1", text)
    return text.replace("Literal", "").replace("NoneType", "none").replace("None", "none")


def table_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    """The fields of one pydantic model as rows: key, type, default, meaning."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for plain, field in model.model_fields.items():
        name = field.alias or plain
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            rows += table_of(inner, f"{prefix}{name}.")[2:]
            continue
        default = field.get_default(call_default_factory=True)
        shown = "none" if default is None else "" if default == "" else f"`{default}`"
        shown = "required" if field.is_required() else shown
        meaning = cell(field.description or "")
        assert meaning, f"{model.__name__}.{name} has no docstring"
        entries = [a for a in get_args(inner) if isinstance(a, type) and issubclass(a, BaseModel)]
        rows.append(f"| `{prefix}{name}` | {cell(type_name(field.annotation))} | {cell(shown)} | {meaning} |")
        for entry in entries:
            rows += table_of(entry, f"{prefix}{name}[].")[2:]
    return rows


def help_text(command: list[str]) -> str:
    """What `command --help` prints at a width of 100 columns."""
    env = {**os.environ, "COLUMNS": "100"}
    run = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def configuration_page() -> str:
    """docs/configuration.md."""
    from student_trainer.config import Config
    from teacher_server.config import ServerConfig

    lines = ["# Configuration", "", NOTICE.strip(), ""]
    lines += [
        "## The trainer",
        "",
        "A value comes from the command line (`section.key=value`), else from the environment",
    ]
    lines += [
        "(`STRONG2WEAK_SECTION__KEY`), else from the file given with `--config` (YAML or JSON), else from the default. "
        "Unknown"
    ]
    lines += ["keys are refused with the nearest name. `--dry-run` prints what a run would use.", ""]
    lines += ["```text", help_text(["main_distillation.py"]), "```", ""]
    for section, field in Config.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        lines += [f"### `{section}`", "", cell(model.__doc__ or ""), "", *table_of(model), ""]
    lines += [
        "## The teacher server",
        "",
        "A value comes from the command line, else from the environment (`TEACHER_KEY`), else from",
    ]
    lines += [
        "`--config FILE` (YAML), else from the default. `section.key` of a file is `--section-key` on the command line"
    ]
    lines += ["and `TEACHER_SECTION_KEY` in the environment.", ""]
    lines += ["```text", help_text(["-m", "teacher_server"]), "```", "", *table_of(ServerConfig), ""]
    return "\n".join(lines)


def proto_section() -> list[str]:
    """The service and its messages, from the comments of the .proto."""
    lines: list[str] = []
    comment: list[str] = []
    for raw in (ROOT / "protos/teacher/v1/teacher.proto").read_text().splitlines():
        line = raw.strip()
        if line.startswith("//"):
            comment.append(line[2:].strip())
            continue
        text = cell(" ".join(comment))
        if opened := re.match(r"(message|enum|service) (\w+)", line):
            kind, name = opened.groups()
            lines += ["", f"### {kind} `{name}`", "", text, ""]
            if "{}" not in line:
                lines += ["| name | type | meaning |", "|---|---|---|"]
        elif method := re.match(r"rpc (\w+)\((.*?)\) returns \((.*?)\)", line):
            name, request, response = method.groups()
            lines.append(f"| `{name}` | `{request}` → `{response}` | {text} |")
        elif value := re.match(r"([A-Z_]+) = (\d+);", line):
            lines.append(f"| `{value[1]}` | {value[2]} | {text} |")
        elif field := re.match(r"((?:repeated |optional )?\w+) (\w+) = (\d+);", line):
            lines.append(f"| `{field[2]}` | {field[1]} | {text} |")
        comment = []
    return lines


def metrics_table(metrics: list[tuple[str, str, tuple[str, ...], str]]) -> list[str]:
    """Metrics as a table."""
    rows = [f"| `{name}` | {kind} | {', '.join(labels)} | {cell(text)} |" for name, kind, labels, text in metrics]
    return ["| metric | type | labels | meaning |", "|---|---|---|---|", *rows]


def api_page() -> str:
    """docs/api.md."""
    from protos import errors
    from student_trainer import metrics_server
    from teacher_server.metrics import describe_metrics
    from teacher_server.transports.http_app import describe_routes

    lines = ["# API", "", NOTICE.strip(), ""]
    lines += [
        "Both transports carry the same messages and errors. Over gRPC: `teacher.v1.TeacherService`, with "
        "`grpc.health.v1.Health`"
    ]
    lines += [
        "and server reflection. Over HTTP: JSON for people, and with `Content-Type: application/x-protobuf` the same "
        "messages."
    ]
    lines += ["", "## HTTP routes", "", "| route | meaning |", "|---|---|"]
    lines += [f"| `{method} {path}` | {cell(text)} |" for method, path, text in describe_routes()]
    lines += ["", "## Errors", ""]
    lines += [
        "HTTP bodies are problem details (RFC 9457) with `reason` and, where there is one, `index`; gRPC statuses carry"
    ]
    lines += ["ErrorInfo (`reason`, domain `strong2weak`) and RetryInfo where a retry makes sense.", ""]
    lines += ["| class | reason | gRPC | HTTP | retry | meaning |", "|---|---|---|---|---|---|"]
    for kind in errors.TABLE:
        retry = "yes" if kind.retryable else "no"
        meaning = cell((kind.__doc__ or "").split("\n\n")[0])
        reason = errors.reason_of(kind)
        lines.append(f"| {kind.__name__} | `{reason}` | {kind.grpc_code} | {kind.http_status} | {retry} | {meaning} |")
    lines += [
        "",
        "## Metrics",
        "",
        "`GET /metrics` in Prometheus' text format.",
        "",
        *metrics_table(describe_metrics()),
    ]
    lines += ["", "## Metrics of a trainer", "", "`GET /metrics` at `training.metrics_port`, of process 0.", ""]
    lines += metrics_table(metrics_server.describe_metrics())
    lines += ["", "## Messages", *proto_section(), ""]
    return "\n".join(lines)


PAGES = {"docs/configuration.md": configuration_page, "docs/api.md": api_page, **memory_tables.pages()}


def stale() -> list[str]:
    """Names of the pages that differ from what the code says."""
    return [n for n, page in PAGES.items() if not (ROOT / n).exists() or (ROOT / n).read_text() != page()]


def main() -> int:
    """Writes the pages, or with --check names the stale ones and returns 1."""
    if "--check" in sys.argv:
        names = stale()
        print("\n".join(f"{n} is stale; run python docs/generate.py" for n in names) or "the pages are fresh")
        return bool(names)
    for name, page in PAGES.items():
        (ROOT / name).write_text(page())
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
