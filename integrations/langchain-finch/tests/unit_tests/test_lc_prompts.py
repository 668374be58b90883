"""The documents chain takes any prompt: the question stays the question, the documents stay apart, no word is lost."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import BasePromptTemplate, ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.runnables import ConfigurableField
from langchain_finch import ChatFinch, create_finch_documents_chain
from langchain_finch._convert import passages_of
from lc_support import OTHER_QUESTION, QUESTION, STUFF_CHAT

from finch_rag import Finch

chat_prompt, text_prompt = ChatPromptTemplate.from_messages, PromptTemplate.from_template
HISTORY = [HumanMessage("where?"), AIMessage("there")]
TOLD = [("user", "where?"), ("assistant", "there")]
ASKED = [("user", QUESTION)]
LOOP = "{% for d in context %}{{ d.page_content }}\n{% endfor %}"
STUFF = (
    "Use the following pieces of context to answer the question at the end. If you don't know the answer, just say "
    "that you don't know, don't try to make up an answer.{own}\n\n{context}\n\nQuestion: {question}\nHelpful Answer:"
)
FINCHS_OWN = "Answer the question in a few words, using the passages below."


def jinja(text: str) -> PromptTemplate:
    return text_prompt(text, template_format="jinja2")


def mustache(text: str) -> PromptTemplate:
    return text_prompt(text, template_format="mustache")


def turns_of(messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"].strip()) for turn in messages]


@pytest.mark.parametrize(
    ("prompt", "system", "instructions"),
    [
        (text_prompt("Question: {input}\n\nContext:\n{context}\n\nAnswer:"), [], None),
        (text_prompt("Frage: {input}\n\nKontext:\n{context}\n\nAntwort:"), [], None),
        (
            text_prompt("Nutze nur den Kontext.\nFrage: {input}\n\nKontext:\n{context}\n\nFasse dich kurz.\nAntwort:"),
            [],
            "Nutze nur den Kontext.\n\nFasse dich kurz.",
        ),
        (
            text_prompt("Be brief.\n<context>\n{context}\n</context>\n<question>\n{input}\n</question>"),
            [],
            "Be brief.",
        ),
        (text_prompt("<documents>{context}</documents>\n\nBe brief.\n\n{question}"), [], "Be brief."),
        (text_prompt("Read:\n{context}\n\nAgain:\n{context}\n\nBe brief.\nQuestion: {input}"), [], "Be brief."),
        (chat_prompt([("system", "Be brief.\n{context}\n{context}"), ("human", "{input}")]), ["Be brief."], None),
        (jinja("Be brief.\n" + LOOP + "Question: {{ input }}"), [], "Be brief."),
        (jinja("Be brief.\n" + LOOP.replace("\n", "{{ d.metadata.source }}\n") + "{{ input }}"), [], "Be brief."),
        (jinja("Be brief.\n{{ context | map(attribute='page_content') | join(' ') }}\n{{ input }}"), [], "Be brief."),
        (jinja("{% if context %}Be brief.{% endif %}\n{{ context }}\nQuestion: {{ input }}"), [], "Be brief."),
        (
            chat_prompt([("system", "Be brief.\n" + LOOP), ("human", "{{ input }}")], template_format="jinja2"),
            ["Be brief."],
            None,
        ),
        (mustache("Be brief.\n{{context}}\nQuestion: {{input}}"), [], "Be brief."),
        (mustache("Be brief.\n{{#context}}{{page_content}}\n{{/context}}Question: {{input}}"), [], "Be brief."),
        (text_prompt(STUFF.replace("{own}", "")), [], None),
        (text_prompt(STUFF.replace("{own}", " Answer in German.")), [], f"{FINCHS_OWN}\n\nAnswer in German."),
        (
            text_prompt("Speak like a sailor.\n" + STUFF.replace("{own}", "")),
            [],
            f"Speak like a sailor.\n{STUFF.partition('{own}')[0]}",
        ),
        (
            chat_prompt([("system", STUFF_CHAT + "\n\nSpeak like a sailor."), ("human", "{input}")]),
            ["Use the following pieces of context to answer the user's question.\n\nSpeak like a sailor."],
            None,
        ),
        (chat_prompt([("system", "Be brief.\nQuestion: {input}\n\nContext:\n{context}")]), [], "Be brief."),
        (chat_prompt([("system", "Be brief. Name colours:\n\n{context}")]), [], "Be brief. Name colours:"),
        (chat_prompt([("system", "Be brief."), ("human", "{input}")]), ["Be brief."], None),
        (chat_prompt([("system", "Be brief.")]), ["Be brief."], None),
        (chat_prompt([("human", "Be brief:\n{context}"), ("human", "{input}")]), [], "Be brief:"),
    ],
    ids=[
        "question first",
        "in German",
        "in German, with words",
        "tags",
        "tag in line",
        "repeated",
        "repeated in system",
        "jinja loop",
        "jinja loop with metadata",
        "jinja filter",
        "jinja condition",
        "jinja chat",
        "mustache",
        "mustache section",
        "stuff",
        "stuff and own words",
        "own words and stuff",
        "stuff chat and own words",
        "one system message",
        "one system message without question",
        "no context",
        "neither",
        "two human messages",
    ],
)
def test_the_question_is_the_question_and_other_words_are_kept(
    chat: ChatFinch,
    documents: list[Document],
    asked: list[Any],
    prompt: BasePromptTemplate[Any],
    system: list[str],
    instructions: str | None,
) -> None:
    for name in ("input", "question"):
        create_finch_documents_chain(chat, prompt).invoke({"context": documents, name: QUESTION})
        messages, passages, given = asked[-1]
        assert turns_of(messages) == [*(("system", text) for text in system), *ASKED]
        assert passages == passages_of(documents)
        assert given.get("instructions") == instructions


def test_a_template_that_shows_no_documents_is_read_as_it_is(
    chat: ChatFinch, documents: list[Document], asked: list[Any]
) -> None:
    prompt = jinja("{% if context %}Use the documents.{% endif %} {{ input }}")
    create_finch_documents_chain(chat, prompt).invoke({"context": documents, "input": QUESTION})
    assert turns_of(asked[0][0]) == [("user", f"Use the documents. {QUESTION}")]
    create_finch_documents_chain(chat, prompt).invoke({"context": [], "input": QUESTION})
    assert turns_of(asked[1][0]) == ASKED


WITH_TURNS = [
    ("{chat_history}", "chat_history"),
    ("{chat_history}", "history"),
    ("{history}", "messages"),
    ("{messages}", "messages"),
    ("{turns}", "chat_history"),
    ("{turns}", "turns"),
]


@pytest.mark.parametrize(("place", "name"), WITH_TURNS)
def test_the_history_gets_into_a_prompts_place_for_it(
    chat: ChatFinch, documents: list[Document], asked: list[Any], place: str, name: str
) -> None:
    prompt = chat_prompt([("system", "Be brief.\n{context}"), ("placeholder", place), ("human", "{input}")])
    required = chat_prompt(
        [("system", "Be brief.\n{context}"), MessagesPlaceholder(place.strip("{}")), ("human", "{input}")]
    )
    for one in (required, prompt) if place != "{turns}" or name == "turns" else (required,):
        create_finch_documents_chain(chat, one).invoke({"context": documents, "input": QUESTION, name: HISTORY})
        assert turns_of(asked[-1][0]) == [("system", "Be brief."), *TOLD, *ASKED]
        assert asked[-1][1] == passages_of(documents)
    if place != "{turns}":
        create_finch_documents_chain(chat, required).invoke({"context": documents, "input": QUESTION})
        assert turns_of(asked[-1][0]) == [("system", "Be brief."), *ASKED]


@pytest.mark.parametrize("name", ["chat_history", "history", "messages"])
def test_without_a_prompt_the_history_is_found_by_its_usual_names(
    chat: ChatFinch, documents: list[Document], asked: list[Any], name: str
) -> None:
    chain = create_finch_documents_chain(chat)
    chain.invoke({"context": documents, "input": QUESTION, name: HISTORY})
    chain.invoke({"context": documents, name: [*HISTORY, ("human", QUESTION)]})  # its last message asks
    for messages, passages, _ in asked:
        assert turns_of(messages) == [*TOLD, *ASKED]
        assert passages == passages_of(documents)


def test_a_history_in_a_text_is_text(chat: ChatFinch, documents: list[Document], asked: list[Any]) -> None:
    chain = create_finch_documents_chain(chat, text_prompt("Be brief.\n{chat_history}\n{context}\nQuestion: {input}"))
    inputs = {"context": documents, "input": QUESTION}
    for history in (HISTORY, "Human: where?\nAI: there"):
        chain.invoke({**inputs, "chat_history": history})
    chain.invoke(inputs)
    told = "Be brief.\nHuman: where?\nAI: there"
    assert [given["instructions"] for *_, given in asked] == [told, told, "Be brief."]


def test_a_second_question_of_the_input_is_no_question(
    chat: ChatFinch, documents: list[Document], asked: list[Any]
) -> None:
    prompt = text_prompt("{context}\n\nAsked before: {question}\n\nQuestion: {input}")
    create_finch_documents_chain(chat, prompt).invoke(
        {"context": documents, "input": QUESTION, "question": OTHER_QUESTION}
    )
    messages, _, given = asked[0]
    assert turns_of(messages) == ASKED
    assert given["instructions"] == f"Asked before: {OTHER_QUESTION}"


def test_a_prompts_words_stand_behind_the_models_instructions(
    chat: ChatFinch, shared: Finch, documents: list[Document], asked: list[Any]
) -> None:
    own = Finch(shared.model, shared.tokenizer, heads="all", instructions="Speak German.")
    engine, model = ChatFinch(engine=own), ChatFinch(engine=shared, instructions="Speak German.")
    bound = chat.bind(instructions="Speak German.")
    prompt = text_prompt("Be brief.\n{context}\nQuestion: {input}")
    for llm in (engine, model, bound, bound.with_retry(), bound.with_fallbacks([chat])):
        create_finch_documents_chain(llm, prompt).invoke({"context": documents, "input": QUESTION})
        assert asked[-1][2]["instructions"] == "Speak German.\n\nBe brief."
    chosen = chat.configurable_fields(instructions=ConfigurableField(id="words"))
    chain = create_finch_documents_chain(chosen, prompt)
    for words in ("Speak German.", "Speak French."):
        chain.with_config(configurable={"words": words}).invoke({"context": documents, "input": QUESTION})
        assert asked[-1][2]["instructions"] == f"{words}\n\nBe brief."
    known = create_finch_documents_chain(chosen, text_prompt(STUFF.replace("{own}", " Be brief.")))
    known.with_config(configurable={"words": "Speak German."}).invoke({"context": documents, "question": QUESTION})
    assert asked[-1][2]["instructions"] == "Speak German.\n\nBe brief."


@pytest.mark.parametrize(
    ("loop", "shown"),
    [
        ("{{ d.metadata.source }}: {{ d.page_content }}\n", "{source}: {text}"),
        ("[{{ loop.index }}] {{ d.page_content }} ({{ d.metadata['page'] }})\n\n", "[{number}] {text} ({page})"),
        (
            "<doc id='{{ d.id }}'>{{ d.page_content }}</doc>{% if not loop.last %}\n---\n{% endif %}",
            "{tag}{text}</doc>",
        ),
        ("Text: {{ d.page_content }}\nFrom {{ d.metadata.source }}\n", "Text: {text}\nFrom {source}"),
    ],
    ids=["before", "numbers", "tags and a line between", "behind"],
)
def test_what_a_loop_shows_of_each_document_is_read_with_it(
    chat: ChatFinch, asked: list[Any], loop: str, shown: str
) -> None:
    found = [
        Document(text, id=f"d{n}", metadata={"source": f"s{n}.md", "page": n, "title": f"T{n}"})
        for n, text in enumerate(("The bridge.", "The museum.", " ", "FinchContextGoesHere {{ input }}"))
    ]
    loops = "{% for d in context %}" + loop + "{% endfor %}"
    for prompt in (
        jinja("Be brief.\n\n" + loops + "\nQuestion: {{ input }}"),
        chat_prompt([("system", "Be brief.\n\n" + loops), ("human", "{{ input }}")], template_format="jinja2"),
    ):
        create_finch_documents_chain(chat, prompt).invoke({"context": found, "input": QUESTION})
        messages, passages, given = asked[-1]
        assert turns_of(messages)[-1] == ("user", QUESTION)
        assert "Be brief." in (given.get("instructions"), turns_of(messages)[0][1])
        for n, (passage, document) in enumerate(zip(passages, found, strict=True)):
            if not document.page_content.strip():
                assert passage.text == ""
                continue
            fields = {"source": f"s{n}.md", "page": n, "number": n + 1, "text": document.page_content}
            expected = shown.format(tag=f"<doc id='d{n}'>", **fields)
            assert expected in passage.text
            assert (passage.id, passage.title) == (f"d{n}", None)


def test_a_document_without_text_gets_none_from_a_document_prompt(chat: ChatFinch, asked: list[Any]) -> None:
    prompt = text_prompt("Text: {page_content}")
    chain = create_finch_documents_chain(chat, document_prompt=prompt, with_citations=True)
    answer = chain.invoke({"context": [Document(" ", id="a"), Document("one", id="b")], "input": QUESTION})
    assert [passage.text for passage in asked[0][1]] == [" ", "Text: one"]
    assert answer["report"]["notes"] == ["1 of 2 passages had no text: skipped"]
    assert [(citation["index"], citation["passage_id"]) for citation in answer["citations"]] == [(1, "b")]
