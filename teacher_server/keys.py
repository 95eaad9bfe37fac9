"""Keys of clients: a file of hashes, made and changed by commands, watched by a running server.

A key is 32 random bytes, so that it cannot be guessed at any speed. Its hash is therefore one salted BLAKE2b and not
scrypt: a slow hash protects what people choose, and would cost each call 50 ms or more. The file holds no key; who
reads it can call nothing. It knows no transport and no route.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from teacher_server.auth import ALL, MAX_NAME, Client, Permission

PREFIX = "s2w"
"""What every key begins with, so that scanners for secrets can find one that was published."""
NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")
KEY = re.compile(rf"{PREFIX}_([0-9a-f]{{12}})_([A-Za-z0-9_-]{{43}})")
MAX_WEIGHT = 1000.0
_PERSON = b"strong2weak key"


class KeyFileError(ValueError):
    """A file of keys, or a wish to change it, that cannot be used; the text is for the operator."""


@dataclass(frozen=True)
class StoredKey:
    """One line of the file. Several keys may have one name: the old and the new one while a client changes over."""

    id: str
    """12 hexadecimal digits, part of the key and no secret: finds the line, and names the key to `keys remove`."""
    client: Client
    salt: bytes
    digest: bytes
    created: str

    def matches(self, key: str) -> bool:
        """Whether `key` is this one, in a time that does not depend on where it differs."""
        return hmac.compare_digest(_digest(key, self.salt), self.digest)


def make_key(name: str, weight: float = 1.0, may: Iterable[Permission] = ALL) -> tuple[str, StoredKey]:
    """(a new key, what is kept of it); KeyFileError for a name or a weight that cannot be used."""
    key_id, salt = secrets.token_hex(6), secrets.token_bytes(16)
    key = f"{PREFIX}_{key_id}_{secrets.token_urlsafe(32)}"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = _entry(name, weight, [p.value for p in may]) | {"id": key_id, "created": now}
    return key, _stored(entry | {"salt": salt.hex(), "digest": _digest(key, salt).hex()}, "the new key")


def read(path: Path) -> dict[str, StoredKey]:
    """The keys by id; KeyFileError for a file that is none, or that others may write."""
    try:
        if path.stat().st_mode & 0o022:
            raise KeyFileError(f"{path} can be written by its group or by everybody; chmod 600 it")
        loaded = json.loads(path.read_text("utf-8"))
        entries = loaded["keys"]
        keys = [_stored(entry, f"key {number} of {path}") for number, entry in enumerate(entries)]
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, KeyFileError):
            raise
        raise KeyFileError(f"{path} is no file of keys; make one with `python -m teacher_server keys add`") from error
    found = {key.id: key for key in keys}
    if len(found) < len(keys):
        raise KeyFileError(f"{path} has one key id twice; remove that key and add it anew")
    weights: dict[str, float] = {}
    for key in keys:
        if weights.setdefault(key.client.name, key.client.weight) != key.client.weight:
            raise KeyFileError(f"{path} has keys of {key.client.name} with different weights; a client has one")
    return found


def write(path: Path, keys: Iterable[StoredKey]) -> None:
    """Puts the file in place whole, readable by its owner alone."""
    entries = [
        _entry(key.client.name, key.client.weight, [p.value for p in key.client.may])
        | {"id": key.id, "created": key.created, "salt": key.salt.hex(), "digest": key.digest.hex()}
        for key in keys
    ]
    lines = ",\n  ".join(json.dumps(entry) for entry in entries)
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f'{{"keys": [\n  {lines}\n]}}\n')
            file.flush()
            os.fsync(file.fileno())
        Path(part).replace(path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _digest(key: str, salt: bytes) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=32, salt=salt, person=_PERSON).digest()


def _entry(name: str, weight: float, may: list[str]) -> dict[str, Any]:
    return {"name": name, "weight": weight, "may": sorted(may)}


def _stored(entry: dict[str, Any], where: str) -> StoredKey:
    name, weight = entry["name"], entry.get("weight", 1.0)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise KeyFileError(
            f"{where}: the name {name!r} cannot be used; take at most {MAX_NAME} letters, digits, dots, dashes and "
            "underscores, a letter or digit first"
        )
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= MAX_WEIGHT:
        raise KeyFileError(f"{where}: the weight must be above 0 and at most {MAX_WEIGHT:g}, got {weight!r}")
    known = [p.value for p in Permission]
    may = entry.get("may", known)
    if not may or set(may) - set(known):
        raise KeyFileError(f"{where}: a key may do some of {', '.join(known)}, got {may!r}")
    client = Client(name, "", float(weight), frozenset(map(Permission, may)))
    salt, digest = bytes.fromhex(entry["salt"]), bytes.fromhex(entry["digest"])
    return StoredKey(str(entry["id"]), client, salt, digest, str(entry.get("created", "")))
