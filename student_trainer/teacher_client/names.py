"""DNS names each of whose addresses is a replica: `dns://host:port` (gRPC), `dns+grpcs://`, `dns+http://`, `dns+https://`.

A connection goes to one address and says the name: as authority or Host, and to TLS. It knows no call.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

from student_trainer.teacher_client.credentials import Credentials
from student_trainer.teacher_client.openai_model import StockModel
from student_trainer.teacher_client.transport import Transport, open_transport

Resolve = Callable[[str, int], list[str]]
PORTS = {"http": 80, "https": 443}


def resolve(host: str, port: int) -> list[str]:
    """The IP addresses of a name, as this machine's resolver gives them, in order; OSError where there are none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted({str(entry[4][0]) for entry in found})


class Name:
    """A name that stands for several servers; ValueError for an address that is none, without asking DNS."""

    def __init__(
        self,
        address: str,
        name: str = "",
        credentials: Credentials | None = None,
        resolve: Resolve = resolve,
        stock: StockModel | None = None,
    ) -> None:
        self.address = address
        self._name, self._credentials, self._resolve, self._stock = name, credentials, resolve, stock
        scheme, _, rest = address.partition("://")
        self._scheme = scheme.removeprefix("dns").removeprefix("+") or "grpc"
        self._path = ""
        try:
            parts = urlsplit(f"//{rest.lstrip('/')}")
            self._host, port = parts.hostname or "", parts.port or PORTS.get(self._scheme, 0)
            self._path = parts.path
        except ValueError:
            self._host, port = "", 0
        if not self._host or not port or _is_ip(self._host):
            raise ValueError(f"{address!r} is no name of teachers; use dns://NAME:PORT or dns+http://NAME:PORT")
        self._port = port
        open_transport(f"{self._scheme}://{self._host}:{port}{self._path}", name, credentials, stock=stock).close()

    def look_up(self) -> list[str]:
        """The addresses of the servers now; OSError where the name has none."""
        literals = (f"[{ip}]" if ":" in ip else ip for ip in self._resolve(self._host, self._port))
        return [f"{self._scheme}://{ip}:{self._port}{self._path}" for ip in literals]

    def open(self, address: str) -> Transport:
        """A connection to one of them."""
        return open_transport(address, self._name, self._credentials, host=self._host, stock=self._stock)


def is_name(address: str) -> bool:
    """Whether an address is to be looked up as several."""
    return re.match(r"dns(\+\w+)?:", address) is not None


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
