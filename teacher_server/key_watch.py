"""Knows clients by their keys, from a file that may change under the running server.

The file is looked at, by its time, size and inode, at most once a second and as a call comes in, or when `reload` is
called. A file that cannot be used is logged and the keys that were known stay: taking it away locks nobody out and lets
nobody in.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from protos.errors import Unauthenticated
from teacher_server.auth import KEY_HEADER, Client, own_name
from teacher_server.keys import KEY, KeyFileError, StoredKey, make_key, read

_LOG = logging.getLogger(__name__)
LOOK_S = 1.0
"""Seconds between two looks at the file."""
_HOW = "send the header `Authorization: Bearer KEY`"


class KeyAuthenticator:
    """An `auth.Authenticator` over a file of keys; KeyFileError where it cannot be used at the start."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._state: tuple[int, int, int] | None = None
        self._looked_at = clock()
        self._keys = self._read()
        _, self._nobody = make_key("nobody")
        """What an unknown id is compared with, so that it takes as long as a known one."""

    def __len__(self) -> int:
        return len(self._keys)

    def identify(self, headers: Mapping[str, str], peer: str) -> Client:
        """See Authenticator: the key's client, labelled with the name that it sends."""
        if self._clock() - self._looked_at >= LOOK_S:
            self.reload(only_if_changed=True)
        scheme, _, key = headers.get(KEY_HEADER, "").strip().partition(" ")
        if not key:
            raise Unauthenticated(f"this teacher wants a key; {_HOW}")
        found = KEY.fullmatch(key.strip()) if scheme.lower() == "bearer" else None
        if found is None:
            raise Unauthenticated(f"what came as a key is none of this server's; {_HOW}")
        stored = self._keys.get(found[1], self._nobody)
        if not stored.matches(found[0]):
            raise Unauthenticated("this teacher does not know the key; it may have been removed, ask the operator")
        return dataclasses.replace(stored.client, label=own_name(headers), known=True)

    def reload(self, only_if_changed: bool = False) -> None:
        """Reads the file again; the keys stay as they were where it cannot be used."""
        self._looked_at = self._clock()
        try:
            if only_if_changed and self._stat() == self._state:
                return
            before, self._keys = self._keys, self._read()
        except KeyFileError as error:
            _LOG.error("the keys stay as they were: %s", error)
            return
        added, removed = self._keys.keys() - before.keys(), before.keys() - self._keys.keys()
        _LOG.info("keys read again: %d known, %d new, %d removed", len(self._keys), len(added), len(removed))

    def _stat(self) -> tuple[int, int, int] | None:
        """What changes when the file does; None where there is none."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> dict[str, StoredKey]:
        self._state = self._stat()
        return read(self._path)
