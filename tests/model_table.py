"""The table of docs/models.md: what becomes of every family, found out on small models with random weights.

``python -m tests.model_table`` writes it; tests/test_families.py holds each line to what it finds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING

from finch_rag import Finch, ModelError, Passage
from finch_rag.checkup.checking import right_after_eviction
from finch_rag.decode.cuda_graphs import CudaGraphs
from finch_rag.decode.generation import Decoder
from finch_rag.heads.examples import HeadExample
from finch_rag.models.own_attention import global_layers, runs_own_attention
from finch_rag.prompts.peculiarities import peculiarities
from finch_rag.reading import read_request
from finch_rag.resolving import resolve

from .families import FAMILIES, config_of
from .small import CHATML, chat_tokenizer, model_of, texts, tokenizer_with

FILE = Path(__file__).parent.parent / "docs" / "models.md"
LISTED = Version("5.23")  # of transformers, whose families are listed there
LOOP, ALONE, REFUSED = "loop", "alone", "refused"
_QUESTION = "who built the bridge?"
_STEPS = 3
_BUDGET = 60

_ROLES = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
_OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n"
_SYSTEM_OF_ITS_OWN = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
TEMPLATES = {
    "Qwen, SmolLM, Granite, GLM, OLMo": CHATML,
    "Gemma 1 to 3, Mistral 7B v0.1": (
        "{% for m in messages %}{% if m['role'] == 'system' or (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('turns must alternate') }}{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "<|im_end|>\n{% endfor %}" + _OPENING + "{% endif %}"
    ),
    "Qwen 2.5, Llama 3": _SYSTEM_OF_ITS_OWN + CHATML,
    "models without a chat template": None,
}


def row_of(kind: str) -> str:
    """A family's line of the table; raises where Finch computes something else than the model.

    Args:
        kind: Of `tests.families.FAMILIES`.
    """
    plain, model = model_of(config_of(kind), "eager"), model_of(config_of(kind), "eager")
    heads: dict[str, Any] = {"heads": "all", "alone_heads": [(0, 0)]}
    try:
        finch = Finch(model, chat_tokenizer(), name=kind, budget=200, max_new_tokens=2, **heads)
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return f"| {kind} | {REFUSED} | | | | | {_reason(str(error))} |"
    ranking = "all"
    if runs_own_attention(model):
        layers = sorted(global_layers(model))
        finch.runtime.alone_heads = [(layers[0], 0), (layers[-1], 1)]
        ranking = f"{len(layers)} of {model.config.num_hidden_layers}"
    by_graph = _check_logits(finch, plain)
    found = right_after_eviction(finch, HeadExample(_QUESTION, tuple(texts(12)), 0))
    assert found.passed, found
    kept = _check_needle(finch)
    reading = ALONE if finch.runtime.no_loop else LOOP
    decoding = "graph" if by_graph else "plain"
    return f"| {kind} | {reading} | {ranking} | yes | {kept} of 3 | {decoding} | {_reason(finch.runtime.no_loop)} |"


def _check_logits(finch: Finch, plain: Any) -> bool:
    """Checks logits behind all passages, and in the first steps; whether these can be captured as a CUDA graph."""
    request = resolve(finch.runtime, _QUESTION, [Passage(text) for text in texts(4)], finch.settings)
    cache = read_request(finch.runtime, request)
    document = [token for passage in request.prompt.passages for token in passage]
    tokens = [*request.prompt.prefix, *document, *request.answer_prompt]
    writer = finch.runtime.writer(request.sampling)
    graphs = CudaGraphs(finch.model)
    graphs.enabled = True  # in static buffers; captured where there is a GPU
    decoder = Decoder(
        finch.model,
        cache.fork(request.room),
        request.answer_prompt,
        writer,
        new_tokens=_STEPS,
        graphs=graphs,
        chunk_size=50 if finch.runtime.prompt_chunk_size else None,
    )
    passes = decoder.logits()
    for _ in range(_STEPS):  # the question's pass, and steps of one token
        found = next(passes)[0]
        with torch.inference_mode():
            expected = plain(torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(found, expected, atol=1e-4 * max(1.0, float(expected.abs().max())), rtol=1e-4)
        writer.token_ids.append(int(expected.argmax()))
        tokens.append(writer.token_ids[-1])
    passes.close()
    return graphs.enabled


def _check_needle(finch: Finch) -> int:
    """At how many of three places the passage is kept that a question pays most to, among many."""
    passages = texts(20)
    options: dict[str, Any] = {"strategy": "independent", "prior": "none", "budget": _BUDGET}
    needle = passages.pop(finch.rank(_QUESTION, passages, strategy="independent", prior="none")[0].index)
    kept = 0
    for place in (0, len(passages) // 2, len(passages)):
        answer = finch.ask(_QUESTION, [*passages[:place], needle, *passages[place:]], **options)
        assert 0 < answer.report.kept_tokens <= _BUDGET < answer.report.context_tokens
        kept += place in [citation.index for citation in answer.citations]
    return kept


def _reason(text: str) -> str:
    """An error's first clause, without the class that it names."""
    clause = text.split(";")[0].split(": use ")[0].split(": an engine")[0]
    first, _, rest = clause.partition(" ")
    return " ".join((rest if "For" in first or "Model" in first else clause).split()).replace("|", "\\|")


def prompts() -> list[str]:
    """Lines of the table of chat templates."""
    found = {name: peculiarities(tokenizer_with(template))[1:] for name, template in TEMPLATES.items()}
    return [f"| {name} | {'; '.join(told) or 'nothing'} |" for name, told in found.items()]


def listed() -> dict[str, str]:
    """The lines of docs/models.md by family."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


def _families() -> Iterator[str]:
    yield "| family | read | layers that rank | as the plain model | needle | decoding | why not by the loop |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for kind in sorted(FAMILIES):
        if kind in CONFIG_MAPPING:
            sys.stderr.write(f"{kind}\n")
            yield row_of(kind)


def _prompts() -> Iterator[str]:
    yield "| template as of | what is peculiar |"
    yield "| --- | --- |"
    yield from prompts()


def main() -> None:
    """Writes both tables."""
    text = FILE.read_text(encoding="utf-8")
    for mark, lines in (("families", _families()), ("prompts", _prompts())):
        before, _, rest = text.partition(f"<!-- {mark} -->\n")
        _, _, after = rest.partition(f"<!-- end of {mark} -->\n")
        table = "\n".join(lines)
        text = f"{before}<!-- {mark} -->\n\n{table}\n\n<!-- end of {mark} -->\n{after}"
    FILE.write_text(text, encoding="utf-8")
    sys.stderr.write(f"transformers {transformers.__version__}\n")


if __name__ == "__main__":
    main()
