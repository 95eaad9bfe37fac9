"""Measures what a device does between two points of the host's program, without making the host wait for it."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Adds up seconds between `start` and `stop`; on a GPU those of its own queue, where what is asked runs later."""

    def __init__(self) -> None:
        self._began = 0.0
        self._seconds = 0.0
        self._device: torch.device | None = None
        self._event: Any = None
        self._open: list[tuple[Any, Any]] = []

    def start(self, device: torch.device) -> None:
        """From here, once `device` has done what it was asked for before."""
        self._device = device
        if device.type == "cuda":
            self._event = _mark(device)
        else:
            self._began = time.perf_counter()

    def stop(self) -> None:
        """To here."""
        if self._device is None:
            return
        if self._device.type == "cuda":
            self._open.append((self._event, _mark(self._device)))
        else:
            self._seconds += time.perf_counter() - self._began
        self._device = None

    def take(self) -> float:
        """The seconds since the last `take`, as far as the device has come."""
        while self._open and self._open[0][1].query():
            first, last = self._open.pop(0)
            self._seconds += first.elapsed_time(last) / 1000
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _mark(device: torch.device) -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
