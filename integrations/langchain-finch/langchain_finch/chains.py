"""The documents chain: documents reach the model apart, whatever the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import (
    BaseMessage,
    HumanMessage,
    SystemMessage,
    convert_to_messages,
    get_buffer_string,
)
from langchain_core.output_parsers import BaseTransformOutputParser, StrOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.prompts import BasePromptTemplate, MessagesPlaceholder, format_document
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_core.runnables.utils import AddableDict

from finch_rag import InputError, Passage, SettingsError
from finch_rag.adapters import CONTEXT_MARK, QUESTION_MARK, Message, StorePlace, check_options, kind_of, parse_marked

from ._chat_of import as_chat, constant, parses
from ._convert import conversation_of, passages_of
from ._loops import StandIn, loop_over
from ._stores import FormattedPassage, check_pickles
from .chat_models import ChatFinch
from .llms import FinchLLM

_HISTORY = ("chat_history", "history", "messages")  # where a conversation is looked for


def create_finch_documents_chain(
    llm: FinchLLM | ChatFinch | Runnable[Any, Any],
    prompt: BasePromptTemplate[Any] | None = None,
    *,
    document_prompt: BasePromptTemplate[str] | None = None,
    document_variable_name: str = "context",
    with_citations: bool = False,
    store: StorePlace = None,
) -> Runnable[dict[str, Any], Any]:
    """A chain that answers a question from documents in one call, for `create_retrieval_chain` and LCEL.

    Its input is a dictionary with the documents, "input" (or "question"), and "chat_history" (or "history",
    "messages") where there is one. The documents are kept or evicted whole, and cited by their ids, because they are
    never joined to one text. What stands under "input" is the question, wherever a prompt has it.

    Args:
        llm: A `FinchLLM` or `ChatFinch`, also with options bound to it, with fallbacks or as one of several
            alternatives; or a chain that begins with one and parses its answers, as `ChatFinch.with_structured_output`
            makes it, whose outcome is then the answer. Fallbacks may be any chat models: one that is not Finch's reads
            all documents as one text.
        prompt: Makes the messages of the input; the question alone when None. Where it has the documents' variable,
            the documents are still read apart: what else it says, but for the question, becomes the instructions, or
            the system prompt.
        document_prompt: Formats each document's text; its own text, below its title if it has one, when None.
        document_variable_name: The documents' key in the input.
        with_citations: Return a dictionary with "text", "citations", "statements", "support" and "report" in place of
            the text; not of a chain.
        store: Keeps what is read, so that each document is read once for all questions: a folder, True for memory, or
            an open `finch_rag.PassageStore`; False for none; the LLM's own when None.

    Returns:
        A runnable; its stream has the text in pieces, then, in one more, citations and report where asked for.

    Raises:
        SettingsError: If the LLM is another one, or the store is none.
        InputError: When it runs: if the input lacks what the prompt needs, or there is no question.

    Example:
        >>> chain = create_retrieval_chain(retriever, create_finch_documents_chain(ChatFinch(model="embedded")))
        >>> chain.invoke({"input": "Who signed it?"})["answer"]
    """
    chat = as_chat(llm)
    check_options({"store": store}, SettingsError)
    parsed = parses(chat)
    if parsed and with_citations:
        raise SettingsError(
            "with_citations is for a model, and this chain parses its answers: leave it out; the raw message of "
            "with_structured_output(..., include_raw=True) has the citations"
        )
    parser: BaseTransformOutputParser[Any] = _CitedAnswer() if with_citations else StrOutputParser()
    asked = _Asking(chat, None if parsed else parser, prompt, document_prompt, document_variable_name, store)
    return RunnableLambda(asked, name="finch_documents_chain")


@dataclass(frozen=True)
class _Asking:
    """An input -> what is asked of the model; a class, because a function inside a function cannot be pickled."""

    chat: Runnable[Any, Any]
    parser: BaseTransformOutputParser[Any] | None
    prompt: BasePromptTemplate[Any] | None
    document_prompt: BasePromptTemplate[str] | None
    document_variable_name: str
    store: StorePlace = None

    def __getstate__(self) -> dict[str, Any]:
        check_pickles(self.store, "a documents chain")
        return dict(self.__dict__)

    def __call__(self, inputs: Mapping[str, Any]) -> Runnable[Any, Any]:
        name = self.document_variable_name
        if not isinstance(inputs, Mapping):
            raise InputError(f"the input is {type(inputs).__name__}: pass a dictionary with {name} and input")
        documents = _documents(inputs, name, self.document_prompt)
        request = _default_request(inputs) if self.prompt is None else _request(self.prompt, inputs, name, documents)
        # What the conversation brings stands behind the documents, so that citations have the documents' places.
        documents = request.documents or documents
        options = request.options if self.store is None else {**request.options, "store": self.store}
        bound = self.chat.bind(documents=[*documents, *request.passages], **options)
        # The messages are known, so the input, which LangChain hands on, is not looked at again.
        asked = constant(request.messages) | bound
        return asked if self.parser is None else asked | self.parser


@dataclass(frozen=True)
class _Request:
    """What a prompt asks, without its documents, but for those of which it shows more than their texts."""

    messages: list[BaseMessage]
    documents: list[Passage] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


_PARTS = ("citations", "statements", "support", "report")  # of an answer, beside its text


class _CitedAnswer(BaseTransformOutputParser[AddableDict]):
    """An answer's message, or a piece of one, as text, citations, statements, support and report."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> AddableDict:
        """The parts that a message has.

        Args:
            result: One message.
            partial: Not used.
        """
        generation = result[0]
        answer = AddableDict(text=generation.text)
        if isinstance(generation, ChatGeneration):
            found = generation.message.response_metadata
            answer.update({name: found[name] for name in _PARTS if name in found})
        return answer

    def parse(self, text: str) -> AddableDict:
        """An answer without message.

        Args:
            text: The answer.
        """
        return AddableDict(text=text)


def _documents(inputs: Mapping[str, Any], name: str, document_prompt: BasePromptTemplate[str] | None) -> list[Passage]:
    documents = inputs.get(name)
    if documents is None:
        raise InputError(
            f"the input has no {name!r}, it has {_listed(inputs)}: pass a list of documents under it, or set "
            "document_variable_name"
        )
    passages = passages_of(documents)
    if document_prompt is None:
        return passages
    formatted = []
    for document, passage in zip(documents, passages, strict=True):
        if not passage.text.strip():
            formatted.append(passage)  # has nothing to read, whatever a prompt puts around it
            continue
        if not isinstance(document, Document):
            document = Document(passage.text, metadata=dict(passage.metadata))
        # A document prompt says itself where a title goes.
        shown = format_document(document, document_prompt)
        formatted.append(FormattedPassage(shown, passage.id, None, passage.metadata, passage.score))
    return formatted


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names))) or "nothing"


def _default_request(inputs: Mapping[str, Any]) -> _Request:
    history = _messages(inputs, next((name for name in _HISTORY if inputs.get(name)), None))
    question = _question(inputs)
    if not isinstance(question, str):
        raise InputError(f"the input's question is {type(question).__name__}: pass a text under 'input'")
    if not history or not _QUESTION.isdisjoint(inputs):  # else the conversation's last message asks
        history.append(HumanMessage(question))
    conversation, passages = conversation_of(history)
    return _Request(_as_messages(conversation), passages=passages)


_QUESTION = frozenset(("input", "question"))


def _question(inputs: Mapping[str, Any]) -> Any:
    return inputs.get("input", inputs.get("question", ""))


def _messages(inputs: Mapping[str, Any], name: str | None) -> list[BaseMessage]:
    history = inputs[name] if name is not None else []
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise InputError(f"{name} is {type(history).__name__}: pass a list of messages")
    return convert_to_messages(history)


def _as_messages(conversation: Iterable[Message]) -> list[BaseMessage]:
    return convert_to_messages([(message["role"], message["content"]) for message in conversation])


# In place of the documents. Mustache goes through lists of dictionaries only.
_MARKS: tuple[Any, ...] = (StandIn(CONTEXT_MARK), [{"page_content": CONTEXT_MARK, "metadata": {}}])


def _request(
    prompt: BasePromptTemplate[Any],
    inputs: Mapping[str, Any],
    document_variable_name: str,
    documents: Sequence[Passage],
) -> _Request:
    """What a prompt's messages ask, with the places of documents and question marked, so that nothing is guessed."""
    asked = _question(inputs)
    question = asked if isinstance(asked, str) and asked.strip() else None
    values = _values(prompt, inputs, document_variable_name, question)

    def conversation(shown: Any) -> tuple[list[Message], list[Passage]]:
        messages = prompt.format_prompt(**{**values, document_variable_name: shown}).to_messages()
        if question is not None and not any(
            found in message.text for message in messages for found in (CONTEXT_MARK, QUESTION_MARK)
        ):
            messages = [*messages, HumanMessage(QUESTION_MARK)]
        return conversation_of(messages)

    for mark in (*_MARKS, inputs[document_variable_name]):
        turns, passages = conversation(mark)
        place = next((place for place, turn in enumerate(turns) if CONTEXT_MARK in turn["content"]), None)
        if place is not None:
            break
    looped: list[Passage] = []
    if place is not None and isinstance(mark, StandIn):

        def text(shown: Sequence[Any]) -> str | None:
            found, _ = conversation(shown)
            return found[place]["content"] if len(found) == len(turns) else None

        given = inputs[document_variable_name]
        if loop := loop_over(given, [passage.text for passage in documents], text):
            turns[place]["content"] = f"{loop.before}{CONTEXT_MARK}{loop.after}"
            looped = [
                FormattedPassage(
                    shown if passage.text.strip() else "", passage.id, None, passage.metadata, passage.score
                )
                for passage, shown in zip(documents, loop.shown, strict=True)
            ]
    kind = kind_of(turns) if turns else "own"
    parsed = parse_marked(turns, question, instructions="")
    if parsed is None:  # a prompt without documents is read as it is
        filled = [
            Message(role=turn["role"], content=turn["content"].replace(QUESTION_MARK, question or "")) for turn in turns
        ]
        return _Request(_as_messages(filled), passages=passages)
    options: dict[str, Any] = {}
    if words := (parsed.instructions or "").strip():
        # Where a prompt is known, its user's words stand behind Finch's own; else they stand in for those.
        options = {"prompt_instructions": words, "keeps_default_instructions": kind == "known"}
    system = [SystemMessage(parsed.system_prompt)] if parsed.system_prompt else []
    asking = [*system, *_as_messages(parsed.history), HumanMessage(parsed.question)]
    return _Request(asking, looped, passages, options)


def _values(
    prompt: BasePromptTemplate[Any], inputs: Mapping[str, Any], document_variable_name: str, question: str | None
) -> dict[str, Any]:
    """What is filled into a prompt, but for the documents."""
    placeholders = dict(_placeholders(prompt))
    values = {**inputs, **_history_for(prompt, placeholders, inputs)}
    if question is not None:
        same = [name for name in _QUESTION if name not in placeholders and inputs.get(name, question) == question]
        values.update(dict.fromkeys(same, QUESTION_MARK))
    if missing := set(prompt.input_variables) - {*values, document_variable_name}:
        raise InputError(
            f"the prompt needs {_listed(missing)}, and the input has {_listed(inputs)}; documents are looked for under "
            f"{document_variable_name!r}: see document_variable_name"
        )
    if isinstance(_question(inputs), str) and question is None and not _QUESTION.isdisjoint(prompt.input_variables):
        raise InputError("the question is empty: pass one under 'input'")
    return values


def _placeholders(prompt: Any) -> Iterator[tuple[str, bool]]:
    """The names of a prompt's lists of messages, and whether they may be left out."""
    for part in getattr(prompt, "messages", ()):
        if isinstance(part, MessagesPlaceholder):
            yield part.variable_name, part.optional
        else:
            yield from _placeholders(part)


def _history_for(
    prompt: BasePromptTemplate[Any], placeholders: Mapping[str, bool], inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """The conversation for a prompt that has a place for it, under whatever name."""
    given = next((name for name in _HISTORY if inputs.get(name) and name not in placeholders), None)
    values: dict[str, Any] = {}
    for name, optional in placeholders.items():
        if name in inputs or (optional and name not in _HISTORY):
            continue
        if given is not None and given not in prompt.input_variables:
            values[name], given = _messages(inputs, given), None
        elif name in _HISTORY:
            values[name] = []
    for name in set(prompt.input_variables).intersection(_HISTORY).difference(placeholders):  # in a text
        told = inputs.get(name, "")
        values[name] = told if isinstance(told, str) else get_buffer_string(_messages(inputs, name))
    return values
