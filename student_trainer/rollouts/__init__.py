"""Samples completions from the student, by one of several engines behind one protocol."""

from .base import Rollout, RolloutEngine, in_order
from .opening import open_engine

__all__ = ["Rollout", "RolloutEngine", "in_order", "open_engine"]
