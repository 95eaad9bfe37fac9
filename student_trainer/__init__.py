"""The student trainer: two stages of distillation against a teacher that is reached over the wire."""
