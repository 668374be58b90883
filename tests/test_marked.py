from __future__ import annotations

import pytest

from finch_rag.prompts.chat_template import Message
from finch_rag.prompts.marked import CONTEXT_MARK as C
from finch_rag.prompts.marked import QUESTION_MARK as Q
from finch_rag.prompts.marked import parse_marked

from .test_known_prompts import ONE_MESSAGE, SYSTEM_MESSAGE, TEMPLATES, filled

QUESTION = "Who signed the lease?"


def user(text: str) -> Message:
    return Message(role="user", content=text)


def system(text: str) -> Message:
    return Message(role="system", content=text)


@pytest.mark.parametrize(
    ("messages", "instructions", "system_prompt"),
    [
        ([user(f"Answer briefly.\n\n{C}\n\nQuestion: {Q}\nAnswer:")], "Answer briefly.", None),
        ([user(f"Frage: {Q}\n\nKontext:\n{C}\n\nAntwort:")], None, None),
        ([user(f"{Q}\n\n<context>\n{C}\n</context>\n\nReply in French.")], "Reply in French.", None),
        ([user(f"Read {C} and once more {C}. Then say: {Q}")], "Read\n\nand once more\n\n. Then say:", None),
        ([system(f"Be kind.\n\n{C}\n\nBe brief."), user(Q)], None, "Be kind.\n\nBe brief."),
        ([user(f"Name colours:\n\n{C}")], "Name colours:", None),
        ([user(f"Be precise.\nAnswer in French:\n{C}\n\n{Q}")], "Be precise.\nAnswer in French:", None),
        ([user(f"Rules:\n- be brief\n\nContext:\n{C}\nQuestion: {Q}\nHelpful Answer:")], "Rules:\n- be brief", None),
    ],
    ids=["plain", "german, question first", "tags", "repeated", "system", "no question", "label", "list"],
)
def test_the_question_is_the_question_and_the_users_words_are_kept(
    messages: list[Message], instructions: str | None, system_prompt: str | None
) -> None:
    parsed = parse_marked(messages, QUESTION)
    assert parsed is not None
    assert (parsed.question, parsed.passages) == (QUESTION, [])
    assert (parsed.instructions, parsed.system_prompt) == (instructions, system_prompt)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not TEMPLATES[name].keeps_words])
def test_the_wording_of_a_known_prompt_gives_way(name: str) -> None:
    text = filled(name, C, Q)
    messages = [user(text)] if name in ONE_MESSAGE else [system(text), user(Q)]
    parsed = parse_marked(messages, QUESTION)
    assert parsed is not None
    assert parsed.question == QUESTION
    assert parsed.system_prompt == ("Be brief." if "{rest}" in SYSTEM_MESSAGE.get(name, "") else None)
    assert (parsed.instructions is None) == ("Clara Novak" not in text)


def test_a_prompt_without_question_asks_in_its_own_words() -> None:
    parsed = parse_marked([user(f'Write a summary of this:\n\n"{C}"\n\nSUMMARY:')], None)
    assert parsed is not None
    assert "Write a summary of this:" in f"{parsed.instructions}{parsed.question}"
    assert parsed.in_own_words
    assert parse_marked([user("Hello.")], QUESTION) is None


def test_a_label_alone_asks_nothing() -> None:
    parsed = parse_marked([user(f"Frage: wer?\n\nKontext:\n{C}\n\nAntwort:")], None)
    assert parsed is not None
    assert parsed.question == "Frage: wer?\n\nKontext:\n\nAntwort:"


def test_an_answer_keeps_a_turn_of_the_user_before_it() -> None:
    turns = [user(f"Documents:\n{C}"), Message(role="assistant", content="I see."), user(Q)]
    parsed = parse_marked(turns, QUESTION)
    assert parsed is not None
    assert parsed.history == [user("Documents:"), Message(role="assistant", content="I see.")]
