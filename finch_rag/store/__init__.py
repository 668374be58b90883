"""Passages that are read once and asked for ever: their head keys, in memory or on disk."""
