"""Writing files and folders so that a reader, or a run that goes on after a crash, never meets half of one.

Names change only after the contents are on the disk. Knows no format. A full disk raises what the system raises;
`errors.explain` turns that into one line.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, in place of what stood there, in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)


def replace_folder(source: Path, target: Path) -> None:
    """Puts the folder `source` where `target` is; a crash in between leaves one of the two whole (see
    `recover_folder`).
    """
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path, staging: Path) -> None:
    """Removes a folder; a crash in between leaves the rest of it in `staging`, under a name that nobody reads."""
    staging.mkdir(parents=True, exist_ok=True)
    doomed = staging / f"removed-{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Finishes or undoes a `replace_folder` that a crash interrupted."""
    old = target.with_name(f".{target.name}.old")
    if old.is_dir():
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, target)


def keep_aside(folder: Path) -> Path | None:
    """Renames an existing, non-empty `folder` to `folder.1`, `folder.2`, ...; the new name, or None where nothing was
    there.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    os.replace(folder, aside)
    return aside
