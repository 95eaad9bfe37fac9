"""TLS for both transports from files that may change: certificates are rotated without a restart.

The files are looked at as handshakes come, at most once a second. Files that do not fit together are logged and the
ones before stay in use. It knows files and handshakes, no call.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

_LOG = logging.getLogger(__name__)
LOOK_S = 1.0
"""Seconds between two looks at the files."""


class TlsError(ValueError):
    """The files cannot be used; the text is for the operator."""


@dataclass(frozen=True)
class Loaded:
    """The files' bytes in PEM, and a context made of them."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


class Tls:
    """The present files; TlsError where the first ones cannot be used. `current` may be called from any thread."""

    def __init__(self, cert_file: str, key_file: str, client_ca_file: str | None) -> None:
        self._files = [Path(cert_file), Path(key_file), *([Path(client_ca_file)] if client_ca_file else [])]
        self._lock = threading.Lock()
        self._looked_at = time.monotonic()
        self._state = self._stat()
        self._loaded = self._load()

    def current(self) -> Loaded:
        """What new handshakes take."""
        with self._lock:
            if time.monotonic() - self._looked_at < LOOK_S:
                return self._loaded
            self._looked_at = time.monotonic()
            state = self._stat()
            if state != self._state:
                self._state = state
                try:
                    self._loaded = self._load()
                    _LOG.info("TLS files read again")
                except TlsError as error:
                    _LOG.error("the TLS files before stay in use: %s", error)
            return self._loaded

    def http_context(self) -> ssl.SSLContext:
        """A context whose handshakes are those of the present files."""

        def choose(connection: Any, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = self.current().context

        context = self._load().context
        context.sni_callback = choose
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Credentials that ask for the present files at each handshake."""
        last = self.current()

        def configuration(loaded: Loaded) -> Any:
            pair = (loaded.key, loaded.certificate)
            return grpc.ssl_server_certificate_configuration([pair], root_certificates=loaded.client_ca)

        def fetch() -> Any:
            nonlocal last
            now = self.current()
            if now is last:
                return None
            last = now
            return configuration(now)

        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            configuration(last), fetch, require_client_authentication=last.client_ca is not None
        )
        return credentials

    def _stat(self) -> list[tuple[int, int, int] | None]:
        return [_stat(file) for file in self._files]

    def _load(self) -> Loaded:
        try:
            certificate, key, *others = [file.read_bytes() for file in self._files]
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(self._files[0], self._files[1], password=_no_password)
            # A resumed session would carry on with an authority that has been taken away.
            context.num_tickets = 0
            context.options |= ssl.OP_NO_TICKET
            if others:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(self._files[2])
        except OSError as error:  # ssl.SSLError is one
            names = ", ".join(map(str, self._files))
            raise TlsError(f"TLS cannot use {names}: {error.strerror or error}") from error
        return Loaded(certificate, key, others[0] if others else None, context)


def _stat(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _no_password() -> str:
    raise OSError(0, "the private key is encrypted; give one without a password, readable by the server alone")
