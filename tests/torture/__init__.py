"""Attacks that run as long as one likes: `python -m tests.torture`; the tests run each for a moment."""
