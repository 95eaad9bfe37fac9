"""What a connection to one teacher server must offer, and which one an address names.

A transport makes one attempt: no retry, no splitting, no choice of a replica. It raises the error tree alone; a server
out of reach is `Unavailable`. All methods may be called from several threads at once.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from typing import Protocol
from urllib.parse import urlsplit

from protos.head import Head
from protos.scores import CompletionDelta, GenerateRequest, ScoreRequest, Scores, TeacherInfo
from student_trainer.teacher_client.credentials import Credentials
from student_trainer.teacher_client.openai_model import StockModel

log = logging.getLogger(__name__)

CLIENT_HEADER = "x-client"
"""HTTP header and gRPC metadata key by which a client gives its name; teachers queue fairly by it."""


class Transport(Protocol):
    """One connection to one server. `timeout_s` is the time for the whole attempt; DeadlineExceeded beyond it."""

    @property
    def address(self) -> str:
        """The address as the user gave it."""
        ...

    def teacher(self, timeout_s: float) -> TeacherInfo:
        """GetTeacher."""
        ...

    def score(self, request: ScoreRequest, timeout_s: float) -> list[Scores]:
        """Score: one result for each sequence, in order."""
        ...

    def generate(self, request: GenerateRequest, timeout_s: float) -> Generator[list[CompletionDelta], None, None]:
        """Generate: pieces of completions as they arrive."""
        ...

    def head(self, fingerprint: str, timeout_s: float) -> Generator[Head, None, None]:
        """GetHead: its parts, in order, as they arrive."""
        ...

    def close(self) -> None:
        """Ends calls in flight, which raise Unavailable, and the connection."""
        ...


def open_transport(
    address: str,
    name: str = "",
    credentials: Credentials | None = None,
    *,
    host: str = "",
    stock: StockModel | None = None,
) -> Transport:
    """The transport of `host:port`, `grpc://` or `grpcs://host:port` (gRPC), `http://` or `https://host:port` (HTTP).

    grpcs and https are TLS. `host` is the name of a server whose address is one of several that the name has. With
    `stock` it is a stock vLLM or SGLang server of that model, at an http:// or https:// address. ValueError for other
    addresses, and for credentials that do not go with the address.
    """
    credentials = credentials or Credentials()
    scheme, separator, rest = address.partition("://")
    if not separator:
        scheme, rest = "grpc", address
    try:
        parts = urlsplit(f"//{rest}")
        where, port = parts.hostname, parts.port
    except ValueError:
        where, port = None, None
    grpc = scheme in ("grpc", "grpcs")
    if scheme not in ("grpc", "grpcs", "http", "https") or not where or (grpc and (port is None or parts.path)):
        raise ValueError(
            f"{address!r} is no teacher address; use host:port, grpc://host:port or http://host:port, and grpcs:// or "
            "https:// for TLS"
        )
    if stock is not None and grpc:
        raise ValueError(f"{address!r} is no address of an OpenAI server; use http://host:port or https://host:port")
    tls = scheme in ("grpcs", "https")
    if not tls and credentials.of_tls:
        raise ValueError(f"{credentials.of_tls} needs TLS, and {address} is without; use grpcs:// or https://")
    if not tls and credentials.api_key_file and not is_loopback(where):
        log.warning("the key goes to %s without TLS; whoever is on the way can read it", address)
    if grpc:
        from student_trainer.teacher_client.grpc_channel import GrpcTransport

        return GrpcTransport(address, rest, name, credentials, tls=tls, host=host)
    if stock is not None:
        from student_trainer.teacher_client.openai_channel import OpenAiTransport

        return OpenAiTransport(address, stock, name, credentials, host)
    from student_trainer.teacher_client.http_channel import HttpTransport

    return HttpTransport(address, name, credentials, host)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself, so that no proxy of the environment applies."""
    return host in ("localhost", "::1", "[::1]") or host.startswith("127.")
