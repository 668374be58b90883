"""Benchmarks. Nothing outside this folder imports them."""
