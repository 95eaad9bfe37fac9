"""What a finished folder holds, in `manifest.json`: the size and the SHA-256 of every file.

`seal` writes it last and flushes the folder to the disk, so a folder that has one was written to its end; `damage` says
whether it still is what was sealed. transformers ignores the file. Knows no model and no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .storage import flush, write_json

NAME = "manifest.json"
READERS = 4
"""Files that are hashed at a time; hashing lets other threads run."""


def seal(folder: Path) -> None:
    """Writes the manifest of `folder`, then flushes every file and folder in it to the disk."""
    files = _files(folder)
    with ThreadPoolExecutor(READERS) as pool:
        sums = pool.map(_digest, files)
        about = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(files, sums, strict=True)
        }
    write_json(folder / NAME, {"files": about})
    for path in sorted(folder.rglob("*"), reverse=True):
        flush(path)
    flush(folder)


def damage(folder: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a sealed folder, with the numbers, or None. Without `contents` only names and sizes are looked
    at. Files that came later are no damage.
    """
    try:
        files = json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
        known = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"it has no {NAME}, so it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {NAME} cannot be read ({type(error).__name__})"
    for name, (size, _) in known.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    if contents:
        with ThreadPoolExecutor(READERS) as pool:
            sums = pool.map(lambda name: _digest(folder / name), known)
            for (name, (_, digest)), found in zip(known.items(), sums, strict=True):
                if found != digest:
                    return f"the contents of {name} are not those that were written (SHA-256 differs)"
    return None


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in _files(folder))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
