"""Version 1 of the teacher contract: `teacher.proto` and the code generated from it (see `make protos`)."""
