from __future__ import annotations

from li_fixtures import prompts, read, requests, says

from tests.conftest import caches, embedded, private_cache

__all__ = ["caches", "embedded", "private_cache", "prompts", "read", "requests", "says"]
