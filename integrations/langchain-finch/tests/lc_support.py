"""What the tests of the LangChain package share: settings, documents, scripted answers, listeners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pytest
import torch
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.messages import BaseMessage
from langchain_core.retrievers import BaseRetriever

import finch_rag.decode.generation
from finch_rag import FinchError
from tests.small import chat_tokenizer, texts

QUESTION = "who built the bridge?"
OTHER_QUESTION = "when was the lighthouse lit?"
# Heads are given because a model with random weights has none to be found.
STUFF_CHAT = "Use the following pieces of context to answer the user's question. \n----------------\n{context}"
SETTINGS: dict[str, Any] = {"heads": [(0, 1), (1, 2)], "budget": 60, "chunk_size": 64, "max_tokens": 8}


def texts_as_documents(count: int) -> list[Document]:
    return [
        Document(text, id=f"doc-{n}", metadata={"title": f"Notes {n}", "source": f"https://example.org/{n}"})
        for n, text in enumerate(texts(count))
    ]


def answer_with(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Makes each model say a text, whatever it is asked; all but the choice of tokens stays as it is."""
    tokens = [*chat_tokenizer()(text)["input_ids"], chat_tokenizer().eos_token_id]

    def sampler(*_: Any) -> Any:
        scripted = iter(tokens)
        return lambda logits: torch.tensor([next(scripted)])

    monkeypatch.setattr(finch_rag.decode.generation, "sampler", sampler)


class Listener(BaseCallbackHandler):
    """Counts the calls of models, and keeps what LangChain tells about them."""

    def __init__(self) -> None:
        self.calls = 0
        self.tokens: dict[UUID, list[str]] = {}
        self.chunks: list[Any] = []
        self.errors: list[BaseException] = []
        self.params: list[dict[str, Any]] = []
        self.results: list[Any] = []

    def on_llm_start(self, serialized: dict[str, Any], prompts: list[str], *, run_id: UUID, **kwargs: Any) -> None:
        self._started(run_id, kwargs)

    def on_chat_model_start(self, serialized: dict[str, Any], messages: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self._started(run_id, kwargs)

    def _started(self, run_id: UUID, kwargs: dict[str, Any]) -> None:
        self.calls += 1
        self.tokens[run_id] = []
        self.params.append(kwargs["invocation_params"])

    def on_llm_new_token(self, token: Any, *, chunk: Any = None, run_id: UUID, **kwargs: Any) -> None:
        self.tokens[run_id].append(token)
        self.chunks.append(chunk)

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.results.append(response)

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.errors.append(error)


class Fixed(BaseRetriever):
    """A retriever that finds the same for each question."""

    found: list[Document]

    def _get_relevant_documents(self, query: str, **kwargs: Any) -> list[Document]:
        return self.found


class MiniLM(Embeddings):
    """The embedding model that finch-rag's own retriever uses."""

    def __init__(self, folder: str) -> None:
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(folder, local_files_only=True)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._model.encode(
            texts, normalize_embeddings=True, show_progress_bar=False
        ).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


def one_line(error: pytest.ExceptionInfo[Any] | BaseException) -> str:
    """An error's message, which must be one line."""
    text = str(error.value if isinstance(error, pytest.ExceptionInfo) else error)
    assert text
    assert "\n" not in text
    return text


async def each_way(asker: Any, asked: Any, error: type[FinchError], said: str, **options: Any) -> None:
    """Asks in each way that LangChain has; each must raise the same, in one line."""
    with pytest.raises(error) as invoked:
        asker.invoke(asked, **options)
    with pytest.raises(error) as streamed:
        list(asker.stream(asked, **options))
    with pytest.raises(error) as awaited:
        await asker.ainvoke(asked, **options)
    with pytest.raises(error) as astreamed:
        [piece async for piece in asker.astream(asked, **options)]
    with pytest.raises(error) as batched:
        asker.batch([asked], **options)
    for raised in (invoked, streamed, awaited, astreamed, batched):
        assert one_line(raised).startswith(said)


def annotated(message: BaseMessage) -> list[dict[str, Any]]:
    """The annotations of a message's only block."""
    blocks: list[Any] = list(message.content_blocks)
    [block] = blocks
    found: list[dict[str, Any]] = block.get("annotations", [])
    return found


def ids(citations: Sequence[dict[str, Any]]) -> list[str]:
    return [citation["passage_id"] for citation in citations]


def kept(citations: Sequence[dict[str, Any]]) -> int:
    return sum(citation["kept_tokens"] for citation in citations)
