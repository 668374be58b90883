from __future__ import annotations

import gc
from typing import Any

import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.prompts import BasePromptTemplate, ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnablePassthrough
from langchain_finch import ChatFinch, FinchLLM, create_finch_documents_chain
from langchain_finch._convert import passages_of
from lc_support import OTHER_QUESTION, QUESTION, SETTINGS, STUFF_CHAT, Fixed, Listener, ids, one_line

from finch_rag import Finch, InputError, SettingsError


def test_it_answers_as_the_engine_does_from_the_same_passages(
    chat: ChatFinch, documents: list[Document], shared: Finch
) -> None:
    chain = create_finch_documents_chain(chat)
    expected = shared.ask(QUESTION, passages_of(documents), budget=60, chunk_size=64, max_new_tokens=8).text
    assert chain.invoke({"context": documents, "input": QUESTION}) == expected
    assert chain.invoke({"context": documents, "question": QUESTION}) == expected


def test_a_retrieval_chain_makes_one_call(chat: ChatFinch, documents: list[Document]) -> None:
    listener = Listener()
    chain = create_retrieval_chain(Fixed(found=documents), create_finch_documents_chain(chat))
    result = chain.invoke({"input": QUESTION}, config={"callbacks": [listener]})
    assert result["context"] == documents
    assert result["answer"] == create_finch_documents_chain(chat).invoke({"context": documents, "input": QUESTION})
    assert listener.calls == 1


def test_both_models_give_the_same_answer(chat: ChatFinch, llm: FinchLLM, documents: list[Document]) -> None:
    inputs = {"context": documents, "input": QUESTION, "chat_history": [("human", "where?"), ("ai", "there")]}
    of_chat, of_llm = (create_finch_documents_chain(model).invoke(inputs) for model in (chat, llm))
    assert of_chat == of_llm


def test_a_completion_model_shares_its_engine_and_settings(shared: Finch, documents: list[Document]) -> None:
    listener = Listener()
    own = Finch(shared.model, shared.tokenizer, name="own", heads="all", max_new_tokens=5)
    chain = create_finch_documents_chain(FinchLLM(engine=own, budget=40, callbacks=[listener]), with_citations=True)
    report = chain.invoke({"context": documents, "input": QUESTION})["report"]
    assert (report["model"], report["budget"], report["new_tokens"]) == ("own", 40, 5)
    assert listener.calls == 1


def test_a_chain_keeps_what_its_completion_model_has_loaded(
    folder: str, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = FinchLLM(model=folder, device="cpu", **SETTINGS)  # another engine than that of the other tests
    llm.invoke("Hello")
    chain = create_finch_documents_chain(llm)
    del llm
    gc.collect()
    monkeypatch.setattr(Finch, "from_pretrained", None)
    assert chain.invoke({"context": documents, "input": QUESTION})


def test_citations_come_on_request(chat: ChatFinch, documents: list[Document]) -> None:
    chain = create_finch_documents_chain(chat, with_citations=True)
    result = chain.invoke({"context": documents, "input": QUESTION})
    assert set(result) == {"text", "citations", "statements", "support", "report"}
    assert set(ids(result["citations"])) <= {document.id for document in documents}
    assert result["report"]["passages"] == len(documents)
    pieces = list(chain.stream({"context": documents, "input": QUESTION}))
    assert "".join(piece["text"] for piece in pieces) == result["text"]
    assert [("citations" in piece, "report" in piece) for piece in pieces[:-1]] == [(False, False)] * (len(pieces) - 1)
    assert pieces[-1]["citations"] == result["citations"]


async def test_streams_and_batches(chat: ChatFinch, documents: list[Document]) -> None:
    chain = create_finch_documents_chain(chat)
    inputs: list[Any] = [{"context": documents, "input": question} for question in (QUESTION, OTHER_QUESTION, "why?")]
    expected = [chain.invoke(one) for one in inputs]
    assert chain.batch(inputs) == expected
    assert await chain.abatch(inputs) == expected
    pieces = list(chain.stream(inputs[0]))
    assert len(pieces) > 2
    assert "".join(pieces) == expected[0]
    assert "".join([piece async for piece in chain.astream(inputs[0])]) == expected[0]
    retrieval = create_retrieval_chain(Fixed(found=documents), chain)
    answers = [part["answer"] for part in retrieval.stream({"input": QUESTION}) if "answer" in part]
    assert len(answers) > 2
    assert "".join(answers) == expected[0]


def test_it_fits_into_expressions(chat: ChatFinch, documents: list[Document]) -> None:
    rag = {"context": Fixed(found=documents), "input": RunnablePassthrough()} | create_finch_documents_chain(chat)
    answer = create_finch_documents_chain(chat).invoke({"context": documents, "input": QUESTION})
    assert (rag | RunnableLambda(str.upper)).invoke(QUESTION) == answer.upper()


def test_the_history_is_read(chat: ChatFinch, documents: list[Document], asked: list[Any]) -> None:
    history: list[Any] = [HumanMessage("where?"), AIMessage("there")]
    create_finch_documents_chain(chat).invoke({"context": documents, "input": QUESTION, "chat_history": history})
    assert [turn["content"] for turn in asked[0][0]] == ["where?", "there", QUESTION]


STUFF = (
    "Use the following pieces of context to answer the question at the end. If you don't know the answer, just say "
    "that you don't know, don't try to make up an answer.\n\n{context}\n\nQuestion: {question}\nHelpful Answer:"
)
RLM = (
    "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer the "
    "question. If you don't know the answer, just say that you don't know. Use three sentences maximum and keep the "
    "answer concise.\nQuestion: {question} \nContext: {context} \nAnswer:"
)
HISTORY = MessagesPlaceholder("chat_history", optional=True)


@pytest.mark.parametrize(
    ("prompt", "turns", "options"),
    [
        (PromptTemplate.from_template(STUFF), [("user", QUESTION)], {}),
        (ChatPromptTemplate.from_template(RLM), [("user", QUESTION)], {}),
        (ChatPromptTemplate.from_messages([("system", STUFF_CHAT), ("human", "{input}")]), [("user", QUESTION)], {}),
        (
            ChatPromptTemplate.from_template(
                "Answer the question based only on the following context:\n{context}\n\nQuestion: {question}\n"
            ),
            [("user", QUESTION)],
            {"instructions": "Answer the question based only on the following context:"},
        ),
        (
            ChatPromptTemplate.from_template("Be brief.\n<context>\n{context}\n</context>\nQuery: {input}\nAnswer:"),
            [("user", QUESTION)],
            {"instructions": "Be brief."},
        ),
        (ChatPromptTemplate.from_template("Question: {input}\n\nContext:\n{context}"), [("user", QUESTION)], {}),
        (
            ChatPromptTemplate.from_messages([("system", "Be brief.\n\n{context}\n\nBe kind."), ("human", "{input}")]),
            [("system", "Be brief.\n\nBe kind."), ("user", QUESTION)],
            {},
        ),
        (
            ChatPromptTemplate.from_messages([("system", "{context}"), HISTORY, ("human", "{input}")]),
            [("user", QUESTION)],
            {},
        ),
        (
            ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "{input} (in {language})")]),
            [("system", "Be brief."), ("user", f"{QUESTION} (in French)")],
            {},
        ),
        (
            ChatPromptTemplate.from_messages([("system", "Name colours:\n\n{context}")]),
            [("user", QUESTION)],
            {"instructions": "Name colours:"},
        ),
    ],
    ids=["stuff", "rlm", "stuff chat", "docs", "tags", "question first", "system", "bare", "no context", "only system"],
)
def test_documents_stay_apart_whatever_the_prompt(
    chat: ChatFinch,
    documents: list[Document],
    asked: list[Any],
    prompt: BasePromptTemplate[Any],
    turns: list[tuple[str, str]],
    options: dict[str, str],
) -> None:
    chain = create_finch_documents_chain(chat, prompt, with_citations=True)
    result = chain.invoke({"context": documents, "input": QUESTION, "language": "French"})
    messages, passages, given = asked[0]
    assert [(turn["role"], turn["content"].strip()) for turn in messages] == turns
    assert passages == passages_of(documents)
    assert given.get("instructions") == options.get("instructions")
    assert result["report"]["parse_mode"] == "apart"


def test_a_known_prompt_keeps_what_the_user_added(chat: ChatFinch, documents: list[Document], asked: list[Any]) -> None:
    prompt = ChatPromptTemplate.from_messages(
        [("system", f"Speak like a sailor.\n{STUFF_CHAT}"), HISTORY, ("human", "{input}")]
    )
    history: list[BaseMessage] = [HumanMessage("where?"), AIMessage("there")]
    create_finch_documents_chain(chat, prompt).invoke(
        {"context": documents, "input": QUESTION, "chat_history": history}
    )
    messages, _, given = asked[0]
    own, *others = [turn["content"] for turn in messages]
    assert others == ["where?", "there", QUESTION]
    assert own.startswith("Speak like a sailor.")
    assert "instructions" not in given


def test_a_document_prompt_formats_each_document(chat: ChatFinch, documents: list[Document], asked: list[Any]) -> None:
    chain = create_finch_documents_chain(
        chat,
        document_prompt=PromptTemplate.from_template("{source}: {page_content}"),
        document_variable_name="docs",
        with_citations=True,
    )
    result = chain.invoke({"docs": documents, "input": QUESTION})
    assert [p.text for p in asked[0][1]] == [f"{d.metadata['source']}: {d.page_content}" for d in documents]
    assert [(p.id, p.title) for p in asked[0][1]] == [(d.id, None) for d in documents]
    assert result["citations"][0]["title"] == documents[result["citations"][0]["index"]].metadata["title"]


def test_what_is_bound_to_the_model_stays_bound(chat: ChatFinch, llm: FinchLLM, documents: list[Document]) -> None:
    inputs = {"context": documents, "input": QUESTION}
    length = ConfigurableField(id="length")
    for model in (chat, llm):
        for short in (
            model.bind(max_tokens=3),
            model.with_retry().bind(max_tokens=3),
            model.bind(max_tokens=3).with_config(tags=["a"]),
            model.configurable_fields(max_tokens=length).with_config(configurable={"length": 3}),
        ):
            chain = create_finch_documents_chain(short, with_citations=True)
            assert chain.invoke(inputs)["report"]["new_tokens"] == 3


def test_another_model_is_refused() -> None:
    with pytest.raises(SettingsError, match="needs a FinchLLM or a ChatFinch, not FakeListChatModel") as raised:
        create_finch_documents_chain(FakeListChatModel(responses=["a"]))
    one_line(raised)


PROMPT = ChatPromptTemplate.from_template("{context} {input} {language}")
OTHER_KEY = ChatPromptTemplate.from_template("{docs} {input}")
NEEDS_TURNS = ChatPromptTemplate.from_messages([MessagesPlaceholder("turns"), ("human", "{context} {input}")])


@pytest.mark.parametrize(
    ("inputs", "prompt", "said"),
    [
        ({"input": QUESTION}, None, "the input has no 'context'"),
        ({"docs": ["a"], "input": QUESTION}, None, "it has docs, input: pass a list of documents under it, or set doc"),
        ({}, None, "the input has no 'context', it has nothing"),
        ({"context": "a text", "input": QUESTION}, None, "documents is str"),
        ({"context": ["a"]}, None, "the question is empty"),
        ({"context": ["a"], "input": " "}, None, "the question is empty"),
        ({"context": ["a"], "input": 7}, None, "the input's question is int"),
        ({"context": ["a"], "input": QUESTION, "chat_history": "hello"}, None, "chat_history is str"),
        ({"context": ["a"], "input": QUESTION, "history": "hello"}, None, "history is str"),
        ({"context": ["a"], "input": QUESTION}, PROMPT, "the prompt needs language, and the input has context, input"),
        ({"context": ["a"], "q": QUESTION, "language": "German"}, PROMPT, "the prompt needs input, and the input has"),
        ({"context": ["a"], "input": " ", "language": "German"}, PROMPT, "the question is empty"),
        ({"context": ["a"], "input": QUESTION}, OTHER_KEY, "needs docs.* under 'context': see document_variable_name"),
        ({"context": ["a"], "input": QUESTION}, NEEDS_TURNS, "the prompt needs turns"),
        (QUESTION, None, "the input is str"),
    ],
)
async def test_bad_input_is_told_in_one_line(folder: str, inputs: Any, prompt: Any, said: str) -> None:
    chain = create_finch_documents_chain(ChatFinch(model=folder, **SETTINGS), prompt)
    with pytest.raises(InputError, match=said) as raised:
        chain.invoke(inputs)
    one_line(raised)
    with pytest.raises(InputError, match=said):
        list(chain.stream(inputs))
    with pytest.raises(InputError, match=said):
        await chain.ainvoke(inputs)
    with pytest.raises(InputError, match=said):
        [piece async for piece in chain.astream(inputs)]


@pytest.mark.parametrize("prompt", [None, PromptTemplate.from_template("Be brief. {context}\nQuestion: {input}")])
def test_a_retriever_that_finds_nothing_gives_an_answer_and_a_note(
    chat: ChatFinch, asked: list[Any], prompt: Any
) -> None:
    answers = create_finch_documents_chain(chat, prompt, with_citations=True)
    answer = create_retrieval_chain(Fixed(found=[]), answers).invoke({"input": QUESTION})["answer"]
    assert asked[0][0] == [{"role": "user", "content": QUESTION}]
    assert answer["citations"] == []
    assert answer["report"]["notes"] == ["no documents were given: answered without any"]


def test_documents_of_the_conversation_are_documents(chat: ChatFinch, asked: list[Any]) -> None:
    history = [HumanMessage(content=[{"type": "text-plain", "text": "Novak.", "mime_type": "text/plain"}, "who?"])]
    inputs = {"input": QUESTION, "chat_history": [*history, AIMessage("Novak")]}
    for prompt in (None, ChatPromptTemplate.from_messages([HISTORY, ("human", "{context} {input}")])):
        chain = create_finch_documents_chain(chat, prompt, with_citations=True)
        for documents in ([], ["Kessler."]):
            report = chain.invoke({"context": documents, **inputs})["report"]
            assert [passage.text for passage in asked[-1][1]] == [*documents, "Novak."]
            assert report["notes"] == []


def test_system_messages_in_the_history_are_read(chat: ChatFinch, documents: list[Document], asked: list[Any]) -> None:
    history = [SystemMessage("Be brief.")]
    create_finch_documents_chain(chat).invoke({"context": documents, "input": QUESTION, "chat_history": history})
    assert [turn["role"] for turn in asked[0][0]] == ["system", "user"]
