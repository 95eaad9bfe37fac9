"""Engines behind one Protocol (`base.py`); each module imports its engine only when it is made."""
