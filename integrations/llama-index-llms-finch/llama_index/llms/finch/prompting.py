"""LlamaIndex's prompt templates -> messages, the passages apart from the words around them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.prompts import BasePromptTemplate, SelectorPromptTemplate
from llama_index.core.prompts.base import LangchainPromptTemplate
from llama_index.core.schema import NodeWithScore
from llama_index.core.types import BaseOutputParser, Model

from finch_rag import Passage
from finch_rag.adapters import CONTEXT_MARK, QUESTION_MARK, can_force_json, kind_of, parse_marked

from .messages import PassagesMessage, split_messages

_CONTEXTS = ("context_str", "context_msg")  # LlamaIndex's names for the nodes' text in a prompt
_QUESTION = "query_str"


class PromptedLLM(CustomLLM):
    """An LLM that fills in prompt templates itself: it knows what in them is context and what is the question."""

    @property
    @abstractmethod
    def own_instructions(self) -> str | None:
        """The instructions that the user gave; None for Finch's own."""

    @abstractmethod
    def fits(self, prompt: str) -> bool:
        """Whether a prompt can be read whole.

        Args:
            prompt: As one text.
        """

    @abstractmethod
    def known_passages(self, context: str) -> list[Passage] | None:
        """The passages of a context that is made of nodes that are known; None where it is not.

        Args:
            context: Nodes as LlamaIndex joins them.
        """

    def _get_messages(self, prompt: BasePromptTemplate, **prompt_args: Any) -> list[ChatMessage]:
        messages = passages_messages(prompt, self, prompt_args, self.output_parser)
        return super()._get_messages(prompt, **prompt_args) if messages is None else self._extend_messages(messages)

    def _get_prompt(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        text = super()._get_prompt(prompt, **prompt_args)
        messages = passages_messages(prompt, self, prompt_args, self.output_parser)
        return text if messages is None else PromptText(text, messages)

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """An object by a pydantic class; forced where llguidance is installed, and else as far as the model can.

        Args:
            output_cls: The class.
            prompt: The prompt.
            llm_kwargs: Options of the call.
            prompt_args: Of the prompt.
        """
        return super().structured_predict(output_cls, _Apart.of(prompt), _forced(output_cls, llm_kwargs), **prompt_args)

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Like `structured_predict`, for an event loop.

        Args:
            output_cls: See `structured_predict`.
            prompt: See `structured_predict`.
            llm_kwargs: See `structured_predict`.
            prompt_args: See `structured_predict`.
        """
        forced = _forced(output_cls, llm_kwargs)
        return await super().astructured_predict(output_cls, _Apart.of(prompt), forced, **prompt_args)

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        apart: Any = _Apart.of(prompt)  # LLM's signature says PromptTemplate, and its callers pass any
        return super()._structured_stream_call(output_cls, apart, _forced(output_cls, llm_kwargs), **prompt_args)

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        apart: Any = _Apart.of(prompt)
        forced = _forced(output_cls, llm_kwargs)
        return await super()._structured_astream_call(output_cls, apart, forced, **prompt_args)


class PromptText(str):
    """A prompt as one text, which also knows its messages with the passages apart.

    Attributes:
        messages: See `passages_messages`.
    """

    messages: list[ChatMessage]

    def __new__(cls, text: str, messages: list[ChatMessage]) -> PromptText:
        """Makes one.

        Args:
            text: The text.
            messages: The same as messages.
        """
        made = super().__new__(cls, text)
        made.messages = messages
        return made


class _Apart(BasePromptTemplate):
    """A prompt whose messages have the passages apart; a program sets its output parser, and formats it."""

    prompt: BasePromptTemplate

    @classmethod
    def of(cls, prompt: BasePromptTemplate) -> _Apart:
        """The prompt, wrapped."""
        fields = ("metadata", "template_vars", "kwargs", "output_parser")
        return cls(prompt=prompt, **{name: getattr(prompt, name) for name in fields})

    def partial_format(self, **kwargs: Any) -> _Apart:
        """The same with some fields filled in."""
        return self.of(self._parsed().partial_format(**kwargs))

    def format_messages(self, llm: BaseLLM | None = None, **kwargs: Any) -> list[ChatMessage]:
        """The messages, with the passages apart for an LLM that reads them so."""
        found = self._apart(llm, kwargs)
        return self._parsed().format_messages(llm=llm, **kwargs) if found is None else found

    def format(self, llm: BaseLLM | None = None, **kwargs: Any) -> str:
        """The prompt as one text, which knows its messages."""
        text = self._parsed().format(llm=llm, **kwargs)
        found = self._apart(llm, kwargs)
        return text if found is None else PromptText(text, found)

    def get_template(self, llm: BaseLLM | None = None) -> str:
        """The prompt's own template."""
        return self.prompt.get_template(llm=llm)

    def _apart(self, llm: BaseLLM | None, fields: Mapping[str, Any]) -> list[ChatMessage] | None:
        return passages_messages(self._parsed(), llm, fields) if isinstance(llm, PromptedLLM) else None

    def _parsed(self) -> BasePromptTemplate:
        return self.prompt.model_copy(update={"output_parser": self.output_parser})


def passages_messages(
    prompt: BasePromptTemplate,
    llm: PromptedLLM,
    fields: Mapping[str, Any],
    parser: BaseOutputParser | None = None,
    nodes: Sequence[NodeWithScore | Passage] | None = None,
) -> list[ChatMessage] | None:
    """What a prompt asks, as a message with passages; it is formatted with marks, so that nothing is guessed.

    Args:
        prompt: A template.
        llm: Who reads it.
        fields: What is filled in.
        parser: Says what form the answer shall have, beside the prompt's own.
        nodes: The passages; those of the filled in context when None.

    Returns:
        The messages; None where Finch needs no such help: the prompt shows no context, or is one of LlamaIndex's own,
        which Finch tells apart when it is filled in, and reports by its name.
    """
    while isinstance(prompt, SelectorPromptTemplate):
        prompt = prompt.select(llm=llm)
    if isinstance(prompt, LangchainPromptTemplate):  # what was filled in before cannot be seen
        return None
    values = {**prompt.kwargs, **fields}
    values |= {name: make(**values) for name, make in (prompt.function_mappings or {}).items()}
    name = next((name for name in _CONTEXTS if shows(prompt, name) and (nodes or values.get(name))), None)
    if name is None:
        return None
    question = values.get(_QUESTION)
    marks = {name: CONTEXT_MARK} | ({_QUESTION: QUESTION_MARK} if isinstance(question, str) else {})
    bare = prompt.model_copy(update={"kwargs": {}, "function_mappings": {}, "output_parser": None})
    turns = split_messages(bare.format_messages(**{**values, **marks})).messages
    parsers = [each for each in (prompt.output_parser, parser) if each is not None]
    kind = kind_of(turns)
    if kind == "task" and nodes is None:
        return None
    context = "" if nodes is not None else _joined(values[name])
    known = llm.known_passages(context) if context else None
    if kind == "known" and not parsers and known is None:
        return None
    if nodes is None and not isinstance(question, str) and llm.fits(prompt.format(llm=llm, **fields)):
        return None  # a task over a text, which is best read as it is
    parsed = parse_marked(turns, question, llm.own_instructions, "" if known else context)
    if parsed is None:
        return None
    asked, instructions = parsed.question, parsed.instructions
    for each in {id(each): each for each in parsers}.values():
        asked, form = _form(each, asked)
        instructions = "\n\n".join(filter(None, (instructions or llm.own_instructions, form))) or None
    system = [ChatMessage(parsed.system_prompt, role=MessageRole.SYSTEM)] if parsed.system_prompt else []
    history = [ChatMessage(turn["content"], role=MessageRole(turn["role"])) for turn in parsed.history]
    passages = (known or parsed.passages) if nodes is None else nodes
    return [*system, *history, PassagesMessage(asked, passages, instructions, parsed.notes)]


def shows(prompt: BasePromptTemplate, name: str = _CONTEXTS[0]) -> bool:
    """Whether a prompt has a place for a field, by its own name or by one that it is mapped to.

    Args:
        prompt: A template.
        name: LlamaIndex's name of the field.
    """
    return (prompt.template_var_mappings or {}).get(name, name) in prompt.template_vars


def _form(parser: BaseOutputParser, question: str) -> tuple[str, str]:
    """A question, and what a parser says of the answer's form; what decides what is kept is the question alone."""
    said = parser.format(question)
    return (question, said[len(question) :].strip()) if said.startswith(question) else (said, "")


def _joined(context: str | Sequence[Any]) -> str:
    return context if isinstance(context, str) else "\n\n".join(map(str, context))


def _forced(output_cls: type[Model], llm_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of a call whose answer is parsed as a class."""
    schema = {"json_schema": output_cls.model_json_schema()} if can_force_json() else {}
    return {**schema, **(llm_kwargs or {})}
