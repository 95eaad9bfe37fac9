"""What is measured: servers, clients, loads and times, and the command line that changes them. Measures nothing."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.under_load.clients import Call

THEORY, TINY = "theoretical", "tiny Qwen3"
QUEUE_S = 1.5
"""Seconds of work that a server's queue holds, so that it fills within the seconds before a measurement."""


@dataclass(frozen=True)
class Plan:
    """One run; the defaults take about nine minutes."""

    clients: tuple[int, ...] = (1, 8, 32, 128)
    loads: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Times the capacity."""
    warm_s: float = 1.5
    seconds: float = 8.0
    many_seconds: float = 24.0
    """Of a measurement with more than 64 clients and the theoretical engine, so that each is answered some calls."""
    steady_s: float = 20.0
    """Of the measurement of memory, with 32 clients at four times the capacity."""
    capacity_s: float = 6.0
    rate: float = 10_000.0
    """Tokens/s of the theoretical engine."""
    calls: dict[str, Call] = field(default_factory=lambda: {THEORY: Call(2, 100, 256), TINY: Call(2, 500, 256)})

    def seconds_for(self, name: str, clients: int) -> float:
        """How long so many clients of a server are measured."""
        return self.many_seconds if clients > 64 and name == THEORY else self.seconds


QUICK = Plan((1, 8), (0.5, 4.0), 1.5, 1.5, 1.5, 4.0, 2.0)


def parse() -> tuple[argparse.Namespace, Plan]:
    """The command line and what it plans."""
    parser = argparse.ArgumentParser(description="Offers a teacher server up to four times what it can do.")
    parser.add_argument("--quick", action="store_true", help="a dry run of half a minute, whose figures say little")
    parser.add_argument("--only", choices=(THEORY, TINY), action="append", help="one of the servers alone")
    parser.add_argument("--out", type=Path, help="file for the result, as JSON")
    parser.add_argument("--read", type=Path, help="show this result instead of measuring")
    parser.add_argument("--page", type=Path, help="a page with markers to write the table into")
    arguments = parser.parse_args()
    return arguments, QUICK if arguments.quick else Plan()
