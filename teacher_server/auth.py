"""Who is calling: the seam between what a transport received and the client's name that the service queues by.

It knows no transport's types, only header names and values. Today names are what clients say they are; keys, and the
errors Unauthenticated and PermissionDenied, are another implementation of `Authenticator`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

CLIENT_HEADER = "x-client"
"""Header, or gRPC metadata key, by which a client gives its name."""
MAX_NAME = 64
"""Longest name in characters; a longer one is cut, so that names cost nothing to keep."""


@dataclass(frozen=True)
class Caller:
    """One call's origin: the client's name, the transport, the seconds until its deadline, and the call's id."""

    name: str
    transport: str = ""
    timeout_s: float | None = None
    request_id: str = field(default_factory=lambda: str(uuid.uuid4()))


class Authenticator(Protocol):
    """Maps what came with a call to a client's name."""

    def identify(self, headers: Mapping[str, str], peer: str) -> str:
        """The client's name; `headers` has lower-case keys, `peer` is the address without a port.

        Raises Unauthenticated or PermissionDenied.
        """
        ...


class TrustingAuthenticator:
    """Believes the `x-client` header and falls back on the peer's address; refuses nobody."""

    def identify(self, headers: Mapping[str, str], peer: str) -> str:
        """See Authenticator."""
        return headers.get(CLIENT_HEADER, "").strip()[:MAX_NAME] or peer or "unknown"
