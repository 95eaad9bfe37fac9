"""What a client shows a teacher and how it knows it: a key, authorities, a certificate of its own. All are files.

It knows no transport; `grpc_channel.py` and `http_channel.py` ask it for what they need.
"""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)
KEY_HEADER = "authorization"
"""HTTP header and gRPC metadata key that carries `Bearer KEY`."""


@dataclass(frozen=True)
class Credentials:
    """Paths of files in PEM, but `api_key_file`, which holds the key alone; "" is none.

    `api_key_file` is read again when it changes, so that a key can be replaced while a run goes on. `ca_file` are the
    authorities of the teacher's certificate ("": the system's), `client_cert_file` and `client_key_file` this client's
    certificate where the teacher wants one.
    """

    api_key_file: str = ""
    ca_file: str = ""
    client_cert_file: str = ""
    client_key_file: str = ""

    def __post_init__(self) -> None:
        if bool(self.client_cert_file) != bool(self.client_key_file):
            raise ValueError("client_cert_file and client_key_file belong together; give both or none")

    @property
    def of_tls(self) -> str:
        """The name of a file that only TLS has a use for; "" where there is none."""
        return next((name for name in ("ca_file", "client_cert_file") if getattr(self, name)), "")

    def read(self, name: str) -> bytes | None:
        """The bytes of a file; None where it was not given, ValueError where it cannot be read."""
        path = getattr(self, name)
        if not path:
            return None
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read {name} {path}: {error.strerror or error}") from error

    def context(self) -> ssl.SSLContext:
        """How HTTPS checks the teacher and presents this client; ValueError for files that cannot be used."""
        for name in ("ca_file", "client_cert_file", "client_key_file"):
            self.read(name)
        try:
            context = ssl.create_default_context(cafile=self.ca_file or None)
            if self.client_cert_file:
                context.load_cert_chain(self.client_cert_file, self.client_key_file)
        except ssl.SSLError as error:
            files = ", ".join(filter(None, (self.ca_file, self.client_cert_file, self.client_key_file)))
            raise ValueError(f"TLS cannot use {files}: {error}") from error
        return context


class Key:
    """The present key of a file; ValueError where it cannot be read at first. Thread-safe; never shown."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._lock = threading.Lock()
        self._state: tuple[int, int, int] | None = None
        self._key = ""
        if credentials.api_key_file:
            self._state, self._key = self._stat(), self._read()

    def __repr__(self) -> str:
        return "Key(...)" if self._key else "Key()"

    def headers(self) -> tuple[tuple[str, str], ...]:
        """The header or metadata that carries it; empty where there is none."""
        if not self._credentials.api_key_file:
            return ()
        with self._lock:
            state = self._stat()
            if state != self._state:
                try:
                    self._state, self._key = state, self._read()
                except ValueError as error:
                    log.warning("the key stays as it was: %s", error)
            return ((KEY_HEADER, f"Bearer {self._key}"),)

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = Path(self._credentials.api_key_file).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> str:
        raw = self._credentials.read("api_key_file") or b""
        lines = raw.decode("utf-8", "replace").split()
        if len(lines) != 1 or not lines[0].isascii():
            raise ValueError(
                f"api_key_file {self._credentials.api_key_file} must hold one key and nothing else, it holds "
                f"{len(lines)} words"
            )
        return lines[0]
