"""`python -m teacher_server keys`: makes, lists and removes keys of clients in a file of hashes.

A running server takes changes in within a second. It knows no server.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from teacher_server.auth import Permission
from teacher_server.keys import KeyFileError, StoredKey, make_key, read, write

DEFAULT_FILE = "teacher-keys.json"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m teacher_server keys",
        description="Keys of clients, kept as hashes. A running server takes a changed file in within a second.",
    )
    parser.add_argument(
        "--keys-file",
        metavar="FILE",
        default=os.environ.get("TEACHER_KEYS_FILE") or DEFAULT_FILE,
        help=f"The file [default: TEACHER_KEYS_FILE, else {DEFAULT_FILE}].",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{add,list,remove}")
    add = commands.add_parser("add", help="Make a key and print it, once.")
    add.add_argument("name", help="The client; a second key of the same name lets it change over.")
    add.add_argument("--weight", type=float, metavar="N", help="Its share of the teacher [default: 1].")
    known = ",".join(permission.value for permission in Permission)
    add.add_argument("--may", metavar="LIST", default=known, help=f"What it may do [default: {known}].")
    commands.add_parser("list", help="Show names, weights and ids.")
    remove = commands.add_parser("remove", help="Remove the keys of a client, or one key by its id.")
    remove.add_argument("name", help="The client's name, or the id of one key.")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs one command; 0, or 2 for what cannot be done."""
    options = make_parser().parse_args(list(arguments))
    path = Path(options.keys_file)
    try:
        if options.command == "list":
            _show(read(path))
        elif options.command == "add":
            _add(path, options.name, options.weight, options.may)
        else:
            _remove(path, options.name)
    except KeyFileError as error:
        print(f"teacher_server keys: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"teacher_server keys: cannot write {path}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def _add(path: Path, name: str, weight: float | None, may: str) -> None:
    wanted = [word.strip() for word in may.split(",") if word.strip()]
    unknown = set(wanted) - {permission.value for permission in Permission}
    if unknown:
        raise KeyFileError(f"a key may do some of {', '.join(p.value for p in Permission)}, got {may!r}")
    with _changing(path) as keys:
        same = [key for key in keys.values() if key.client.name == name]
        if same and weight not in (None, same[0].client.weight):
            raise KeyFileError(
                f"{name} has a key with weight {same[0].client.weight:g}, and a client has one weight; remove it first"
            )
        share = same[0].client.weight if same else 1.0 if weight is None else weight
        key, stored = make_key(name, share, map(Permission, wanted))
        keys[stored.id] = stored
    print(key)
    print(f"That is the key of {name}, shown this once; its hash is in {path}.", file=sys.stderr)


def _remove(path: Path, name: str) -> None:
    with _changing(path) as keys:
        gone = [key.id for key in keys.values() if name in (key.client.name, key.id)]
        if not gone:
            raise KeyFileError(f"{path} has no key of {name}; `keys list` shows what there is")
        for key_id in gone:
            del keys[key_id]
    print(f"removed {len(gone)} of {name}: {', '.join(gone)}")


def _show(keys: dict[str, StoredKey]) -> None:
    rows = [("name", "weight", "may", "id", "made")]
    for key in sorted(keys.values(), key=lambda key: (key.client.name, key.created)):
        may = ",".join(sorted(permission.value for permission in key.client.may))
        rows.append((key.client.name, f"{key.client.weight:g}", may, key.id, key.created))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def _changing(path: Path) -> Iterator[dict[str, StoredKey]]:
    """The keys to change, written at the end; two commands at the same time do not lose each other's."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = read(path) if path.exists() else {}
        yield keys
        write(path, keys.values())
    finally:
        os.close(folder)
