"""Fuzzing: what users and files may bring, made up byte by byte. `python -m tests.fuzz TARGET` runs a target."""
