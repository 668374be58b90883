"""What decides which of several servers answers a request: the store that it names, else its documents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any
from urllib.parse import unquote

_STORES = "/v1/stores"
_PARTS = ("document", "file")  # of messages, that are passages


def routing_key(path: str, body: bytes) -> str:
    """A text that is the same for all requests which the same server should answer; empty where any may.

    Args:
        path: Of the request.
        body: Of the request; what is no JSON counts for nothing, as it will be refused.
    """
    head, _, rest = path.partition(f"{_STORES}/")
    if not head and rest:
        return f"store {unquote(rest.partition('/')[0])}"
    try:
        fields = json.loads(body) if body else None
    except (ValueError, RecursionError):
        return ""
    if not isinstance(fields, Mapping):
        return ""
    name = fields.get("name") if path == _STORES else fields.get("store")
    if isinstance(name, str):
        return f"store {name}"
    texts = sorted({json.dumps(document, sort_keys=True) for document in _documents(fields)})
    return f"documents {sha256(json.dumps(texts).encode()).hexdigest()}" if texts else ""


def names_store(key: str) -> bool:
    """Whether requests of a key need one store, which a single server can have open.

    Args:
        key: Of `routing_key`.
    """
    return key.startswith("store ")


def ranked(key: str, servers: Sequence[str]) -> list[str]:
    """Servers in the order in which they should be asked; those that come and go change little of it.

    Args:
        key: Of `routing_key`.
        servers: Their names, in any order.
    """
    return sorted(servers, key=lambda server: sha256(f"{key}\n{server}".encode()).digest())


def _documents(fields: Mapping[str, Any]) -> Iterator[Any]:
    """Passages that stand in a request by themselves: in its documents, and as parts of messages."""
    documents = fields.get("documents")
    if isinstance(documents, list):
        yield from documents
    messages = fields.get("messages", fields.get("input"))
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping) and any(str(part.get("type")).endswith(kind) for kind in _PARTS):
                yield part
