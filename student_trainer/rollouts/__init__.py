"""Samples completions from the student, by one of several engines behind one protocol."""

from .base import Rollout, RolloutEngine, in_order
from .padded import cut_at_end, pad_left, sample, sample_sorted

__all__ = ["Rollout", "RolloutEngine", "cut_at_end", "in_order", "pad_left", "sample", "sample_sorted"]
