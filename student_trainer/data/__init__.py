"""Examples from files, folders of shards, the hub and reasoning-gym (see docs/data.md)."""

from student_trainer.data.example import Example
from student_trainer.data.loading import load_examples, read_examples

__all__ = ["Example", "load_examples", "read_examples"]
