"""The prompts of RAG frameworks, by the words that they put around context and question."""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, slots=True)
class Match:
    """A prompt of a known template.

    Attributes:
        template: The template.
        before: What stands before it.
        head: Its own words before the context.
        fields: Its fields' values, stripped.
    """

    template: Template
    before: str
    head: str
    fields: dict[str, str]


@dataclass(frozen=True)
class Template:
    """A known prompt.

    Attributes:
        name: For the report.
        pattern: Its words, with fields in braces: "context"; "question" where the same message asks it; "answer", an
            earlier answer; "rest", the user's own words; "_", words that may be anything. How much white space stands
            between words does not matter.
        keeps_words: The words ask for more than an answer from the context, so they become the instructions.
    """

    name: str
    pattern: str
    keeps_words: bool = False

    def match(self, text: str) -> Match | None:
        """Takes a text apart, in linear time.

        What stands before the context is searched from the start, what stands after it from the end, so that the
        context may hold anything, the template's own words too.

        Args:
            text: A prompt or a message.
        """
        literals, names = self._parts
        context = names.index("context")
        spans: list[tuple[int, int]] = []
        start, end = 0, len(text.rstrip())
        for literal in literals[: context + 1]:
            if (found := literal.search(text, start, end)) is None:
                return None
            spans.append(found.span())
            start = found.end()
        after: list[tuple[int, int]] = []
        for literal in reversed(literals[context + 1 :]):
            if (found := last_match(literal.finditer(text, start, end))) is None:
                return None
            after.append(found.span())
            end = found.start()
        spans += reversed(after)
        values = [text[left:right].strip() for (_, left), (right, _) in itertools.pairwise(spans)]
        opening = spans[0][0]
        return Match(
            self, text[:opening].strip(), text[opening : spans[context][1]], dict(zip(names, values, strict=True))
        )

    @cached_property
    def _parts(self) -> tuple[list[re.Pattern[str]], list[str]]:
        """Its words between fields, as patterns, and the fields' names."""
        words, names = re.split(r"\{\w+\}", self.pattern), re.findall(r"\{(\w+)\}", self.pattern)
        patterns = [self._words(text) for text in words]
        patterns[-1] += r"\Z"
        return [re.compile(pattern) for pattern in patterns], names

    @staticmethod
    def _words(text: str) -> str:
        """A pattern for words, whatever the white space between them; a line's start stays one."""
        line_start = r"\n[ \t]*" if text.startswith("\n") else ""
        return line_start + r"\s+".join(map(re.escape, text.split()))


_DASHES = "-" * 21
IN_ONE_MESSAGE = (
    Template(
        "llama-index/text-qa",
        f"Context information is below.\n{_DASHES}\n{{context}}\n{_DASHES}\n"
        "Given the context information and not prior knowledge, answer the query.\nQuery: {question}\nAnswer:",
    ),
    Template(
        "llama-index/tree-summarize",
        f"Context information from multiple sources is below.\n{_DASHES}\n{{context}}\n{_DASHES}\n"
        "Given the information from multiple sources and not prior knowledge, answer the query.\n"
        "Query: {question}\nAnswer:",
    ),
    Template(
        "llama-index/refine",
        "The original query is as follows: {question}\nWe have provided an existing answer: {answer}\n"
        "We have the opportunity to refine the existing answer (only if needed) with some more context below.\n"
        "------------\n{context}\n------------\nGiven the new context, refine the original answer{_}Refined Answer:",
    ),
    Template(
        "llama-index/refine-chat",
        "You are an expert Q&A system that strictly operates in two modes when refining existing answers:{_}"
        "\nNew Context: {context}\nQuery: {question}\nOriginal Answer: {answer}\nNew Answer:",
    ),
    Template(
        "llama-index/citation",
        "Please provide an answer based solely on the provided sources.{_}Now it's your turn. "
        "Below are several numbered sources of information:\n------\n{context}\n------\nQuery: {question}\nAnswer:",
        keeps_words=True,
    ),
    Template(
        "llama-index/citation-refine",
        "Please provide an answer based solely on the provided sources.{_}Now it's your turn. "
        "We have provided an existing answer: {_}\nBegin refining!\n------\n{context}\n------\n"
        "Query: {question}\nAnswer:",
        keeps_words=True,
    ),
    Template(
        "langchain/stuff",
        "Use the following pieces of context to answer the question at the end.{_}\n\n{context}"
        "\nQuestion: {question}\nHelpful Answer:",
    ),
    Template(
        "langchain/rag-prompt",
        "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer "
        "the question.{_}\nQuestion: {question}\nContext: {context}\nAnswer:",
    ),
)
IN_SYSTEM_MESSAGE = (
    Template(
        "llama-index/context-chat",
        "Use the context information below to assist the user.\n--------------------\n{context}"
        "\n--------------------\n{rest}",
    ),
    Template(
        "llama-index/context-chat-refine",
        "Using the context below, refine the following existing answer using the provided context to assist the user."
        "{_}--------------------\n{context}\n--------------------\nExisting Answer:\n{answer}"
        "\n--------------------\n{rest}",
    ),
    Template(
        "llama-index/condense-plus-context",
        "The following is a friendly conversation between a user and an AI assistant.{_}"
        "Here are the relevant documents for the context:{context}"
        "\nInstruction: Based on the above documents, provide a detailed answer for the user question below.\n"
        'Answer "don\'t know" if not present in the document.{rest}',
    ),
    Template(
        "llama-index/condense-plus-context-refine",
        "The following is a friendly conversation between a user and an AI assistant.{_}"
        "Here are the relevant documents for the context:{context}"
        "\nExisting Answer:\n{answer}"
        "\nInstruction: Refine the existing answer using the provided context to assist the user.\n"
        "If the context isn't helpful, just repeat the existing answer and nothing more.{rest}",
    ),
    Template(
        "langchain/stuff-chat",
        "Use the following pieces of context to answer the user's question.{_}\n----------------\n{context}",
    ),
    Template(
        "langchain/retrieval-qa-chat",
        "Answer any use questions based solely on the context below:\n\n<context>{context}</context>{rest}",
    ),
    Template(
        "langchain/rag-chat",
        "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer "
        "the question.{_}\n\n{context}",
    ),
)
# LlamaIndex puts it before its own prompts for chat models; it says no more than Finch's own.
DEFAULT_SYSTEM_PROMPT = (
    "You are an expert Q&A system that is trusted around the world.\n"
    "Always answer the query using the provided context information, and not prior knowledge.\n"
    "Some rules to follow:\n1. Never directly reference the given context in your answer.\n"
    "2. Avoid statements like 'Based on the context, ...' or 'The context information ...' or anything along "
    "those lines."
)

# Prompts that have no context, however long: they turn a conversation's last message into a question of its own.
CONDENSE = ("Given the following conversation", "Given a chat history and the latest user question")


def first_match(templates: Iterable[Template], text: str) -> Match | None:
    """The match whose context begins first, and ends last: a context may hold another template's prompt.

    Args:
        templates: Known prompts.
        text: A prompt or a message.
    """
    matches = filter(None, (template.match(text) for template in templates))
    return min(matches, key=lambda m: (len(m.before) + len(m.head), -len(m.fields["context"])), default=None)


def last_match(matches: Iterator[re.Match[str]]) -> re.Match[str] | None:
    """The last of a pattern's matches."""
    found = deque(matches, maxlen=1)
    return found[0] if found else None
