"""Puts results into a page of the documentation, between two marker lines."""

from __future__ import annotations


def between(page: str, begin: str, end: str, inside: str) -> str:
    """The page with `inside` in place of what stands between its markers; ValueError where it has none."""
    before, first, rest = page.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"the page has no place for results; it needs the lines {begin} and {end}")
    return f"{before}{begin}\n\n{inside}\n{end}{after}"
