"""What a measured program says to the one that watches it. Apart, since it also runs where FuxiCTR alone is."""

from __future__ import annotations


def say(*words: object) -> None:
    """A line for the process that watches."""
    print("@", *words, flush=True)
