"""Benchmarks. Nothing outside this folder imports them but the command line."""
