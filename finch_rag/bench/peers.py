"""The questions of a results folder, answered by other projects' ways of reading many passages.

    kvpress-finch     kvpress' FinchPress: tokens by the question's attention, per KV head; keys move
    kvpress-snapkv    kvpress' SnapKVPress with the question as its window: the same, smoothed; keys stay
    kvpress-expected  kvpress' ExpectedAttentionPress, without the question: by what later queries may attend to
    kvpress-kvzip     kvpress' KVzipPress, without the question: by what repeating the passages attends to; masked only
    longllmlingua     the passages' text shortened by LongLLMLingua, with the same model, then read

Prompt, tokens and decoding are Finch's, and so is the number of document tokens in the cache when the answer is made.
kvpress needs transformers below 5.3, so this runs in an environment of its own:

    make bench-peers RESULTS=FOLDER ARGS='--budgets 256,512 --shard 1/2'

The folder is one of ``finch-rag bench quality``, which counts the answers that are put there. A GGUF file's tokenizer
differs between versions of transformers: convert the file once (``save_pretrained``) and name the folder as the model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import FinchError, InputError, MissingExtraError
from ..models.loading import load_model
from ..terminal.output import say_json, show_error
from ..terminal.progress import ProgressBars
from . import tables
from .arguments import check_runs, names_in, numbers_in, shard_of
from .cases import QualityCase, read_cases
from .memory import in_use, peak_memory
from .methods import DoesNotFitError, Outcome
from .peer_methods import (
    PlainModel,
    add_separator,
    expected_attention_press,
    finch_press,
    kvzip_press,
    longllmlingua,
    snapkv_press,
)
from .quality import appending, label, read_results
from .summary import summarise

Method = Callable[[PlainModel, QualityCase, int], Outcome]
PEERS: dict[str, tuple[str, Method]] = {  # with the package that each needs
    "kvpress-finch": ("kvpress", finch_press),
    "kvpress-snapkv": ("kvpress", snapkv_press),
    "kvpress-expected": ("kvpress", expected_attention_press),
    "kvpress-kvzip": ("kvpress", kvzip_press),
    "longllmlingua": ("llmlingua", longllmlingua),
}


def main(
    out: str | Path,
    *,
    methods: Sequence[str] = tuple(PEERS),
    budgets: Sequence[int] = (512,),
    limit: int | None = None,
    max_new_tokens: int | None = None,
    shard: tuple[int, int] = (0, 1),
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Runs what is missing in a results folder; prints a table of all that is there and, last, one JSON object.

    Args:
        out: A folder that `finch_rag.bench.quality` has made.
        methods: Of `PEERS`.
        budgets: Document tokens in the cache; each method runs with each.
        limit: Only the first questions; all when None.
        max_new_tokens: The most tokens of an answer; as in the folder's settings when None.
        shard: (i, n): only each n-th case, from the i-th; for several processes on one accelerator.
        device: See `finch_rag.models.load_model`.
        dtype: See `finch_rag.models.load_model`.

    Returns:
        What the JSON line holds.

    Raises:
        InputError: If an argument cannot work, or ``out`` is no results folder.
        MissingExtraError: If a method's package is not installed.
    """
    check_runs(methods, PEERS, budgets, limit=limit, max_new_tokens=max_new_tokens)
    folder = Path(out)
    settings, cases = _results_folder(folder)
    part, parts = shard
    done = {(record["id"], record["label"]) for record in read_results(folder)}
    wanted = [(c, m, b) for c in cases[:limit][part::parts] for m in methods for b in budgets]
    todo = [item for item in wanted if (item[0].question.id, label(*item[1:])) not in done]
    if todo:
        _check_installed(methods)
        loaded = load_model(settings["model"], dtype, device)
        separator = add_separator(loaded) if "kvpress-finch" in methods else None
        plain = PlainModel(loaded, max_new_tokens or int(settings["max_new_tokens"]), separator)
        with appending(folder / f"results-peers-{part}.jsonl") as store, ProgressBars(remaining=True) as bars:
            for number, item in enumerate(todo, 1):
                store(_record(plain, *item))
                bars("answers", len(wanted) - len(todo) + number, len(wanted))
    summary = {"settings": settings, **summarise(cases, read_results(folder))}
    tables.show_quality(summary)
    say_json(summary)
    return summary


def _check_installed(methods: Sequence[str]) -> None:
    for package in {PEERS[method][0] for method in methods}:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(f"{package} is not installed here: `make bench-peers` makes an environment with it")


def _results_folder(folder: Path) -> tuple[dict[str, Any], list[QualityCase]]:
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        return settings, list(read_cases(folder / "cases.jsonl.gz"))
    except (OSError, ValueError, InputError) as error:
        raise InputError(f"{folder} is no results folder ({error}): make one by finch-rag bench quality") from error


@torch.inference_mode()
def _record(plain: PlainModel, case: QualityCase, method: str, budget: int) -> dict[str, Any]:
    record = {"id": case.question.id, "label": label(method, budget), "budget": budget}
    device = plain.loaded.model.device
    try:
        with peak_memory(device, in_use(device)) as peak:
            outcome = PEERS[method][1](plain, case, budget)
    except DoesNotFitError as reason:
        return {**record, "skipped": str(reason)}
    return {**record, **asdict(replace(outcome, peak_mib=peak[0]))}


def command(arguments: Sequence[str]) -> int:
    """Runs `main` from the command line.

    Args:
        arguments: Without the program's name.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        "python -m finch_rag.bench.peers", description="Other projects' answers, for a results folder."
    )
    parser.add_argument("out", help="a folder of finch-rag bench quality")
    parser.add_argument("--methods", default=",".join(PEERS), metavar="NAME,...", help=f"of: {', '.join(PEERS)}")
    parser.add_argument("--budgets", default="512", metavar="TOKENS,...", help="document tokens in the cache")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--max-new-tokens", type=int, metavar="TOKENS", help="the longest answer; else the folder's")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="only the I-th of N parts of the questions")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    options = vars(parser.parse_args(arguments))
    try:
        options["methods"], options["budgets"] = names_in(options["methods"]), numbers_in("budgets", options["budgets"])
        options["shard"] = shard_of(options["shard"])
        main(**options)
    except FinchError as error:
        show_error(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
