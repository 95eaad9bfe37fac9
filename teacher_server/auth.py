"""Who is calling and what they may do: the seam between what a transport received and whom the service queues by.

It knows no transport's types, only header names and values, and no file of keys: `keys.py` has the `Authenticator` that
does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from protos.errors import PermissionDenied
from teacher_server.exchange import Exchange, current

CLIENT_HEADER = "x-client"
"""Header, or gRPC metadata key, by which a client names itself: its name where there are no keys, else a label."""
KEY_HEADER = "authorization"
"""Header, or gRPC metadata key, that carries `Bearer KEY`."""
MAX_NAME = 64
"""Longest name in characters; a longer one is cut, so that names cost nothing to keep."""


class Permission(Enum):
    """What a key may allow; what the teacher is (GetTeacher, /v1/teacher, /v1/models) every known client may ask."""

    SCORE = "score"
    """Scores and the LM head."""
    GENERATE = "generate"
    """Completions, and the OpenAI-shaped routes, whose answers may hold both."""
    OBSERVE = "observe"
    """Metrics, the pages and gRPC reflection."""


ALL = frozenset(Permission)


@dataclass(frozen=True)
class Client:
    """Who calls: `name` is what counts for order, limits and metrics; `label` is what the client says beside it."""

    name: str
    label: str = ""
    weight: float = 1.0
    """Its share of the teacher beside clients of weight 1."""
    may: frozenset[Permission] = ALL
    known: bool = False
    """Whether its key gave it the name, so that there are only so many of such names."""

    def require(self, permission: Permission | None) -> None:
        """PermissionDenied where a call needs what this client may not do; None needs nothing beside a key."""
        if permission is not None and permission not in self.may:
            allowed = ", ".join(sorted(p.value for p in self.may)) or "nothing"
            raise PermissionDenied(
                f"the key of {self.name} allows {allowed}, and this needs {permission.value}; ask the operator"
            )


@dataclass(frozen=True)
class Caller:
    """One call's origin: the client's name, the transport, the seconds until its deadline, and its exchange."""

    name: str
    transport: str = ""
    timeout_s: float | None = None
    exchange: Exchange = field(default_factory=current)
    label: str = ""
    """What the client calls itself, beside the name that its key gives it; for people alone."""
    weight: float = 1.0
    """See `Client.weight`."""
    known: bool = False
    """See `Client.known`."""

    @staticmethod
    def of(client: Client, transport: str, timeout_s: float | None) -> Caller:
        """A call of a client, within the current exchange."""
        return Caller(client.name, transport, timeout_s, label=client.label, weight=client.weight, known=client.known)

    @property
    def request_id(self) -> str:
        """The call's id, which its client gets too."""
        return self.exchange.request_id

    @property
    def shown(self) -> str:
        """Name and label as the log has them."""
        return f"{self.name} ({self.label})" if self.label else self.name


class Authenticator(Protocol):
    """Maps what came with a call to a client."""

    def identify(self, headers: Mapping[str, str], peer: str) -> Client:
        """The client; `headers` has lower-case keys, `peer` is the address without a port. Raises Unauthenticated."""
        ...


class TrustingAuthenticator:
    """Believes the `x-client` header and falls back on the peer's address; refuses nobody."""

    def identify(self, headers: Mapping[str, str], peer: str) -> Client:
        """See Authenticator."""
        return Client(own_name(headers) or peer or "unknown")


def own_name(headers: Mapping[str, str]) -> str:
    """What a client calls itself, cut and without what could break a line of the log."""
    return "".join(c for c in headers.get(CLIENT_HEADER, "").strip()[:MAX_NAME] if c.isprintable())
