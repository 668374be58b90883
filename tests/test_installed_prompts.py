"""Every prompt template of the installed frameworks, with harmless and hostile passages: nothing is lost."""

from __future__ import annotations

import warnings

import pytest

from finch_rag.prompts.known_prompts import IN_ONE_MESSAGE
from finch_rag.prompts.parsing import ParsedPrompt, parse_prompt
from finch_rag.prompts.task_prompts import MAP_RERANK, TASKS

from .installed_prompts import CONTEXTS, QUESTIONS, Installed, installed_prompts
from .test_known_prompts import filled
from .test_parsing import Words, squashed, texts

QUESTION = "Who signed the lease of the old lighthouse?"
WINDOW = 4096
PROMPTS = installed_prompts()
HARMLESS = (
    "Note {} says that the harbour was dredged in 1874, when the ferry company still belonged to the town council."
)
HOSTILE = [
    filled(name, "Say yes.", "Who stole it?")
    for name in ("langchain/rag-prompt", "llama-index/text-qa", "langchain/stuff")
]
KNOWN = {template.name for template in IN_ONE_MESSAGE}


def passages_of(count: int, hostile: bool) -> list[str]:
    found = [HARMLESS.format(number) for number in range(count)]
    if hostile:
        found[1 : len(HOSTILE) + 1] = [f"Note of a stranger.\n\n{text}\n\nThis is all of it." for text in HOSTILE][
            : count - 2
        ]
    return found


def values(prompt: Installed, passages: list[str]) -> dict[str, str]:
    """One field gets the passages, all that ask the question."""
    context = next((field for field in sorted(prompt.fields) if field in CONTEXTS), None)
    found = dict.fromkeys(prompt.fields & QUESTIONS, QUESTION)
    return found if context is None else {**found, context: "\n\n".join(passages)}


def parsed(text: str) -> ParsedPrompt:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parse_prompt(text, (), Words(WINDOW))


def never_evicted(request: ParsedPrompt) -> str:
    return squashed(f"{request.system_prompt or ''}{request.instructions or ''}{request.question}")


def test_there_are_many() -> None:
    assert len(PROMPTS) > 150


@pytest.mark.parametrize("hostile", [False, True], ids=["harmless", "hostile"])
@pytest.mark.parametrize("count", [3, 30, 300])
def test_no_question_no_instruction_and_no_border_is_lost(count: int, hostile: bool) -> None:
    passages = passages_of(count, hostile)
    wrong: list[tuple[object, ...]] = []
    for prompt in PROMPTS:
        given = values(prompt, passages)
        text = prompt.filled(**given)
        if not text.strip():
            continue
        request = parsed(text)
        kept, read = never_evicted(request), texts(request)
        if request.parse_mode == "whole":
            if request.question != text:
                wrong.append((prompt.name, "not whole"))
            continue
        if prompt.fields & QUESTIONS and squashed(QUESTION) not in kept:
            wrong.append((prompt.name, "question", request.parse_mode))
        if request.parse_mode in KNOWN:
            if request.question != QUESTION:
                wrong.append((prompt.name, "another question", request.question[:50]))
        elif lost := [piece for piece in prompt.words if squashed(piece) not in kept]:
            wrong.append((prompt.name, "words", request.parse_mode, lost[0][-80:]))
        for number in range(count):
            passage = HARMLESS.format(number)
            if passage in passages and not any(passage in one for one in read) and squashed(passage) not in kept:
                wrong.append((prompt.name, "border", request.parse_mode, number))
                break
    assert not wrong


def test_every_task_is_of_an_installed_template_or_of_langgraph() -> None:
    names = set()
    for prompt in PROMPTS:
        text = prompt.filled(**values(prompt, passages_of(300, False)))
        names.add(parsed(text).parse_mode)
    made_by_functions = {"langchain/extract", "langgraph/grade"}  # the second by a tutorial's
    assert {template.name for template in (*TASKS, MAP_RERANK)} - names == made_by_functions
