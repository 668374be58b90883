"""What an answer rests on, in the shapes that clients know: OpenAI's annotations, Cohere's citations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import quote

from ..answer import Answer, Citation, Source
from ..prompts.passages import Passage


class Cited:
    """The citations of an answer.

    Args:
        answer: The answer.
        passages: That the request brought, in their order; they have urls.
    """

    def __init__(self, answer: Answer, passages: Sequence[Passage]) -> None:
        self._answer, self._passages = answer, passages
        self._known = {citation.index: citation for citation in answer.citations}

    def citations(self) -> list[dict[str, Any]]:
        """One a statement that rests on something, as Cohere has them: its place in the text, and its sources."""
        return [
            {
                "start": statement.start,
                "end": statement.end,
                "text": statement.text,
                "document_ids": [self._id(source.index) for source in statement.sources],
                "sources": [self._source(source) for source in statement.sources],
            }
            for statement in self._answer.statements
            if statement.sources
        ]

    def annotations(self) -> list[dict[str, Any]]:
        """One a statement and source, as OpenAI has them for the web, with the document beside it."""
        return list(self._annotations())

    def documents(self) -> list[dict[str, Any]]:
        """The passages that were kept, by falling share of the question's attention."""
        return [
            {
                "id": self._id(citation.index),
                "index": citation.index,
                "title": citation.title,
                "share": citation.share,
                "kept_tokens": citation.kept_tokens,
                "passage_tokens": citation.passage_tokens,
            }
            for citation in self._answer.citations
        ]

    def _annotations(self) -> Iterator[dict[str, Any]]:
        for statement in self._answer.statements:
            for source in statement.sources:
                yield {
                    "type": "url_citation",
                    "url_citation": {
                        "start_index": statement.start,
                        "end_index": statement.end,
                        "title": self._title(source.index) or self._id(source.index),
                        "url": self._url(source.index),
                    },
                    "document": {**self._named(source.index), **_weighed(source)},
                }

    def _source(self, source: Source) -> dict[str, Any]:
        own = self._id(source.index)
        shown = {"id": own, "title": self._title(source.index), "snippet": " ".join(q.text for q in source.quotes)}
        return {"type": "document", "id": own, "index": source.index, "document": shown, **_weighed(source)}

    def _named(self, index: int) -> dict[str, Any]:
        return {"id": self._id(index), "index": index, "title": self._title(index)}

    def _citation(self, index: int) -> Citation | None:
        return self._known.get(index)

    def _title(self, index: int) -> str | None:
        citation = self._citation(index)
        return None if citation is None else citation.title

    def _id(self, index: int) -> str:
        citation = self._citation(index)
        given = None if citation is None else citation.passage_id
        return f"doc:{index}" if given is None else given

    def _url(self, index: int) -> str:
        if index < len(self._passages) and (url := self._passages[index].metadata.get("url")):
            return str(url)
        return f"urn:document:{quote(self._id(index), safe='')}"


def _weighed(source: Source) -> dict[str, Any]:
    return {"share": source.share, "quotes": [asdict(found) for found in source.quotes]}
