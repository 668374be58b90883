"""Conversations of every shape: who asks, and what stands around the question."""

from __future__ import annotations

from typing import Any

import pytest

from finch_rag import Finch
from finch_rag.prompts.chat_template import Message
from finch_rag.prompts.parsing import parse_prompt
from finch_rag.prompts.passages import Passage

from .small import chat_tokenizer, small_model, texts
from .test_parsing import BRIDGE, Words, system, user


def said(text: str) -> Message:
    return Message(role="assistant", content=text)


@pytest.mark.parametrize("passages", [[], [Passage(BRIDGE)]], ids=["none", "passages"])
@pytest.mark.parametrize(
    ("messages", "question", "system_prompt", "history", "following"),
    [
        ([user("q"), said("a")], "q", None, [], [said("a")]),
        (
            [user("o"), said("p"), user("q"), said("a"), said("b")],
            "q",
            None,
            [user("o"), said("p")],
            [said("a"), said("b")],
        ),
        ([system("s")], "s", None, [], []),
        ([system("s"), system("t")], "s\n\nt", None, [], []),
        ([user("q"), system("s")], "q", "s", [], []),
        ([system("s"), user("q"), system("t"), said("a")], "q", "s\n\nt", [], [said("a")]),
    ],
)
def test_the_users_last_message_asks(
    messages: list[Message],
    question: str,
    system_prompt: str | None,
    history: list[Message],
    following: list[Message],
    passages: list[Passage],
) -> None:
    parsed = parse_prompt(messages, passages, Words(100))
    assert (parsed.question, parsed.system_prompt) == (question, system_prompt)
    assert (parsed.history, parsed.following) == (history, following)
    assert parsed.parse_mode == ("apart" if passages else "whole")


class CountingWhatFollows(Words):
    def holds(self, parsed: Any) -> bool:
        return self.window >= sum(self.tokens(m["content"]) for m in parsed.following) + self.tokens(parsed.question)


def test_what_follows_the_question_takes_room() -> None:
    text = "\n\n".join(f"{BRIDGE} {number}" for number in range(9))
    messages = [user(f"{text}\n\nwho built it?"), said("word " * 30)]
    room = len(messages[0]["content"].split()) + 10
    assert parse_prompt(messages[:1], [], CountingWhatFollows(room)).parse_mode == "whole"
    with pytest.warns(UserWarning, match="no known template"):
        assert parse_prompt(messages, [], CountingWhatFollows(room)).parse_mode == "kept ends"


@pytest.fixture(scope="module")
def finch() -> Finch:
    return Finch(small_model(), chat_tokenizer(), heads=[(0, 1)], max_new_tokens=4)


@pytest.mark.parametrize(
    "messages",
    [
        [system("Say hello.")],
        [user("hello"), said("Good day.")],
        [user("hello"), said("Good day."), user("")],
        [user("")],
        [system("Be kind."), user("hello"), said("Good day."), user("  ")],
    ],
)
def test_any_conversation_is_answered_as_the_model_itself_would(finch: Finch, messages: list[Message]) -> None:
    tokenizer: Any = finch.tokenizer
    shown = messages if messages[-1]["role"] != "system" else [user(messages[-1]["content"])]
    shown = [Message(role=m["role"], content=m["content"].strip()) for m in shown]
    ids = tokenizer.apply_chat_template(shown, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model: Any = finch.model
    made = model.generate(**ids, max_new_tokens=4, do_sample=False)
    expected = finch.prompts.decode(made[0, ids["input_ids"].shape[1] :].tolist())
    answer = finch.chat(messages)
    assert answer.text == expected.strip()
    assert answer.report.parse_mode == "whole"


def test_a_task_over_a_text_that_does_not_fit_reads_as_much_of_it_as_fits_in_its_order() -> None:
    finch = Finch(small_model(max_position_embeddings=2048), chat_tokenizer(), heads=[(0, 1)], max_new_tokens=4)
    text = "\n\n".join(texts(120))
    task = f'Write a concise summary of the following:\n\n\n"{text}"\n\n\nCONCISE SUMMARY:'
    answer = finch.chat(task)
    assert answer.report.context_tokens > 2048 > answer.report.kept_tokens > 1000
    assert answer.report.passages_kept > 20
    cache = finch.compress("who?", texts(120))
    assert cache.kept_tokens <= 256  # a question is answered from few passages, as before
    small = finch.chat(task, budget=100)
    assert small.report.kept_tokens <= 100
