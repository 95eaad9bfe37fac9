"""With how many tokens in a step of generation an engine is full, so that each more only slows the others down.

A step takes a + b x seconds for x tokens: a to read the weights, b to compute a token (the roofline of Williams,
Waterman and Patterson, 2009). While a dominates, more completions cost the others little; beyond GAIN a / b tokens
twice as many would give at most a seventh more a second. It knows no engine and no queue.
"""

from __future__ import annotations

import math

GAIN = 3.0
FORGET = 1 / 256
"""What one more step counts in the running sums."""
LEAST = 16
"""Steps under which nothing is concluded."""
LEAST_SPREAD = 0.1
"""Standard deviation of the steps' tokens, as a share of their mean, under which they say nothing of b."""
LEAST_FIT = 0.5
"""Part of the variance of the seconds that the tokens must explain (r squared)."""


class Pace:
    """Least squares over the last steps; told by one thread, read by any."""

    def __init__(self) -> None:
        self._steps = 0
        self._x = self._y = self._xx = self._xy = self._yy = 0.0
        self.full = math.inf
        """Tokens of a step, at least 1, from which on the engine is full; infinite while the steps do not say."""

    def observe(self, tokens: int, seconds: float) -> None:
        """Takes in a step that generated and did nothing else."""
        self._steps += 1
        weight = max(FORGET, 1 / self._steps)
        dx, dy = tokens - self._x, seconds - self._y
        self._x += weight * dx
        self._y += weight * dy
        self._xx += weight * ((1 - weight) * dx * dx - self._xx)
        self._xy += weight * ((1 - weight) * dx * dy - self._xy)
        self._yy += weight * ((1 - weight) * dy * dy - self._yy)
        self.full = self._full()

    def _full(self) -> float:
        if self._steps < LEAST or self._xy <= 0 or self._xx < (LEAST_SPREAD * self._x) ** 2:
            return math.inf
        if self._xy**2 < LEAST_FIT * self._xx * self._yy:
            return math.inf
        b = self._xy / self._xx
        return max(1.0, GAIN * (self._y - b * self._x) / b)
