"""A plain page of the routes, made from the OpenAPI document.

It has no script and loads nothing from elsewhere, so it works offline.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
pre{background:#8882;padding:.7rem;overflow:auto}code,pre{font:14px/1.4 ui-monospace,monospace}
h2 b{font-weight:600;margin-right:.6rem}
summary{cursor:pointer}td,th{text-align:left;padding:.15rem .8rem .15rem 0;vertical-align:top}
:root{color-scheme:light dark}"""


def render(document: dict[str, Any]) -> str:
    """The HTML page of an OpenAPI document."""
    schemas = document.get("components", {}).get("schemas", {})
    info = document["info"]
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}</title>',
        f"<style>{STYLE}</style><h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        f'<p>{escape(info.get("description", ""))} For programs: <a href="openapi.json">openapi.json</a>.',
    ]
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            parts.append(f"<h2><b>{method.upper()}</b><code>{escape(path)}</code></h2>")
            parts.append(f"<p>{escape(route.get('description') or route.get('summary', ''))}")
            body = route.get("requestBody", {}).get("content", {})
            if body:
                parts.append(f"<p>Body: {', '.join(f'<code>{escape(kind)}</code>' for kind in body)}")
                parts.append(_body(path, body.get("application/json", {}).get("schema", {}), schemas))
    parts.append("<h2>Models</h2>")
    parts.extend(
        f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>{_fields(model)}</details>'
        for name, model in sorted(schemas.items())
    )
    return "\n".join(parts)


def _body(path: str, schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    name = schema.get("$ref", "").rsplit("/", 1)[-1]
    if name not in schemas:
        return ""
    examples = "".join(
        f"<pre>curl -H 'content-type: application/json' http://localhost:8000{escape(path)} \\\n"
        f"  -d '{escape(json.dumps(example))}'</pre>"
        for example in schemas[name].get("examples", [])
    )
    return f'<p>Model: <a href="#{name}"><code>{name}</code></a>{_fields(schemas[name])}{examples}'


def _fields(model: dict[str, Any]) -> str:
    """A table of a model's fields, or its schema where it has none."""
    if "properties" not in model:
        return f"<pre>{escape(json.dumps(model, indent=1))}</pre>"
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code><td>{_type(field)}<td>{escape(field.get('description', ''))}"
        for name, field in model["properties"].items()
    )
    return f"<table>{rows}</table>"


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        name = escape(field["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in field:
        return " or ".join(_type(one) for one in field["anyOf"])
    if "enum" in field:
        return escape(" | ".join(map(str, field["enum"])))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return escape(str(field.get("type", "anything")))
