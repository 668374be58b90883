"""Chat templates come with models, so they are as good as their authors: one that fails says so, in one line."""

from __future__ import annotations

from functools import cache
from typing import Any

from finch_rag.prompts.builder import PromptBuilder
from finch_rag.prompts.chat_template import Message
from finch_rag.prompts.passages import Passage
from tests.small import CHATML, tokenizer_with

from .support import Choices, dictionary, holds, only, text_of

WORDS = (
    *("{{ ", " }}", "{% ", " %}", "{# ", " #}", "{%- ", " -%}", "messages", "message", "['role']", "['content']"),
    *(
        "for message in messages",
        "endfor",
        "if ",
        "elif ",
        "else",
        "endif",
        "set x = ",
        "x",
        "loop.index0",
        "loop.last",
    ),
    *("add_generation_prompt", "bos_token", "eos_token", "raise_exception('no')", "tools", " == ", " + ", " | trim"),
    *(" | tojson", " | length", "range(3)", "[0]", "[1:]", "'user'", "'system'", "'assistant'", "namespace(n=0)"),
    *("macro m(a)", "endmacro", "m(1)", "strftime_now('%Y')", "is defined", " is string", " not ", "none", "1", "0"),
    *("<|im_start|>", "<|im_end|>", "\n", "generation", "endgeneration", "{{ message['role'] }}", "break", "continue"),
    "{{ message['content'] }}",
    "{% for message in messages %}",
    "{% endfor %}",
)
DICTIONARY = dictionary(WORDS)
_TURNS = (
    Message(role="user", content="who built it?"),
    Message(role="assistant", content="Novak."),
)
_OTHERS = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
    "{{ bos_token }}{% for m in messages %}{% if loop.index0 % 2 == 0 %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s + m['content'] %}{% endfor %}{{ ns.s }}",
)


@cache
def _tokenizer() -> Any:
    return tokenizer_with(None)


def seeds() -> list[bytes]:
    """Templates of several kinds."""
    return [bytes((number,)) + template.encode() for number in range(3) for template in (CHATML, *_OTHERS)]


def check(data: bytes) -> None:
    """Options, then a template."""
    choices = Choices(data)
    kind = choices.number(3)
    tokenizer = _tokenizer()
    tokenizer.chat_template = text_of(choices.rest(), WORDS)
    with only():
        prompt = PromptBuilder(tokenizer).build(
            "when?",
            [Passage("the bridge")],
            "Answer.",
            system_prompt="Be brief." if kind else "",
            history=_TURNS if kind == 2 else (),
        )
        holds(len(prompt.passages) == 1, "the passage is gone")
