"""Chat templates whose role markers are plain text for the tokenizers of the tests, and one whose markers are not."""

from __future__ import annotations

from .small import CHATML

_BY_ROLE = (
    "{{% for m in messages %}}{{% if m['role'] == 'system' %}}{system}{{% elif m['role'] == 'user' %}}{user}"
    "{{% else %}}{assistant}{{% endif %}}{{% endfor %}}{opening}"
)
_TEXT = "{{ m['content'] }}"

ZEPHYR = _BY_ROLE.format(
    system=f"<|system|>\n{_TEXT}</s>\n",
    user=f"<|user|>\n{_TEXT}</s>\n",
    assistant=f"<|assistant|>\n{_TEXT}</s>\n",
    opening="<|assistant|>\n",
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} <|im_end|>{% endif %}{% endfor %}"
)
VICUNA = _BY_ROLE.format(
    system=f"{_TEXT} ", user=f"USER: {_TEXT} ", assistant=f"ASSISTANT: {_TEXT}<|im_end|>", opening="ASSISTANT:"
)
GEMMA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}<start_of_turn>model\n"
)
ALPACA = _BY_ROLE.format(
    system=f"{_TEXT}\n\n",
    user=f"### Instruction:\n{_TEXT}\n\n",
    assistant=f"### Response:\n{_TEXT}\n\n",
    opening="### Response:\n",
)
OPENCHAT = _BY_ROLE.format(
    system=f"GPT4 Correct System: {_TEXT}<|im_end|>",
    user=f"GPT4 Correct User: {_TEXT}<|im_end|>",
    assistant=f"GPT4 Correct Assistant: {_TEXT}<|im_end|>",
    opening="GPT4 Correct Assistant:",
)
FALCON = _BY_ROLE.format(
    system=f"System: {_TEXT}\n", user=f"User: {_TEXT}\n", assistant=f"Assistant: {_TEXT}\n", opening="Assistant:"
)

MARKERS = {
    "ChatML": (CHATML, set[str]()),
    "Zephyr": (ZEPHYR, {"<|system|>", "<|user|>", "<|assistant|>", "</s>"}),
    "Llama 2": (LLAMA2, {"[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"}),
    "Vicuna": (VICUNA, {"USER:", "ASSISTANT:"}),
    "Gemma": (GEMMA, {"<start_of_turn>", "<end_of_turn>"}),
    "Alpaca": (ALPACA, {"### Instruction:", "### Response:"}),
    "OpenChat": (OPENCHAT, {"GPT4 Correct System:", "GPT4 Correct User:", "GPT4 Correct Assistant:"}),
    "Falcon": (FALCON, {"System:", "User:", "Assistant:"}),
}
