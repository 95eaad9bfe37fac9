"""What all tests share: examples that hypothesis finds are the same in every run, and take the time they take."""

from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("project")
