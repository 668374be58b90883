from __future__ import annotations

import time
from collections.abc import Iterable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finch_rag.prompts.known_prompts import IN_ONE_MESSAGE, IN_SYSTEM_MESSAGE
from finch_rag.prompts.template import Template, first_match

# The frameworks' own words: llama-index-core 0.14, langchain-classic 1.0, LangChain's hub and tutorials.
CITATION_RULES = (
    "Please provide an answer based solely on the provided sources. When referencing information from a source, "
    "cite the appropriate source(s) using their corresponding numbers. "
    "Every answer should include at least one source citation. "
    "Only cite a source when you are explicitly referencing it. "
    "If none of the sources are helpful, you should indicate that. For example:\n"
    "Source 1:\nThe sky is red in the evening and blue in the morning.\n"
    "Source 2:\nWater is wet when the sky is red.\nQuery: When is water wet?\n"
    "Answer: Water will be wet when the sky is red [2], which occurs in the evening [1].\n"
    "Now it's your turn. "
)
FRIENDLY = (
    "\n  The following is a friendly conversation between a user and an AI assistant.\n"
    "  The assistant is talkative and provides lots of specific details from its context.\n"
    "  If the assistant does not know the answer to a question, it truthfully says it\n  does not know.\n\n"
    "  Here are the relevant documents for the context:\n\n  "
)
ONE_MESSAGE = {
    "llama-index/text-qa": (
        "Context information is below.\n---------------------\n{context}\n---------------------\n"
        "Given the context information and not prior knowledge, answer the query.\nQuery: {question}\nAnswer: "
    ),
    "llama-index/tree-summarize": (
        "Context information from multiple sources is below.\n---------------------\n{context}\n"
        "---------------------\nGiven the information from multiple sources and not prior knowledge, "
        "answer the query.\nQuery: {question}\nAnswer: "
    ),
    "llama-index/refine": (
        "The original query is as follows: {question}\nWe have provided an existing answer: {answer}\n"
        "We have the opportunity to refine the existing answer (only if needed) with some more context below.\n"
        "------------\n{context}\n------------\n"
        "Given the new context, refine the original answer to better answer the query. "
        "If the context isn't useful, return the original answer.\nRefined Answer: "
    ),
    "llama-index/refine-chat": (
        "You are an expert Q&A system that strictly operates in two modes when refining existing answers:\n"
        "1. **Rewrite** an original answer using the new context.\n"
        "2. **Repeat** the original answer if the new context isn't useful.\n"
        "Never reference the original answer or context directly in your answer.\n"
        "When in doubt, just repeat the original answer.\n"
        "New Context: {context}\nQuery: {question}\nOriginal Answer: {answer}\nNew Answer: "
    ),
    "llama-index/citation": (
        CITATION_RULES + "Below are several numbered sources of information:\n------\n{context}\n------\n"
        "Query: {question}\nAnswer: "
    ),
    "llama-index/citation-refine": (
        CITATION_RULES + "We have provided an existing answer: {answer}"
        "Below are several numbered sources of information. Use them to refine the existing answer. "
        "If the provided sources are not helpful, you will repeat the existing answer.\nBegin refining!\n------\n"
        "{context}\n------\nQuery: {question}\nAnswer: "
    ),
    "langchain/stuff": (
        "Use the following pieces of context to answer the question at the end. If you don't know the answer, just "
        "say that you don't know, don't try to make up an answer.\n\n{context}\n\n"
        "Question: {question}\nHelpful Answer:"
    ),
    "langchain/rag-prompt": (
        "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer "
        "the question. If you don't know the answer, just say that you don't know. Use three sentences maximum and "
        "keep the answer concise.\nQuestion: {question} \nContext: {context} \nAnswer:"
    ),
    "langchain/refine-start": (
        "Context information is below. \n------------\n{context}\n------------\n"
        "Given the context information and not prior knowledge, answer the question: {question}\n"
    ),
    "langchain/refine": (
        "The original question is as follows: {question}\nWe have provided an existing answer: {answer}\n"
        "We have the opportunity to refine the existing answer (only if needed) with some more context below.\n"
        "------------\n{context}\n------------\nGiven the new context, refine the original answer to better answer the "
        "question. If the context isn't useful, return the original answer."
    ),
    "langgraph/agentic-rag": (
        "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer "
        "the question. If you don't know the answer, just say that you don't know. Use three sentences maximum and "
        "keep the answer concise.\nQuestion: {question} \nContext: {context}"
    ),
}
SYSTEM_MESSAGE = {
    "llama-index/context-chat": (
        "Use the context information below to assist the user.\n--------------------\n{context}\n"
        "--------------------\n{rest}"
    ),
    "llama-index/context-chat-refine": (
        "Using the context below, refine the following existing answer using the provided context to assist the "
        "user.\nIf the context isn't helpful, just repeat the existing answer and nothing more.\n\n"
        "--------------------\n{context}\n--------------------\nExisting Answer:\n{answer}\n--------------------\n"
        "{rest}"
    ),
    "llama-index/condense-plus-context": (
        FRIENDLY + "{context}\n\n"
        "  Instruction: Based on the above documents, provide a detailed answer for the user question below.\n"
        '  Answer "don\'t know" if not present in the document.\n  {rest}'
    ),
    "llama-index/condense-plus-context-refine": (
        FRIENDLY + "{context}\n\n  Existing Answer:\n  {answer}\n\n"
        "  Instruction: Refine the existing answer using the provided context to assist the user.\n"
        "  If the context isn't helpful, just repeat the existing answer and nothing more.\n  {rest}"
    ),
    "langchain/stuff-chat": (
        "Use the following pieces of context to answer the user's question.\n"
        "If you don't know the answer, just say that you don't know, don't try to make up an answer.\n"
        "----------------\n{context}"
    ),
    "langchain/refine-start-chat": (
        "Context information is below.\n------------\n{context}\n------------\n"
        "Given the context information and not prior knowledge, answer any questions\n{rest}"
    ),
    "langchain/retrieval-qa-chat": (
        "Answer any use questions based solely on the context below:\n\n<context>\n{context}\n</context>\n{rest}"
    ),
    "langchain/rag-chat": (
        "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer "
        "the question. If you don't know the answer, say that you don't know. Use three sentences maximum and keep "
        "the answer concise.\n\n{context}"
    ),
}
PROMPTS = {**ONE_MESSAGE, **SYSTEM_MESSAGE}
TEMPLATES = {template.name: template for template in (*IN_ONE_MESSAGE, *IN_SYSTEM_MESSAGE)}
NAMES = list(PROMPTS)
ENDS_IN_CONTEXT = "langchain/rag-chat"  # and nothing but white space stands before it
VALUES = {"question": "who built it?", "answer": "Clara Novak.", "rest": "Be brief."}


def filled(name: str, context: str, question: str = VALUES["question"]) -> str:
    """A framework's prompt."""
    return PROMPTS[name].format(context=context, **{**VALUES, "question": question})


def around(name: str) -> tuple[str, str]:
    """A prompt's text before and after the context."""
    head, tail = filled(name, "\0").split("\0")
    return head, tail


def siblings(name: str) -> Iterable[Template]:
    """The templates that are looked for where this one is."""
    return IN_ONE_MESSAGE if name in ONE_MESSAGE else IN_SYSTEM_MESSAGE


def test_every_template_is_tested() -> None:
    assert set(TEMPLATES) == set(PROMPTS)
    assert len(TEMPLATES) == len(IN_ONE_MESSAGE) + len(IN_SYSTEM_MESSAGE)


@pytest.mark.parametrize("name", NAMES)
def test_a_known_prompt_is_taken_apart(name: str) -> None:
    match = first_match(siblings(name), filled(name, "The bridge was built in 1874.\n\nIt is of iron."))
    assert match is not None
    assert match.template.name == name
    expected = {field: value for field, value in VALUES.items() if f"{{{field}}}" in PROMPTS[name]}
    if name == "llama-index/citation-refine":
        del expected["answer"]  # stays in the template's own words, which become the instructions
    assert {field: value for field, value in match.fields if field != "words"} == expected
    assert match.context == "The bridge was built in 1874.\n\nIt is of iron."
    assert (match.before.strip(), match.own_words) == (around(name)[0].strip(), match.own_words if keeps(name) else "")


def keeps(name: str) -> bool:
    return TEMPLATES[name].keeps_words


@pytest.mark.parametrize("name", NAMES)
def test_a_template_counts_only_where_it_frames_the_message(name: str) -> None:
    assert TEMPLATES[name].match("You are a pirate.\n\n" + filled(name, "The bridge.")) is None
    assert TEMPLATES[name].match("  \n" + filled(name, "The bridge.") + " \n") is not None


OWN = "Reply exactly NO_ANSWER. Answer in French."


@pytest.mark.parametrize("name", [name for name in NAMES if "{words}" in TEMPLATES[name].pattern and not keeps(name)])
def test_the_users_words_in_a_template_are_told_from_the_frameworks(name: str) -> None:
    first = " ".join(TEMPLATES[name].pattern.split("{words}")[0].split()[-4:])
    for glue in (" ", "\n"):
        text = filled(name, "The bridge.\n\nThe coast.").replace(first, f"{first}{glue}{OWN}", 1)
        match = first_match(siblings(name), text)
        assert match is not None
        assert (match.own_words, match.context) == (OWN, "The bridge.\n\nThe coast."), text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("old", "new"), [("\n", "\r\n"), ("\n", "\n   "), (" ", "  "), ("\n", "\n\n"), ("\n\n", "\n")])
def test_white_space_between_a_templates_words_does_not_matter(name: str, old: str, new: str) -> None:
    if TEMPLATES[name].open_start and (old, new) == ("\n\n", "\n"):
        pytest.skip("only the blank line parts its words from the context")
    match = TEMPLATES[name].match(filled(name, "\0", "\1").replace(old, new).replace("\0", "a").replace("\1", "q?"))
    assert match is not None
    assert match.context == "a"
    assert (match.field("question") or "q?") == "q?"


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_without_context_has_an_empty_one(name: str) -> None:
    match = TEMPLATES[name].match(filled(name, ""))
    if name == ENDS_IN_CONTEXT:
        assert match is None
    else:
        assert match is not None
        assert match.context == ""


@pytest.mark.parametrize("name", NAMES)
def test_another_prompt_does_not_match(name: str) -> None:
    head, tail = around(name)
    others = ["", "The bridge.", "The bridge." + tail, head.strip()[1:] + tail, head[:20] + tail]
    if not TEMPLATES[name].pattern.endswith("}"):  # else more words may follow
        others += [head + "The bridge.", f"{head}The bridge.{tail} And in German, please."]
    for text in others:
        if text.strip() or not head.strip():
            assert TEMPLATES[name].match(text) is None, text


def hard(name: str) -> dict[str, str]:
    """Contexts that look like parts of a prompt."""
    head, tail = around(name)
    return {
        "its head": head,
        "its tail": f"a{tail}",
        "itself": filled(name, "inner"),
        "itself twice": filled(name, "inner") * 2,
        "tail and head": tail + head,
        "dashes": "-" * 50,
        "lines of dashes": "\n".join(f"{'-' * count}\na" for count in (4, 6, 12, 16, 20, 21, 22)),
        "labels": "a\nuser: b\nassistant: c\nsystem: d\nhuman: e\nai: f",
        "a question": "Query: x\nAnswer:",
        "another question": "Question: x\nHelpful Answer:",
        "a tag": "<context>a</context>",
        "fields": "{context} {question} {0} %s \\1 \\g<0>",
        "white space": "a\r\n\r\n\u2028\u00a0\tb",
        "refinements": "New Context: a\nQuery: b\nOriginal Answer: c\nNew Answer:",
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_context_may_look_like_the_template(name: str) -> None:
    for kind, context in hard(name).items():
        match = TEMPLATES[name].match(filled(name, context))
        assert match is not None, kind
        assert match.context == context.strip(), kind
        assert all(match.field(field) in (None, value) for field, value in VALUES.items()), kind


@pytest.mark.parametrize("name", NAMES)
def test_a_context_may_hold_the_prompt_of_another_template(name: str) -> None:
    for inner in PROMPTS:
        if name == "langgraph/agentic-rag" and filled(inner, "inner").strip().endswith("\nAnswer:"):
            continue  # then it is LangChain's rag-prompt, with the same question
        context = filled(inner, "inner", "inner?")
        match = first_match(siblings(name), filled(name, context))
        assert match is not None
        assert (match.template.name, match.context) == (name, context.strip()), inner


LABELS = ["Query: x", "Question: x", "Answer:", "Context:", "assistant: ", "------", "</context>", "Original Answer: x"]
PIECES = sorted({*LABELS, *(piece for name in NAMES for piece in (*around(name), *hard(name).values()))})
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
CONTEXTS = st.lists(st.sampled_from(PIECES) | st.sampled_from("\n -:") | TEXT, min_size=1, max_size=6).map("".join)
QUESTIONS = st.lists(st.sampled_from(LABELS) | TEXT, min_size=1, max_size=3).map(
    lambda parts: "".join(parts).replace("\n", " ").strip()
)


@given(st.sampled_from(NAMES), CONTEXTS, QUESTIONS)
@settings(deadline=None, max_examples=200)
def test_any_context_and_any_question_of_one_line_survive(name: str, context: str, question: str) -> None:
    assume(context.strip() or name != ENDS_IN_CONTEXT)
    match = TEMPLATES[name].match(filled(name, context, question))
    assert match is not None
    assert match.context == context.strip()
    assert match.field("question") in (None, question)


@pytest.mark.parametrize("name", NAMES)
def test_taking_a_prompt_apart_takes_linear_time(name: str) -> None:
    head, tail = around(name)
    for piece in (head, tail or "-", " ", "\n "):
        context = piece * (1_000_000 // len(piece))
        started = time.process_time()
        for text in (filled(name, context), head + context, context + tail):  # the second never ends
            first_match(siblings(name), text)
        assert time.process_time() - started < 2, piece
