"""LlamaIndex's components beside query engines: all that they ask reaches the model, and their result comes back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from li_fixtures import Says
from li_support import QUESTION, finch_llm, listening, nodes, reports, shown, whole_text
from llama_index.core import TreeIndex
from llama_index.core.evaluation import BaseEvaluator, EvaluationResult, FaithfulnessEvaluator, RelevancyEvaluator
from llama_index.core.extractors import (
    KeywordExtractor,
    PydanticProgramExtractor,
    QuestionsAnsweredExtractor,
    SummaryExtractor,
    TitleExtractor,
)
from llama_index.core.extractors import metadata_extractors as templates
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.postprocessor import LLMRerank
from llama_index.core.program import LLMTextCompletionProgram
from llama_index.core.schema import BaseNode, Document, NodeWithScore, TextNode
from llama_index.core.utils import get_tokenizer
from pydantic import BaseModel

from finch_rag import Finch
from finch_rag.prompts.builder import Prompt
from finch_rag.prompts.parsing import ParsedPrompt
from tests.small import chat_tokenizer, small_model, texts

CHAT_OR_NOT = pytest.mark.parametrize("is_chat_model", [True, False])
STATEMENT = "Clara Novak built the bridge in 1874."
WINDOW = 8192  # of the engine that the tests share
TOO_LONG = texts(200, longest=40)  # more than that


@cache
def narrow_engine() -> Finch:
    """An engine whose window has no room for a chunk."""
    model = small_model(max_position_embeddings=1024)
    return Finch(model, chat_tokenizer(), name="narrow", budget=60, chunk_size=512, heads=[(0, 1), (1, 2)])


def chunks() -> list[BaseNode]:
    """Two chunks of LlamaIndex's default size, of one document."""
    found = SentenceSplitter().get_nodes_from_documents([Document(text=" ".join(texts(100)))])[:2]
    assert all(900 < len(get_tokenizer()(node.get_content())) <= 1024 for node in found)
    return found


def long_nodes() -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text, id_=f"long-{n}"), score=0.1) for n, text in enumerate(TOO_LONG)]


def squeezed(text: str) -> str:
    return " ".join(text.split())


def check_whole(
    requests: Sequence[ParsedPrompt], read: Sequence[Prompt], events: Sequence[Any], asked: Sequence[str]
) -> None:
    """Each prompt was read as it was asked, in whatever order, and nothing of it could be evicted."""
    assert sorted(request.question.strip() for request in requests) == sorted(text.strip() for text in asked)
    assert [(request.parse_mode, request.passages) for request in requests] == [("whole", [])] * len(asked)
    for request, prompt in zip(requests, read, strict=True):
        assert request.question.strip() in whole_text(prompt)
    assert [(report["context_tokens"], report["notes"]) for report in reports(events)] == [(0, [])] * len(asked)


def in_order(answers: Sequence[str], found: Sequence[BaseNode], requests: Sequence[ParsedPrompt]) -> list[str]:
    """Answers by node: jobs that run at once ask in any order."""
    return [
        next(
            answer for answer, request in zip(answers, requests, strict=False) if node.get_content() in request.question
        )
        for node in found
    ]


# Extractors


class Found(BaseModel):
    """What a chunk says."""

    lit: bool


def of_class(llm: Any) -> PydanticProgramExtractor[Found]:
    program = LLMTextCompletionProgram.from_defaults(output_cls=Found, prompt_template_str="{input}", llm=llm)
    return PydanticProgramExtractor(program=program, num_workers=1)


@CHAT_OR_NOT
@pytest.mark.parametrize(
    ("kind", "template", "key"),
    [
        (TitleExtractor, templates.DEFAULT_TITLE_NODE_TEMPLATE, "document_title"),
        (KeywordExtractor, templates.DEFAULT_KEYWORD_EXTRACT_TEMPLATE, "excerpt_keywords"),
        (SummaryExtractor, templates.DEFAULT_SUMMARY_EXTRACT_TEMPLATE, "section_summary"),
        (QuestionsAnsweredExtractor, templates.DEFAULT_QUESTION_GEN_TMPL, "questions_this_excerpt_can_answer"),
    ],
)
def test_an_extractor_asks_of_whole_chunks(
    kind: Any,
    template: str,
    key: str,
    is_chat_model: bool,
    says: Says,
    requests: list[ParsedPrompt],
    read: list[Prompt],
) -> None:
    says("one", "two", "both")
    found = chunks()
    with listening() as events:
        extracted = kind(llm=finch_llm(is_chat_model=is_chat_model), num_workers=1).extract(found)
    fields = {"keywords": 5, "num_questions": 5}
    asked = [template.format(context_str=node.get_content(), **fields) for node in found]
    if kind is TitleExtractor:
        asked.append(templates.DEFAULT_TITLE_COMBINE_TEMPLATE.format(context_str="one, two"))
    check_whole(requests, read, events, asked)
    answers = ["both", "both"] if kind is TitleExtractor else in_order(["one", "two"], found, requests)
    assert [metadata[key] for metadata in extracted] == answers


@CHAT_OR_NOT
def test_the_program_extractor_hands_back_the_fields_of_its_class(
    is_chat_model: bool, says: Says, requests: list[ParsedPrompt], read: list[Prompt]
) -> None:
    says('{"lit": true}', '{"lit": false}')
    found = chunks()
    with listening() as events:
        extracted = of_class(finch_llm(is_chat_model=is_chat_model, max_new_tokens=32)).extract(found)
    expected = in_order(["True", "False"], found, requests)
    assert [str(fields["lit"]) for fields in extracted] == expected
    template, parser = templates.DEFAULT_EXTRACT_TEMPLATE_STR, PydanticOutputParser(Found)
    asked = [parser.format(template.format(context_str=node.get_content(), class_name="Found")) for node in found]
    check_whole(requests, read, events, asked)


@pytest.mark.parametrize(
    ("kind", "name", "template"),
    [
        (TitleExtractor, "llama-index/title", templates.DEFAULT_TITLE_NODE_TEMPLATE),
        (SummaryExtractor, "llama-index/section-summary", templates.DEFAULT_SUMMARY_EXTRACT_TEMPLATE),
        (QuestionsAnsweredExtractor, "llama-index/questions", templates.DEFAULT_QUESTION_GEN_TMPL),
        (of_class, "llama-index/extract", templates.DEFAULT_EXTRACT_TEMPLATE_STR),
    ],
)
def test_an_extractor_keeps_its_words_where_a_chunk_does_not_fit(
    kind: Any, name: str, template: str, says: Says, requests: list[ParsedPrompt], read: list[Prompt]
) -> None:
    says('{"lit": true}')
    node = chunks()[0]
    with listening() as events, warnings.catch_warnings():
        warnings.simplefilter("error")
        (extracted,) = kind(llm=finch_llm(engine=narrow_engine(), max_new_tokens=16)).extract([node])
    assert extracted
    assert requests[0].parse_mode == reports(events)[0]["parse_mode"] == name
    words = squeezed(template.partition("{context_str}")[2].format(num_questions=5, class_name="Found")).strip(" .-")
    assert words in squeezed(f"{requests[0].instructions}\n{requests[0].question}")
    assert words in squeezed(whole_text(read[0]))
    assert squeezed(node.get_content()) in squeezed("\n".join(passage.text for passage in requests[0].passages))


def test_the_keyword_extractor_keeps_its_words_where_a_text_does_not_fit(
    says: Says, requests: list[ParsedPrompt], read: list[Prompt]
) -> None:
    says("bridges, lamps")
    (extracted,) = KeywordExtractor(llm=finch_llm(max_new_tokens=32)).extract([TextNode(text=" ".join(TOO_LONG))])
    assert extracted == {"excerpt_keywords": "bridges, lamps"}
    assert requests[0].parse_mode == "llama-index/keywords-of-node"
    words = "Give 5 unique keywords for this document. Format as comma separated. Keywords:"
    assert words in requests[0].question
    assert words in str(chat_tokenizer().decode(read[0].question))


# Evaluators

FITS, OVER = texts(12), TOO_LONG


@pytest.mark.parametrize(("is_chat_model", "said"), [(True, "YES"), (False, "NO")])
@pytest.mark.parametrize(
    ("kind", "task", "asked"),
    [
        (FaithfulnessEvaluator, "llama-index/faithfulness", [f"Information: {STATEMENT}", "apple pie à la mode"]),
        (
            RelevancyEvaluator,
            "llama-index/relevancy",
            [f"Question: {QUESTION}\nResponse: {STATEMENT}", "Either YES/ NO."],
        ),
    ],
)
@pytest.mark.parametrize("contexts", [FITS, OVER])
def test_an_evaluator_asks_of_all_contexts_in_one_call(
    kind: Any,
    task: str,
    asked: list[str],
    contexts: list[str],
    said: str,
    is_chat_model: bool,
    says: Says,
    requests: list[ParsedPrompt],
    read: list[Prompt],
) -> None:
    says(said)
    evaluator: BaseEvaluator = kind(llm=finch_llm(is_chat_model=is_chat_model))
    with listening() as events, warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluator.evaluate(query=QUESTION, response=STATEMENT, contexts=contexts)
    assert isinstance(result, EvaluationResult)
    assert (result.passing, result.feedback) == (said == "YES", said)
    (request,), (report,) = requests, reports(events)
    assert request.parse_mode == report["parse_mode"] == ("whole" if contexts is FITS else task)
    assert all(words in f"{request.instructions}\n{request.question}" for words in asked)
    assert all(words in whole_text(read[0]) for words in [*asked, *contexts])
    if contexts is FITS:
        assert (report["context_tokens"], report["passages"]) == (0, 0)
    else:
        assert report["context_tokens"] > WINDOW


# Choosing


@CHAT_OR_NOT
@pytest.mark.parametrize("count", [10, 200])
def test_the_rerankers_choice_is_made_from_whole_nodes(
    count: int, is_chat_model: bool, says: Says, requests: list[ParsedPrompt], read: list[Prompt]
) -> None:
    says("Doc: 3, Relevance: 9\nDoc: 1, Relevance: 4")
    found = nodes(10) if count == 10 else [*nodes(10), *long_nodes()]
    reranker = LLMRerank(llm=finch_llm(is_chat_model=is_chat_model, max_new_tokens=64), choice_batch_size=len(found))
    with listening() as events, warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = reranker.postprocess_nodes(found, query_str=QUESTION)
    assert [(node.node.node_id, node.score) for node in chosen] == [("n2", 9.0), ("n0", 4.0)]
    (request,), (report,) = requests, reports(events)
    assert request.parse_mode == report["parse_mode"] == ("whole" if count == 10 else "llama-index/choice-select")
    words = f"{request.instructions}\n{request.question}"
    assert f"Question: {QUESTION}" in words
    assert "Respond with the numbers of the documents" in words
    assert all(text in whole_text(read[0]) for text in shown(found))
    assert (report["context_tokens"] > WINDOW) == (count == 200)


def test_a_tree_index_summarizes_chooses_and_answers(
    says: Says, requests: list[ParsedPrompt], read: list[Prompt]
) -> None:
    found = [node.node for node in nodes(12)]
    says("first half", "second half", "ANSWER: 2 fits best.", "ANSWER: 1 fits best.", "Clara Novak")
    with listening() as events:
        index = TreeIndex(found, llm=finch_llm(max_new_tokens=32), num_children=10, use_async=False)
        response = index.as_query_engine(llm=finch_llm(max_new_tokens=32)).query(QUESTION)
    assert str(response) == "Clara Novak"
    assert [node.node.get_content() for node in response.source_nodes] == [texts(12)[10]]
    assert [request.parse_mode for request in requests] == [*4 * ["whole"], "llama-index/text-qa"]
    assert [report["kept_tokens"] for report in reports(events)] == [
        report["context_tokens"] for report in reports(events)
    ]
    prompts = [whole_text(prompt) for prompt in read]
    for place, text in enumerate(shown(nodes(12))):
        assert squeezed(text) in squeezed(prompts[0] if place < 10 else prompts[1])
    assert all("Write a summary of the following." in text for text in prompts[:2])
    assert "(1) first half" in squeezed(prompts[2])
    assert "(2) second half" in squeezed(prompts[2])
    for text in prompts[2:4]:
        assert f"the choice that is most relevant to the question: '{QUESTION}'" in text
        assert "Provide choice in the following format: 'ANSWER: <number>'" in text
    assert requests[4].question == QUESTION
    assert [passage.text for passage in requests[4].passages] == [shown(nodes(12))[10]]
