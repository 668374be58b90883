"""Retrieval heads: which attention heads of a model find the passage that answers."""
