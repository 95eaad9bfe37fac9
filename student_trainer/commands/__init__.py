"""The commands of `python -m student_trainer` beside training: each has its own command line and knows no other."""
