from __future__ import annotations

from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.outputs import GenerationChunk
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_finch import FinchLLM
from lc_support import OTHER_QUESTION, QUESTION, Listener, answer_with, ids, kept

from finch_rag import Finch
from tests.small import texts

STUFF = PromptTemplate.from_template(
    "Use the following pieces of context to answer the question at the end. If you don't know the answer, just say "
    "that you don't know, don't try to make up an answer.\n\n{context}\n\nQuestion: {question}\nHelpful Answer:"
)


def test_several_prompts_are_answered_one_by_one(llm: FinchLLM, shared: Finch) -> None:
    result = llm.generate([QUESTION, OTHER_QUESTION])
    expected = [shared.chat(prompt, max_new_tokens=8) for prompt in (QUESTION, OTHER_QUESTION)]
    assert [generations[0].text for generations in result.generations] == [answer.text for answer in expected]
    assert llm.batch([QUESTION, OTHER_QUESTION]) == [answer.text for answer in expected]
    reports = [answer.report for answer in expected]
    usage = (result.llm_output or {})["token_usage"]
    assert usage["completion_tokens"] == sum(report.new_tokens for report in reports)
    assert usage["prompt_tokens"] == sum(report.prefix_tokens + report.question_tokens for report in reports)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_generation_info_has_citations_and_report(llm: FinchLLM, documents: list[Document]) -> None:
    generation = llm.generate([QUESTION], documents=documents).generations[0][0]
    info: dict[str, Any] = generation.generation_info or {}
    report = info["report"]
    assert report["passages"] == len(documents)
    assert report["parse_mode"] == "apart"
    assert kept(info["citations"]) == report["kept_tokens"] <= 60
    assert set(ids(info["citations"])) <= {document.id for document in documents}
    first = info["citations"][0]
    place = documents[first["index"]]
    assert (first["title"], first["source"]) == (place.metadata["title"], place.metadata["source"])
    assert (first["start_index"], first["end_index"]) == (0, len(generation.text))
    assert info["finish_reason"] == "length"


def test_only_what_was_kept_whole_is_quoted(llm: FinchLLM, documents: list[Document]) -> None:
    info: dict[str, Any] = llm.generate([QUESTION], documents=documents).generations[0][0].generation_info or {}
    for citation in info["citations"]:
        whole = citation["kept_tokens"] == citation["passage_tokens"]
        assert citation.get("cited_text") == (documents[citation["index"]].page_content if whole else None)
    token: dict[str, Any] = (
        llm.generate([QUESTION], documents=documents, selection="token").generations[0][0].generation_info or {}
    )
    assert len(token["citations"]) > 3
    assert not any("cited_text" in citation for citation in token["citations"])


def test_a_known_prompt_is_taken_apart(llm: FinchLLM) -> None:
    passages = [text * 12 for text in texts(12)]  # long enough to be no headings
    result = llm.generate([STUFF.format(context="\n\n".join(passages), question=QUESTION)])
    report = (result.generations[0][0].generation_info or {})["report"]
    assert (report["parse_mode"], report["passages"]) == ("langchain/stuff", 12)
    assert report["kept_tokens"] <= 60 < report["context_tokens"]


def test_a_chat_prompt_reaches_it_with_its_roles(llm: FinchLLM, shared: Finch) -> None:
    prompt = ChatPromptTemplate.from_messages(
        [
            (
                "system",
                "Use the following pieces of context to answer the user's question.\n----------------\n{context}",
            ),
            ("human", "{question}"),
        ]
    )
    context = "\n\n".join(text * 6 for text in texts(6))
    messages = prompt.format_prompt(context=context, question=QUESTION)
    result = llm.generate_prompt([messages])
    assert (result.generations[0][0].generation_info or {})["report"]["parse_mode"] == "langchain/stuff-chat"
    assert (
        result.generations[0][0].text
        == shared.chat(messages.to_string(), budget=60, chunk_size=64, max_new_tokens=8).text
    )


def test_streaming_gives_the_same_text_in_pieces(llm: FinchLLM, documents: list[Document]) -> None:
    bound = llm.bind(documents=documents)
    pieces = list(bound.stream(QUESTION))
    assert len(pieces) > 2
    assert "".join(pieces) == bound.invoke(QUESTION)


async def test_async_calls_give_the_same(llm: FinchLLM, documents: list[Document]) -> None:
    bound = llm.bind(documents=documents)
    expected = bound.invoke(QUESTION)
    assert await bound.ainvoke(QUESTION) == expected
    assert "".join([piece async for piece in bound.astream(QUESTION)]) == expected
    assert await bound.abatch([QUESTION, QUESTION]) == [expected, expected]


def test_each_piece_is_told_with_its_chunk(llm: FinchLLM) -> None:
    listener = Listener()
    text = llm.invoke(QUESTION, config={"callbacks": [listener]})
    [tokens] = listener.tokens.values()
    assert "".join(tokens) == text
    assert len(tokens) > 1
    assert all(isinstance(chunk, GenerationChunk) for chunk in listener.chunks)
    assert listener.results[0].generations[0][0].generation_info["report"]["new_tokens"] == 8


def test_pieces_of_one_prompt_are_not_told_to_another_ones_run(llm: FinchLLM) -> None:
    listener = Listener()
    texts = llm.batch([QUESTION, OTHER_QUESTION], config={"callbacks": [listener]})
    first, second = ("".join(tokens) for tokens in listener.tokens.values())
    assert (first, second) == (texts[0], "")


def test_options_of_a_call_stand_in_for_the_models(llm: FinchLLM, documents: list[Document], shared: Finch) -> None:
    def report(**options: Any) -> dict[str, Any]:
        info = llm.generate([QUESTION], documents=documents, **options).generations[0][0].generation_info or {}
        found: dict[str, Any] = info["report"]
        return found

    assert report()["new_tokens"] == 8
    assert report(max_tokens=3)["new_tokens"] == report(max_new_tokens=3)["new_tokens"] == 3
    assert report(budget=30)["kept_tokens"] <= 30
    assert report(budget=None)["budget"] == 60  # None leaves it to the model
    assert report(selection="token")["selection"] == "token"
    assert report(chunk_size=128)["chunk_size"] == 128
    assert report(chunk_size="auto")["chunk_size"] > 128
    assert report(reread=False)["reread"] is False
    assert report(strategy="independent", reread=True)["strategy"] == "independent"
    assert report(strategy="loop", reread=True)["strategy"] == report()["strategy"] == "loop"
    one, several = (report(reread=True, budget=200, cutoff=cutoff)["kept_tokens"] for cutoff in (1, 0))
    assert 0 < one < several <= 200
    assert [report(strategy="independent", reread=True, rounds=rounds)["rounds"] for rounds in (None, 1)] == [1, 1]


def test_the_judgement_of_a_call_reaches_the_engine(
    llm: FinchLLM, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finch_rag.quotes.support.calibrated", lambda runtime, told: (0.0, 1.0, 1.0))

    def answered(**options: Any) -> tuple[str, float | None]:
        generation = llm.generate([QUESTION], documents=documents, budget=200, **options).generations[0][0]
        return generation.text, (generation.generation_info or {})["support"]

    text, without = answered()
    assert text
    assert without is None
    same, support = answered(support=True)
    assert same == text
    assert support is not None
    assert 0 < support < 1
    assert answered(min_support=1)[0] == ""


@pytest.mark.parametrize("options", [{"prior": "scores"}, {"rounds": 3}, {"min_support": 2}])
def test_what_no_engine_takes_is_an_error(llm: FinchLLM, options: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=next(iter(options))):
        llm.generate([QUESTION], **options)


def test_sampling_follows_the_seed(llm: FinchLLM) -> None:
    def sample(seed: int) -> str:
        return llm.invoke(QUESTION, temperature=1.5, seed=seed, max_tokens=16)

    assert sample(1) == sample(1) != sample(2)
    assert FinchLLM(**{**llm.model_dump(), "temperature": 1.5, "seed": 1, "max_tokens": 16}).invoke(QUESTION) == sample(
        1
    )


def test_stop_texts_end_the_answer(llm: FinchLLM, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "one two three")
    whole = llm.bind(max_tokens=20)
    assert whole.invoke(QUESTION) == "one two three"
    assert whole.invoke(QUESTION, stop=["two"]) == "one"
    assert whole.bind(stop=["three"]).invoke(QUESTION) == "one two"
    stopping = FinchLLM(model=folder, max_new_tokens=20, stop=["two"])
    assert stopping.invoke(QUESTION) == "one"
    assert stopping.invoke(QUESTION, stop=["three"]) == "one two"  # the call's stand in for the model's
    assert list(stopping.stream(QUESTION, stop=[]))[-1] == ""
    assert "".join(stopping.stream(QUESTION, stop=[])) == "one two three"
    result = stopping.generate([QUESTION])
    assert (result.generations[0][0].generation_info or {})["finish_reason"] == "stop"


def test_tokens_are_the_models_own(llm: FinchLLM, shared: Finch) -> None:
    text = "The harbour of Elmsworth was built in 1874. <|im_end|>"
    assert llm.get_token_ids(text) == shared.prompts.encode([text])[0]
    assert llm.get_num_tokens(text) == shared.count_tokens(text)
    assert llm.model_copy(update={"custom_get_token_ids": lambda text: [1, 2]}).get_num_tokens(text) == 2


def test_traces_know_the_model_and_its_settings(llm: FinchLLM, folder: str) -> None:
    assert llm._llm_type == "finch"
    assert llm._get_ls_params() == {
        "ls_provider": "finch",
        "ls_model_type": "llm",
        "ls_model_name": folder,
        "ls_max_tokens": 8,
    }
    of_call = llm._get_ls_params(stop=["x"], max_new_tokens=3, temperature=0.5)
    assert (of_call["ls_stop"], of_call["ls_max_tokens"], of_call["ls_temperature"]) == (["x"], 3, 0.5)
