"""The scoring benchmark: what a trainer gets out of a teacher, beside what the engine could give."""
