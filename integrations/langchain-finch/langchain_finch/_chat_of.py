"""The chat model behind what LangChain wraps around models: bindings, fallbacks, alternatives, chains that parse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.runnables import Runnable, RunnableLambda, RunnableSequence, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.configurable import RunnableConfigurableAlternatives, RunnableConfigurableFields

from finch_rag import Passage, SettingsError

from .chat_models import ChatFinch
from .llms import FinchLLM

# What LangChain wraps around a model (bind, with_config, with_retry; configurable_fields), and where the model is.
_WRAPPERS: tuple[tuple[Any, str], ...] = ((RunnableBindingBase, "bound"), (RunnableConfigurableFields, "default"))
_ALL_WRAPPERS = (*_WRAPPERS, (RunnableWithFallbacks, "runnable"), (RunnableConfigurableAlternatives, "default"))


def constant(messages: list[BaseMessage]) -> Runnable[Any, list[BaseMessage]]:
    """A runnable that hands out messages, whatever it is given.

    Args:
        messages: The messages.
    """
    return RunnableLambda(lambda _: messages, name="messages")


def as_chat(llm: Any, instead_of_finch: bool = False) -> Runnable[Any, Any]:
    """The chat model of an LLM, with the same settings and engine, and with whatever is bound to it.

    A completion model cannot take a conversation and documents apart from it.

    Args:
        llm: See `create_finch_documents_chain`.
        instead_of_finch: Whether other chat models will do.

    Raises:
        SettingsError: If it is none of these.
    """
    if isinstance(llm, ChatFinch):
        return llm
    if isinstance(llm, FinchLLM):
        given = {*llm.model_fields_set, "engine_source"} & set(ChatFinch.model_fields)
        return ChatFinch(**{name: getattr(llm, name) for name in given})
    changed: dict[str, Any] = {}
    if isinstance(llm, RunnableSequence):
        changed = {"first": as_chat(llm.first, instead_of_finch)}
    elif isinstance(llm, RunnableWithFallbacks):
        changed = {
            "runnable": as_chat(llm.runnable, instead_of_finch),
            "fallbacks": [as_chat(fallback, True) for fallback in llm.fallbacks],
        }
    elif isinstance(llm, RunnableConfigurableAlternatives):
        changed = {
            "default": as_chat(llm.default, instead_of_finch),
            "alternatives": {name: _alternative(other) for name, other in llm.alternatives.items()},
        }
    else:
        for wrapper, inner in _WRAPPERS:
            if isinstance(llm, wrapper):
                changed = {inner: as_chat(getattr(llm, inner), instead_of_finch)}
    if changed:
        wrapped: Runnable[Any, Any] = llm.model_copy(update=changed)
        return wrapped
    if not instead_of_finch:
        raise SettingsError(
            f"the documents chain needs a FinchLLM or a ChatFinch, not {type(llm).__name__}; other models have "
            "create_stuff_documents_chain"
        )
    if isinstance(llm, BaseChatModel):
        return RunnableLambda(_AsOneText(llm), name="documents_as_one_text")
    raise SettingsError(
        f"a fallback or alternative is {type(llm).__name__}: pass a chat model, or put the fallback around the whole "
        "documents chain"
    )


def _alternative(other: Any) -> Any:
    """An alternative that is a function makes its model when it is chosen."""
    return as_chat(other, True) if isinstance(other, Runnable) else _LazyChat(other)


@dataclass(frozen=True)
class _LazyChat:
    make: Callable[[], Any]

    def __call__(self) -> Runnable[Any, Any]:
        return as_chat(self.make(), True)


@dataclass(frozen=True)
class _AsOneText:
    """Asks a chat model that is not Finch's, which takes no documents apart from the messages."""

    model: BaseChatModel

    def __call__(
        self,
        messages: list[BaseMessage],
        documents: Sequence[Passage] = (),
        instructions: str | None = None,
        prompt_instructions: str | None = None,
        keeps_default_instructions: bool = False,
        notes: Sequence[str] = (),
        store: Any = None,
        **options: Any,
    ) -> Runnable[Any, Any]:
        texts = [passage.titled_text for passage in documents if passage.text.strip()]
        *earlier, question = messages
        asked = HumanMessage("\n\n".join(filter(None, (instructions, prompt_instructions, *texts, question.text))))
        return constant([*earlier, asked]) | self.model.bind(**options)


def parses(chat: Runnable[Any, Any]) -> bool:
    """Whether a model's answers go through something that makes another thing of them.

    Args:
        chat: What `as_chat` returned.
    """
    inner = _inner(chat)
    return isinstance(chat, RunnableSequence) if inner is None else parses(inner)


def _inner(chat: Runnable[Any, Any]) -> Runnable[Any, Any] | None:
    """The model that something is wrapped around: the first one that is asked; None where nothing is."""
    for wrapper, name in _ALL_WRAPPERS:
        if isinstance(chat, wrapper):
            inner: Runnable[Any, Any] = getattr(chat, name)
            return inner
    return None
