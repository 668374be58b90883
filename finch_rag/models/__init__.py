"""The model: loading, attention that can be observed, a cache of bounded size, forward passes."""
