from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for a network

from lc_fixtures import asked, chat, database, documents, folder, llm, nothing_is_kept, shared

from tests.conftest import caches, private_cache

__all__ = [
    "asked",
    "caches",
    "chat",
    "database",
    "documents",
    "folder",
    "llm",
    "nothing_is_kept",
    "private_cache",
    "shared",
]
