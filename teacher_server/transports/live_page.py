"""The page at / for people: one document with its style and script inside, which loads nothing but `status`.

Its policy lets a browser run that one script and talk to this server alone, so it works offline and clients' names can
do no harm. It holds no data itself.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

_FOLDER = files("teacher_server") / "page"


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page() -> tuple[str, dict[str, str]]:
    """The document, and the headers that it is served with."""
    body, style, script = _read("live.html"), _read("live.css"), _read("live.js")
    document = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Teacher</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{style}</style>\n</head>\n<body>\n{body}<script>{script}</script>\n</body>\n</html>\n"
    )
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return document, {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }
