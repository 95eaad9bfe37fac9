"""Writes the pages' pictures: `python docs/pictures/draw.py`; `--check` only says which are stale."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from svg import Picture

HERE = Path(__file__).resolve().parent


def shape() -> Picture:
    """The whole: trainers, people, one teacher."""
    p = Picture(860, 300, "Student trainers and people call one teacher server over gRPC or HTTP")
    for i, name in enumerate(("student trainer", "student trainer")):
        p.box(24, 28 + 82 * i, 190, 62, name, "its own GPU, the student")
    p.box(24, 192, 190, 62, "curl, a notebook", "JSON for people", kind="soft")
    for y in (59, 141, 223):
        p.arrow((214, y), (330, y), (330, 141), (396, 141), both=False) if y != 141 else p.arrow((214, y), (396, y))
    p.text(222, 285, "gRPC or HTTP: Score · Generate · GetTeacher", "small")
    p.box(400, 24, 436, 232, kind="soft")
    p.text(418, 48, "teacher server, on its own GPU node", "bold")
    p.box(418, 66, 120, 150, "transports", "gRPC :50051", "HTTP :8000", "keys, TLS, limits")
    p.box(558, 66, 120, 150, "service", "checks", "fair queue", "score cache")
    p.box(698, 66, 120, 150, "backend", "vLLM", "or transformers", "many GPUs")
    p.arrow((538, 141), (556, 141))
    p.arrow((678, 141), (696, 141))
    p.text(418, 242, "arrays in, arrays out: never a Python object for a token", "small")
    return p


PICTURES = {"shape": shape}


def main() -> int:
    """Writes every picture, or with --check names the stale ones and returns 1."""
    found = {HERE / f"{name}.svg": make().svg() for name, make in PICTURES.items()}
    if "--check" in sys.argv:
        stale = [p.name for p, text in found.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
        print("\n".join(f"{name} is stale; run python docs/pictures/draw.py" for name in stale) or "all are fresh")
        return bool(stale)
    for path, text in found.items():
        path.write_text(text, encoding="utf-8")
    print(f"wrote {len(found)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
