"""The documents chain: documents reach the model apart, whatever the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage, convert_to_messages
from langchain_core.output_parsers import BaseTransformOutputParser, StrOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.prompts import BasePromptTemplate, format_document
from langchain_core.runnables import Runnable, RunnableLambda, RunnableSequence
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.configurable import RunnableConfigurableFields
from langchain_core.runnables.utils import AddableDict

from finch_rag import InputError, Passage, SettingsError
from finch_rag.adapters import CONTEXT_MARK, QUESTION_MARK, parse_marked

from ._convert import conversation_of, passages_of
from .chat_models import ChatFinch
from .llms import FinchLLM

# What LangChain wraps around a model (bind, with_config, with_retry; configurable_fields), and where the model is.
_WRAPPERS: tuple[tuple[Any, str], ...] = ((RunnableBindingBase, "bound"), (RunnableConfigurableFields, "default"))


def create_finch_documents_chain(
    llm: FinchLLM | ChatFinch | Runnable[Any, Any],
    prompt: BasePromptTemplate[Any] | None = None,
    *,
    document_prompt: BasePromptTemplate[str] | None = None,
    document_variable_name: str = "context",
    with_citations: bool = False,
) -> Runnable[dict[str, Any], Any]:
    """A chain that answers a question from documents in one call, for `create_retrieval_chain` and LCEL.

    Its input is a dictionary with the documents, "input" (or "question"), and "chat_history" (messages) where there
    is one. The documents are kept or evicted whole, and cited by their ids, because they are never joined to one text.

    Args:
        llm: A `FinchLLM` or `ChatFinch`, also with options bound to it; or a chain that begins with one and parses its
            answers, as `ChatFinch.with_structured_output` makes it, whose outcome is then the answer.
        prompt: Makes the messages of the input; the question alone when None. Where it has the documents' variable,
            the documents are still read apart: words of the same message before it become the instructions, words
            behind it the question, and prompts that finch-rag knows are taken apart exactly.
        document_prompt: Formats each document's text; its own text, below its title if it has one, when None.
        document_variable_name: The documents' key in the input.
        with_citations: Return a dictionary with "text", "citations" and "report" in place of the text; not of a chain.

    Returns:
        A runnable; its stream has the text in pieces, then, in one more, citations and report where asked for.

    Raises:
        SettingsError: If the LLM is another one.
        InputError: When it runs: if there are no documents, one has no text, or there is no question.

    Example:
        >>> chain = create_retrieval_chain(retriever, create_finch_documents_chain(ChatFinch(model="embedded")))
        >>> chain.invoke({"input": "Who signed it?"})["answer"]
    """
    chat = _as_chat(llm)
    if (parses := _parses(chat)) and with_citations:
        raise SettingsError(
            "with_citations is for a model, and this chain parses its answers: leave it out; the raw message of "
            "with_structured_output(..., include_raw=True) has the citations"
        )
    parser: BaseTransformOutputParser[Any] = _CitedAnswer() if with_citations else StrOutputParser()

    def ask(inputs: Mapping[str, Any]) -> Runnable[Any, Any]:
        if not isinstance(inputs, Mapping):
            raise InputError(
                f"the input is {type(inputs).__name__}: pass a dictionary with {document_variable_name} and input"
            )
        documents = _documents(inputs, document_variable_name, document_prompt)
        request = _default_request(inputs) if prompt is None else _request(prompt, inputs, document_variable_name)
        # The messages are known, so the input, which LangChain hands on, is not looked at again.
        asked = _constant(request.messages) | chat.bind(documents=documents, **request.options)
        return asked if parses else asked | parser

    return RunnableLambda(ask, name="finch_documents_chain")


@dataclass(frozen=True)
class _Request:
    """What a prompt asks, without its documents."""

    messages: list[BaseMessage]
    options: dict[str, Any] = field(default_factory=dict)


class _CitedAnswer(BaseTransformOutputParser[AddableDict]):
    """An answer's message, or a piece of one, as text, citations and report."""

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
            answer.update({name: found[name] for name in ("citations", "report") if name in found})
        return answer

    def parse(self, text: str) -> AddableDict:
        """An answer without message.

        Args:
            text: The answer.
        """
        return AddableDict(text=text)


def _constant(messages: list[BaseMessage]) -> Runnable[Any, list[BaseMessage]]:
    return RunnableLambda(lambda _: messages, name="messages")


def _as_chat(llm: Any) -> Runnable[Any, Any]:
    """The chat model of an LLM, with the same settings and engine, and with whatever is bound to it.

    A completion model cannot take a conversation and documents apart from it.
    """
    if isinstance(llm, ChatFinch):
        return llm
    if isinstance(llm, FinchLLM):
        given = {*llm.model_fields_set, "engine_source"} & set(ChatFinch.model_fields)
        return ChatFinch(**{name: getattr(llm, name) for name in given})
    if isinstance(llm, RunnableSequence):
        return llm.model_copy(update={"first": _as_chat(llm.first)})
    for wrapper, inner in _WRAPPERS:
        if isinstance(llm, wrapper):
            wrapped: Runnable[Any, Any] = llm.model_copy(update={inner: _as_chat(getattr(llm, inner))})
            return wrapped
    raise SettingsError(
        f"the documents chain needs a FinchLLM or a ChatFinch, not {type(llm).__name__}; other models have "
        "create_stuff_documents_chain"
    )


def _parses(chat: Runnable[Any, Any]) -> bool:
    """Whether a model's answers go through something that makes another thing of them."""
    for wrapper, inner in _WRAPPERS:
        if isinstance(chat, wrapper):
            return _parses(getattr(chat, inner))
    return isinstance(chat, RunnableSequence)


def _documents(inputs: Mapping[str, Any], name: str, document_prompt: BasePromptTemplate[str] | None) -> list[Passage]:
    documents = inputs.get(name)
    if documents is None:
        raise InputError(f"the input has no {name!r}: pass a list of documents under it, or set document_variable_name")
    passages = passages_of(documents)
    if document_prompt is None:
        return passages
    formatted = []
    for document, passage in zip(documents, passages, strict=True):
        if not isinstance(document, Document):
            document = Document(passage.text, metadata=dict(passage.metadata))
        # A document prompt says itself where a title goes.
        formatted.append(Passage(format_document(document, document_prompt), passage.id, None, passage.metadata))
    return formatted


def _default_request(inputs: Mapping[str, Any]) -> _Request:
    question = _question(inputs)
    if not isinstance(question, str):
        raise InputError(f"the input's question is {type(question).__name__}: pass a text under 'input'")
    return _Request([*_history(inputs), HumanMessage(question)])


def _question(inputs: Mapping[str, Any]) -> Any:
    return inputs.get("input", inputs.get("question", ""))


def _history(inputs: Mapping[str, Any]) -> list[BaseMessage]:
    history = inputs.get("chat_history") or []
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise InputError(f"chat_history is {type(history).__name__}: pass a list of messages")
    return convert_to_messages(history)


def _request(prompt: BasePromptTemplate[Any], inputs: Mapping[str, Any], document_variable_name: str) -> _Request:
    """What a prompt's messages ask, with the places of documents and question marked, so that nothing is guessed."""
    question = _question(inputs)
    marked = dict.fromkeys(("input", "question"), QUESTION_MARK) if isinstance(question, str) else {}
    values = {"chat_history": [], **inputs, **marked, document_variable_name: CONTEXT_MARK}
    if missing := set(prompt.input_variables) - set(values):
        raise InputError(
            f"the prompt needs {', '.join(sorted(missing))}, and the input has {', '.join(sorted(inputs))}; documents "
            f"are looked for under {document_variable_name!r}: see document_variable_name"
        )
    messages = prompt.format_prompt(**values).to_messages()
    conversation, _ = conversation_of(messages)
    parsed = parse_marked(conversation, question or None)
    if parsed is None:  # a prompt without documents is read as it is
        plain = {"input": question, "question": question, "chat_history": [], **inputs}
        return _Request(prompt.format_prompt(**plain).to_messages())
    system = [SystemMessage(parsed.system_prompt)] if parsed.system_prompt else []
    history = convert_to_messages([(message["role"], message["content"]) for message in parsed.history])
    options = {} if parsed.instructions is None else {"instructions": parsed.instructions}
    return _Request([*system, *history, HumanMessage(parsed.question)], options)
