"""Trains a student with a teacher: `python main_distillation.py --help`."""

from student_trainer.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
