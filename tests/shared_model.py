"""What one of several processes that share a model finds, or the only one: `tests/test_parallel.py` runs this module.

    python -m tests.shared_model FOLDER_OF_MODELS RESULT

The environment says, as torchrun sets it, which process of how many this is.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finch_rag.answer import Answer, Citation
from finch_rag.engine import Finch
from finch_rag.errors import FinchError
from finch_rag.models.cache import CompressedCache
from finch_rag.models.forward import memory_guard
from finch_rag.models.parallel import TensorParallel
from finch_rag.prefill.planning import Strategy

from .small import texts

QUESTIONS = ("When was the harbour built?", "Who is the director of the museum?")
STRATEGIES: tuple[Strategy, ...] = ("loop", "independent")
_SETTINGS: dict[str, Any] = {"budget": 60, "chunk_size": 96, "max_new_tokens": 8, "system_prompt": "", "rounds": 1}
_SHARED: dict[str, Any] = {"tp_plan": "auto"} if "WORLD_SIZE" in os.environ else {}


def engine(folder: Path, **settings: Any) -> Finch:
    """An engine on a model of a folder, or on this process's part of it."""
    options: dict[str, Any] = {"dtype": "float32", "model_kwargs": _SHARED, **settings}
    return Finch.from_pretrained(folder, **{**_SETTINGS, **options})


def _cited(citations: list[Citation]) -> list[dict[str, Any]]:
    return [
        {
            "place": each.index,
            "kept": each.kept_tokens,
            "share": each.share,
            "quotes": [quote.text for quote in each.quotes],
        }
        for each in citations
    ]


def _told(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "cited": _cited(answer.citations)}


def answers(finch: Finch) -> dict[str, Any]:
    """Answers and rankings by both strategies, one by one."""
    found: dict[str, Any] = {}
    for strategy in STRATEGIES:
        for number, question in enumerate(QUESTIONS):
            own = texts(12, seed=number)
            found[f"ask {strategy} {number}"] = _told(finch.ask(question, own, strategy=strategy))
            ranked = finch.rank(question, own, strategy=strategy)
            found[f"rank {strategy} {number}"] = {"text": "", "cited": _cited(ranked)}
    return found


def answers_together(finch: Finch) -> dict[str, Any]:
    """Answers by both strategies, side by side."""
    found: dict[str, Any] = {}
    lists = [texts(9, seed=number) for number in range(len(QUESTIONS))]
    for strategy in STRATEGIES:
        for passages in (texts(12), lists):
            several = finch.ask_many(QUESTIONS, passages, strategy=strategy)
            found |= {f"{strategy} {len(found)} {number}": _told(answer) for number, answer in enumerate(several)}
    return found


def more_answers(finch: Finch, store: Path) -> dict[str, Any]:
    """Answers by the other ways."""
    own = texts(12)
    with finch.stream(QUESTIONS[0], own) as stream:
        text = "".join(stream)
    kept = finch.ask(QUESTIONS[0], own, strategy="loop", reread=False)
    tokens = finch.ask(QUESTIONS[0], own, selection="token")
    rounds = finch.ask(QUESTIONS[0], own, rounds=2)
    with finch.open_store() as memory:
        memory.add(own)
        stored = finch.ask(QUESTIONS[1], store=memory)
    with finch.open_store(store, read_only=True) as read:
        from_file = finch.ask(QUESTIONS[1], store=read)
    cache = finch.compress(QUESTIONS[0], own)
    drawn = finch.ask(QUESTIONS[0], own, temperature=1.0, seed=7)
    return {
        "stream": {"text": text, "cited": []},
        "kept": _told(kept),
        "tokens": _told(tokens),
        "rounds": _told(rounds),
        "in memory": _told(stored),
        "from a folder": _told(from_file),
        "cached": _told(finch.ask_cached(cache)),
        "drawn": _told(drawn),
    }


def heads(folder: Path) -> dict[str, Any]:
    """The heads that are found, and what identifies the model."""
    finch = engine(folder)
    loop, reader = finch.runtime.retrieval_heads(), finch.runtime.alone_reader()
    return {
        "fingerprint": finch.fingerprint,
        "loop": {layer: list(own) for layer, own in (loop or {}).items()},
        "alone": {layer: list(own) for layer, own in reader.heads.items()},
    }


def agreements(folder: Path) -> dict[str, Any]:
    """What processes that share a model must not decide by themselves."""
    finch, rank = engine(folder, heads="all"), int(os.environ["RANK"])
    shared = TensorParallel.of(finch.model)
    assert shared is not None
    return {
        "drawn": [finch.ask(question, texts(4), temperature=2.0).text for question in QUESTIONS],
        "least": shared.least(5 + rank),
        "agreed": shared.agreed({"rank": rank}),
        "first": shared.first == (rank == 0),
    }


def refusals(models: Path, store: Path) -> dict[str, str]:
    """The lines in which processes that share a model say what they cannot do."""
    from finch_rag.serve.app import make_app

    finch = engine(models / "llama", heads="all")
    cache = finch.compress(QUESTIONS[0], texts(12))
    whole = CompressedCache.load(models / "llama.cache")

    def no_memory() -> None:
        with memory_guard(finch.model, "77 tokens"):
            raise torch.OutOfMemoryError("out of memory")

    tried: dict[str, Callable[[], object]] = {
        "save": lambda: cache.save(store / "never"),
        "ask": lambda: finch.ask_cached(whole),
        "store": lambda: finch.open_store(store / "never"),
        "server": lambda: make_app(finch),
        "compile": lambda: engine(models / "llama", compile_layers=True),
        "quantised": lambda: engine(models / "llama", model_kwargs={**_SHARED, "quantization_config": object()}),
        "uneven": lambda: engine(models / "uneven"),
        "own attention": lambda: engine(models / "gemma2"),
        "memory": no_memory,
    }
    said = {}
    for name, attempt in tried.items():
        try:
            attempt()
        except FinchError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def main() -> None:
    """Writes what this process finds."""
    torch.set_num_threads(1)
    models, result = map(Path, sys.argv[1:])
    named = {"heads": [(0, 1), (1, 2)], "alone_heads": [(0, 3), (1, 0)]}
    finch, all_heads = engine(models / "llama", **named), engine(models / "llama", heads="all", alone_heads=[(1, 1)])
    found: dict[str, Any] = {
        "named": answers(finch),
        "together": answers_together(finch),
        "more": more_answers(finch, models / "store"),
        "all": answers(all_heads),
        "heads": heads(models / "llama"),
    }
    for kind in ("qwen3", "phi3"):
        found[kind] = answers(engine(models / kind, **named))
    if _SHARED:
        found["agreements"] = agreements(models / "llama")
        found["refusals"] = refusals(models, models / "store")
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
