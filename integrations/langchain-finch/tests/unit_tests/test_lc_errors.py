from __future__ import annotations

from typing import Any

import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from langchain_finch import ChatFinch, FinchLLM, create_finch_documents_chain
from lc_support import QUESTION, SETTINGS, Fixed, Listener, each_way, one_line

from finch_rag import FinchError, InputError, ModelError, WindowError

BOTH = pytest.mark.parametrize("kind", [ChatFinch, FinchLLM])

CALLS: list[tuple[dict[str, Any], type[FinchError], str]] = [
    ({"documents": "a text"}, InputError, "documents is str: pass a list"),
    ({"budget": 0}, InputError, "budget is 0: the least is 1 token"),
    ({"budget": "many"}, InputError, "budget is 'many': input should be a valid integer"),
    ({"budget": 10**6}, WindowError, "budget 1000000 is too large"),
    ({"chunk_size": 10**6}, WindowError, "chunk_size 1000000 is too large"),
    ({"max_tokens": 10**6}, WindowError, "the question takes"),
    ({"max_tokens": 0}, InputError, "max_new_tokens is 0: the least is 1"),
    ({"temperature": -1}, InputError, "temperature is -1"),
    ({"temperature": "hot"}, InputError, "temperature is 'hot': input should be a valid number"),
    ({"selection": "word"}, InputError, "selection is 'word': input should be 'passage' or 'token'"),
    ({"stop": [""]}, InputError, "a stop string is empty"),
    ({"top_p": 0}, InputError, "top_p is 0"),
    ({"documents": ["a text"] * 9, "max_context_tokens": 10}, InputError, "the passages have"),
    ({"bugdet": 5}, InputError, "unknown option bugdet: use documents, budget"),
    ({"model": "other"}, InputError, "unknown option model: use documents, budget"),
    ({"max_tokens": 5, "max_new_tokens": 5}, InputError, "max_new_tokens and max_tokens are the same setting"),
]


@BOTH
@pytest.mark.parametrize(("options", "error", "said"), CALLS, ids=[said for *_, said in CALLS])
async def test_bad_options_reach_the_caller_in_one_line(
    kind: Any, folder: str, options: dict[str, Any], error: type[FinchError], said: str
) -> None:
    await each_way(kind(model=folder, **{**SETTINGS, "max_tokens": None}), QUESTION, error, said, **options)


@BOTH
async def test_an_empty_question_is_told(kind: Any, folder: str) -> None:
    model = kind(model=folder, **SETTINGS)
    await each_way(model, "  ", InputError, "the question is empty: ask one", documents=["a text"])


async def test_a_call_without_result_is_told(chat: ChatFinch) -> None:
    messages = [HumanMessage("hello"), AIMessage("", tool_calls=[{"name": "search", "args": {}, "id": "1"}])]
    await each_way(chat, messages, InputError, "message 1 calls a tool, search, whose result is not among the messages")


@BOTH
async def test_an_unknown_prompt_that_does_not_fit_is_an_error_where_it_is_wanted(kind: Any, folder: str) -> None:
    prompt = "\n\n".join(["Sort these words.", *(f"word {n}" for n in range(2000)), "The longest comes first."])
    said = f"this prompt of {len(prompt)} characters is of no known template and does not fit"
    await each_way(kind(model=folder, strict=True, **SETTINGS), prompt, InputError, said)
    await each_way(kind(model=folder, **SETTINGS), prompt, InputError, said, strict=True)
    lenient = kind(model=folder, strict=True, **SETTINGS)
    with pytest.warns(UserWarning, match="is taken as the question"):
        assert lenient.invoke(prompt, strict=False)


@BOTH
async def test_an_unknown_model_is_told_at_the_first_call(kind: Any) -> None:
    model = kind(model="no/such-model")
    await each_way(model, QUESTION, ModelError, "cannot load the model 'no/such-model'")
    with pytest.raises(ModelError):
        model.get_num_tokens("text")


CHAIN_CALLS: list[tuple[dict[str, Any], dict[str, Any], type[FinchError], str]] = [
    ({"question": " "}, {}, InputError, "the question is empty"),
    ({"question": "why? " * 2000}, {}, WindowError, "the question takes"),
    ({}, {"max_context_tokens": 10}, InputError, "the passages have"),
    ({}, {"budget": 10**6}, WindowError, "budget 1000000 is too large"),
    ({}, {"model": "no/such-model"}, ModelError, "cannot load the model 'no/such-model'"),
]


@BOTH
@pytest.mark.parametrize(("input_", "settings", "error", "said"), CHAIN_CALLS, ids=[said for *_, said in CHAIN_CALLS])
async def test_a_retrieval_chain_tells_it_too(
    kind: Any,
    folder: str,
    documents: list[Document],
    input_: dict[str, Any],
    settings: dict[str, Any],
    error: type[FinchError],
    said: str,
) -> None:
    answers = create_finch_documents_chain(kind(**{"model": folder, **SETTINGS, **settings}))
    chain = create_retrieval_chain(Fixed(found=input_.get("found", documents)), answers)
    await each_way(chain, {"input": input_.get("question", QUESTION)}, error, said)


def test_tools_are_refused_in_one_line(chat: ChatFinch) -> None:
    with pytest.raises(NotImplementedError, match="ChatFinch calls no tools") as raised:
        chat.bind_tools([])
    one_line(raised)


def test_unknown_arguments_of_structured_output_are_told(chat: ChatFinch) -> None:
    with pytest.raises(InputError, match="unknown argument tools") as raised:
        chat.with_structured_output({"title": "T", "type": "object", "properties": {}}, tools=[])
    one_line(raised)


@BOTH
def test_errors_are_told_to_callbacks(kind: Any, folder: str) -> None:
    listener = Listener()
    with pytest.raises(InputError):
        kind(model=folder).invoke(QUESTION, budget=0, config={"callbacks": [listener]})
    assert [type(error) for error in listener.errors] == [InputError]
