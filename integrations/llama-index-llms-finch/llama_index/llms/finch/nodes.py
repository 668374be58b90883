"""LlamaIndex's nodes <-> Finch's passages, and the nodes of a store found again in a prompt."""

from __future__ import annotations

import hashlib
import math
import threading
import weakref
from collections.abc import Iterable
from typing import Any

from llama_index.core.schema import BaseNode, IndexNode, MetadataMode, NodeWithScore, TextNode
from llama_index.core.storage.docstore.utils import doc_to_json, json_to_doc

from finch_rag import Passage, PassageStore

_TITLES = ("title", "file_name", "source")  # keys of metadata, the first that a node has names it
_NODE = "llama_index_node"  # key of the node among a passage's metadata
_MOST_KNOWN = 20_000  # texts; a prompt holds those that were handed out last
_JOINT = "\n\n"  # between the nodes of a context


def passage_of(item: NodeWithScore) -> Passage:
    """A node as a passage: its id, its title from the metadata that it shows to LLMs, and the text that it shows.

    Args:
        item: A node; one without text gives a passage without text, which is never read.

    Returns:
        The passage; its metadata has the node, so that a store hands it out again, see `node_of`.
    """
    node = item.node
    shown_keys = [key for key in _TITLES if key not in node.excluded_llm_metadata_keys]
    title = next((str(node.metadata[key]) for key in shown_keys if node.metadata.get(key)), None)
    if not node.get_content(MetadataMode.NONE).strip():
        return Passage("", id=node.node_id, title=title, score=_score(item))
    shown = node
    for key in shown_keys:
        if title is not None and str(node.metadata.get(key)) == title:  # the title is read once, before the text
            hidden = [*node.excluded_llm_metadata_keys, key]
            shown = node.model_copy(update={"excluded_llm_metadata_keys": hidden})
            break
    text = shown.get_content(MetadataMode.LLM)
    return Passage(text, id=node.node_id, title=title, metadata={_NODE: _written(node)}, score=_score(item))


def _score(item: NodeWithScore) -> float | None:
    """What the retriever gave the node; None where that is no number to sort by."""
    return item.score if item.score is not None and math.isfinite(item.score) else None


def node_of(passage: Passage) -> BaseNode:
    """A passage as the node that it was made of; of any other passage a node that `passage_of` reads alike.

    Args:
        passage: As a store hands it out.
    """
    if written := passage.metadata.get(_NODE):
        return json_to_doc(written)
    metadata = {**passage.metadata, **({"title": passage.title} if passage.title else {})}
    # Finch reads a passage's title and text, and so shall an LLM.
    hidden = [key for key in metadata if key != "title" or not passage.title]
    name = passage.id or hashlib.sha256(passage.titled_text.encode()).hexdigest()[:32]
    return TextNode(
        id_=name,
        text=passage.text,
        metadata=metadata,
        excluded_llm_metadata_keys=hidden,
        excluded_embed_metadata_keys=hidden,
    )


def _written(node: BaseNode) -> dict[str, Any]:
    """A node as the docstores write it, without its embedding and what an index node points to."""
    left_out: dict[str, Any] = {"embedding": None}
    if isinstance(node, IndexNode):
        left_out["obj"] = None
    return doc_to_json(node.model_copy(update=left_out))


class KnownNodes:
    """Nodes of one store as they show themselves to LLMs. Safe to share between threads.

    LlamaIndex joins the nodes of a context to one text. Those that are known are found in it again, with their ids and
    titles, so that they are the passages that the store has, whatever they hold.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_text: dict[str, Passage] = {}  # the last used at its end
        self._by_first_line: dict[str, dict[str, None]] = {}  # shown texts, which no two first lines share

    def remember(self, items: Iterable[NodeWithScore]) -> None:
        """Takes note of nodes that are handed out.

        Args:
            items: The nodes.
        """
        with self._lock:
            for item in items:
                if shown := item.node.get_content(MetadataMode.LLM).strip():
                    self._by_text.pop(shown, None)
                    self._by_text[shown] = passage_of(item)
                    self._by_first_line.setdefault(_first_line(shown), {})[shown] = None
            while len(self._by_text) > _MOST_KNOWN:
                self._forget(next(iter(self._by_text)))

    def _forget(self, shown: str) -> None:
        del self._by_text[shown]
        line = _first_line(shown)
        del self._by_first_line[line][shown]
        if not self._by_first_line[line]:
            del self._by_first_line[line]

    def passages_of(self, context: str) -> list[Passage] | None:
        """The passages of a context that is made of known nodes and nothing else; None where it is not.

        Args:
            context: Nodes as LlamaIndex joins them.
        """
        found: list[Passage] = []
        start, end = len(context) - len(context.lstrip()), len(context.rstrip())
        with self._lock:
            while start < end:
                alike = self._by_first_line.get(_first_line(context, start), ())
                fits = (text for text in alike if _stands_at(context, text, start, end))
                longest = max(fits, key=len, default=None)
                if longest is None:
                    return None
                found.append(self._by_text[longest])
                start += len(longest) + len(_JOINT)
        return found or None


def _first_line(text: str, start: int = 0) -> str:
    end = text.find("\n", start)
    return text[start:] if end < 0 else text[start:end]


def _stands_at(context: str, text: str, start: int, end: int) -> bool:
    """Whether a text is a whole part of a context that ends at ``end``."""
    behind = start + len(text)
    return context.startswith(text, start) and (behind == end or (behind < end and context.startswith(_JOINT, behind)))


_known: weakref.WeakKeyDictionary[PassageStore, KnownNodes] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def known_nodes(store: PassageStore) -> KnownNodes:
    """The nodes that were handed out from a store, or ranked by it, in this process.

    Args:
        store: The store.
    """
    with _lock:
        return _known.setdefault(store, KnownNodes())
