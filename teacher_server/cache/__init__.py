"""Scores that are known already, in memory and on the disk, and the computations in flight that equal requests join."""

from teacher_server.cache.disk import BATCH_BYTES, DiskTier
from teacher_server.cache.flights import Flight, Flights
from teacher_server.cache.keys import Key, score_key
from teacher_server.cache.memory import ScoreCache

__all__ = ["BATCH_BYTES", "DiskTier", "Flight", "Flights", "Key", "ScoreCache", "score_key"]
