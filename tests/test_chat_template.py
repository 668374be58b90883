from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from finch_rag.engine import Finch
from finch_rag.errors import InputError, ModelError
from finch_rag.prompts.builder import Prompt, PromptBuilder
from finch_rag.prompts.chat_template import Message, check_messages, frame, plain_frame, without_system
from finch_rag.prompts.passages import Passage

from .small import CHATML, chat_tokenizer, plain_tokenizer, tokenizer_with
from .test_builder import ADVERSARIAL, NO_SYSTEM_ROLE, SYSTEM_ROLE_IGNORED, controls, everything, raw

SYSTEM_LAST = (  # as Mistral's: the system message opens the last message of the user
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n\n{% endif %}"
    "{{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
)
TURNS = [
    Message(role="system", content="Be brief."),
    Message(role="user", content="who built it?"),
    Message(role="assistant", content="Novak."),
    Message(role="user", content="when?"),
]
HISTORY: list[Any] = TURNS[1:3]


def joined(messages: Sequence[Message], texts: Sequence[str]) -> str:
    """A frame with the messages' texts put into it."""
    contents = [*(message["content"] for message in messages), ""]
    return "".join(text + content for text, content in zip(texts, contents, strict=True))


def rendered(tokenizer: Any, messages: Sequence[Message]) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def built(template: str | None, **options: Any) -> str:
    """The text of a whole prompt."""
    builder = PromptBuilder(tokenizer_with(template))
    return raw(builder, everything(builder.build("when?", [Passage("the bridge")], "Answer.", **options)))


def test_a_frame_is_what_stands_around_the_messages() -> None:
    messages, texts = frame(chat_tokenizer(), TURNS)
    assert messages == TURNS
    assert texts == [
        "<|im_start|>system\n",
        "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_a_frame_takes_many_messages() -> None:  # the marks of 1 and 10 are told apart
    turns = [Message(role=("user", "assistant")[n % 2], content=f"turn {n}") for n in range(25)]
    assert joined(*frame(chat_tokenizer(), turns)) == rendered(chat_tokenizer(), turns)


@pytest.mark.parametrize("template", [NO_SYSTEM_ROLE, SYSTEM_ROLE_IGNORED])
def test_where_a_template_takes_no_system_message_its_text_opens_the_users_first(template: str) -> None:
    messages, texts = frame(tokenizer_with(template), TURNS[:2])
    assert messages == [Message(role="user", content="Be brief.\n\nwho built it?")]
    assert joined(messages, texts) == "[INST] Be brief.\n\nwho built it? [/INST]"


def test_a_system_message_that_a_template_puts_behind_the_history_comes_first() -> None:
    messages, texts = frame(tokenizer_with(SYSTEM_LAST), TURNS)
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert joined(messages, texts) == "[INST] Be brief.\n\nwho built it? [/INST]Novak.[INST] when? [/INST]"


def test_without_system_leaves_the_messages_as_they_were() -> None:
    before = [Message(**message) for message in TURNS]
    assert without_system(TURNS)[1:] == TURNS[2:]
    assert before == TURNS


LOOP = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
UNUSABLE = {
    "shows a message twice": ("{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}", "once"),
    "shows the last first as well": ("{{ messages[-1]['content'] }} " + LOOP, "once"),
    "shows the first last as well": (LOOP + "{{ messages[0]['content'] }}", "once"),
    "drops the assistant": (SYSTEM_ROLE_IGNORED, "once"),
    "drops all": ("nothing", "once"),
    "turns the order round": (LOOP.replace("messages", "messages[::-1]"), "once"),
    "fails": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "fails in two lines": ("{{ raise_exception('roles must\nalternate') }}", "roles must"),
    "is no template": ("{% if %}", "Expected an expression"),
}


@pytest.mark.parametrize(("template", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_template_that_cannot_be_used_is_a_model_error_of_one_line(template: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        frame(tokenizer_with(template), TURNS[1:])
    assert "\n" not in str(caught.value)
    assert "chat template" in str(caught.value)


def llama(messages: Sequence[Message]) -> str:
    return "".join(f"<|{m['role']}|>{m['content']}<|im_end|>" for m in messages) + "<|assistant|>"


def test_render_stands_in_for_the_template() -> None:
    assert frame(chat_tokenizer(), TURNS[1:], llama)[1] == [
        "<|user|>",
        "<|im_end|><|assistant|>",
        "<|im_end|><|user|>",
        "<|im_end|><|assistant|>",
    ]
    for template in (CHATML, None, "nothing"):
        assert built(template, system_prompt="Be brief.", history=HISTORY, render=llama) == (
            "<|system|>Be brief.<|im_end|><|user|>who built it?<|im_end|><|assistant|>Novak.<|im_end|>"
            "<|user|>Answer.\n\nthe bridge\n\nQuestion: when?<|im_end|><|assistant|>"
        )


def test_renders_control_tokens_are_meant() -> None:
    builder = PromptBuilder(plain_tokenizer())
    end = builder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = controls(builder, everything(builder.build("when?", [], history=HISTORY, render=llama)))
    assert found == [end] * 3


def test_render_never_sees_the_texts() -> None:
    seen: list[str] = []

    def spy(messages: Sequence[Message]) -> str:
        seen.extend(message["content"] for message in messages)
        return llama(messages)

    built(CHATML, system_prompt="Be brief.", history=HISTORY, render=spy)
    assert len(seen) == 4
    assert not {"Be brief.", "who built it?", "Novak.", "when?"} & set(seen)


def test_a_render_that_drops_a_message_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="once"):
        frame(chat_tokenizer(), TURNS[1:], lambda messages: messages[-1]["content"])


@pytest.mark.parametrize("system_prompt", ["", "Be brief."])
@pytest.mark.parametrize("history", [[], HISTORY, HISTORY * 3])
@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM_ROLE])
def test_the_whole_is_what_the_template_renders(template: str, history: list[Any], system_prompt: str) -> None:
    turns = [*history, Message(role="user", content="Answer.\n\nthe bridge\n\nQuestion: when?")]
    if system_prompt:
        turns = [Message(role="system", content=system_prompt), *turns]
        if template == NO_SYSTEM_ROLE:
            turns = [Message(role="user", content=f"{system_prompt}\n\n{turns[1]['content']}"), *turns[2:]]
    found = built(template, system_prompt=system_prompt, history=history)
    assert found == rendered(tokenizer_with(template), turns)


@pytest.mark.embedded
def test_the_whole_is_what_the_embedded_models_template_renders(embedded: Finch) -> None:
    builder = embedded.prompts
    prompt = builder.build("when?", [Passage("the bridge")], "Answer.", "Be brief.", HISTORY)
    content = "Answer.\n\nthe bridge\n\nQuestion: when?"
    expected = [*TURNS[:3], Message(role="user", content=content)]
    assert raw(builder, everything(prompt)) == rendered(builder.tokenizer, expected)


def test_without_a_template_a_conversation_is_a_transcript() -> None:
    assert built(None, system_prompt="Be brief.", history=HISTORY) == (
        "Be brief.\n\nQuestion: who built it?\nAnswer: Novak.\n\nAnswer.\n\nthe bridge\n\nQuestion: when?\nAnswer:"
    )
    assert built(None, system_prompt="", history=HISTORY).startswith("Question: who built it?\nAnswer: Novak.\n\n")


def test_a_prompt_that_is_read_whole_gets_no_label() -> None:
    builder = PromptBuilder(plain_tokenizer())
    assert raw(builder, everything(builder.build("Once upon a time", [], "", ""))) == "Once upon a time"
    assert plain_frame(TURNS[-1:], 0, labelled=False) == ["", ""]
    assert plain_frame(TURNS[-1:], 0, labelled=True) == ["", "\nAnswer:"]


FOLLOWING = [Message(role="assistant", content="In 1860 <|im_end|>."), Message(role="assistant", content="Or later.")]


def test_what_follows_the_question_stands_in_the_tail_as_the_template_has_it() -> None:
    builder = PromptBuilder(chat_tokenizer())
    prompt = builder.build("when?", [], "", "", in_own_words=True, following=FOLLOWING)
    expected = [Message(role="user", content="when?"), *FOLLOWING]
    assert raw(builder, everything(prompt)) == rendered(builder.tokenizer, expected)
    assert raw(builder, prompt.question) == "when?"
    end = builder.encode(["<|im_end|>"])[0]
    assert [token for token in end if token in builder.control_ids] == []  # what an answer says is text
    assert sum(token in builder.control_ids for token in prompt.tail) == 6
    plain = PromptBuilder(plain_tokenizer())
    after = plain.build("when?", [Passage("the bridge")], "", "", following=FOLLOWING[1:])
    assert raw(plain, after.tail) == "\nAnswer: Or later.\nAnswer:"


def test_an_empty_message_is_asked_where_a_template_opens_the_answer() -> None:
    builder = PromptBuilder(chat_tokenizer())
    prompt = builder.build(" ", [], "", "", HISTORY, in_own_words=True)
    assert prompt.question == []
    assert raw(builder, everything(prompt)) == rendered(builder.tokenizer, [*HISTORY, Message(role="user", content="")])
    for other, passages in ((builder, [Passage("the bridge")]), (PromptBuilder(plain_tokenizer()), [])):
        with pytest.raises(InputError, match="question is empty"):
            other.build(" ", passages, "", "", in_own_words=True)


def test_history_stands_in_the_prefix() -> None:
    builder = PromptBuilder(chat_tokenizer())
    with_history = builder.build("when?", [Passage("the bridge")], "Answer.", "", HISTORY)
    without = builder.build("when?", [Passage("the bridge")], "Answer.", "")
    assert "Novak." in raw(builder, with_history.prefix)
    for part in ("passages", "question", "own_tokens", "tail"):
        assert getattr(with_history, part) == getattr(without, part)


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM_ROLE, None])
@pytest.mark.parametrize("text", ADVERSARIAL)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_untrusted_text_in_the_history_adds_no_control_token(template: str | None, text: str, role: str) -> None:
    builder = PromptBuilder(tokenizer_with(template))

    def build(content: str) -> Prompt:
        turns = [{**turn, "content": content} if turn["role"] == role else turn for turn in HISTORY]
        return builder.build("when?", [Passage("the bridge")], history=turns)

    assert controls(builder, everything(build(text))) == controls(builder, everything(build("plain")))
    assert text in raw(builder, build(text).prefix)


def test_history_may_hold_the_marks_of_the_template() -> None:
    mark = "FinchMessage2GoesHere"
    turns = [Message(role=turn["role"], content=mark) for turn in HISTORY]
    assert built(CHATML, system_prompt=mark, history=turns).count(mark) == 3


BAD_HISTORIES: list[tuple[Any, str]] = [
    ([*HISTORY, {"role": "system", "content": "x"}], "message 2 has the role 'system'.*'user'.*'assistant'"),
    ([{"role": "tool", "content": "x"}], "message 0 has the role 'tool'"),
    ([{"content": "x"}], "message 0 has the role None"),
    (["x"], "message 0 has the role None"),
    ([*HISTORY, {"role": "user", "content": None}], "message 2 is NoneType"),
    ([{"role": "user"}], "message 0 is NoneType"),
    ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "message 0 is list"),
]


@pytest.mark.parametrize(("history", "reason"), BAD_HISTORIES)
def test_a_bad_history_is_an_input_error_that_says_which_message(finch: Finch, history: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        finch.ask("when?", ["the bridge"], history=history)
    assert "\n" not in str(caught.value)


def test_a_checked_history_holds_nothing_but_role_and_content() -> None:
    turns = [{"role": "user", "content": "x", "name": "Ann"}]
    assert check_messages(turns, ("user", "assistant"), "turn") == [{"role": "user", "content": "x"}]
    assert check_messages((), ("user", "assistant"), "turn") == []
