"""What this process and those of its engine really listen on, as the system sees it; knows no transport."""

from __future__ import annotations

import psutil


def listening() -> list[str]:
    """host:port of every listening TCP socket, sorted; IPv4 addresses on an IPv6 socket as IPv4."""
    own = psutil.Process()
    found = set()
    for process in (own, *own.children(recursive=True)):
        try:
            connections = process.net_connections("tcp")
        except psutil.Error:  # it has ended meanwhile
            continue
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN:
                host = connection.laddr.ip.removeprefix("::ffff:")
                found.add(f"[{host}]:{connection.laddr.port}" if ":" in host else f"{host}:{connection.laddr.port}")
    return sorted(found)
