"""Seconds and memory of reading a document: Finch against one plain forward pass.

Every case (a method at a length) runs in a process of its own, so that its peak memory is its own. On a CPU the
processes stay alive and take turns, so that a noisy machine disturbs all cases alike; on an accelerator they run one
after another, because their weights would not fit side by side.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from ..engine import Finch
from ..errors import FinchError, InputError
from ..head_examples import make_examples
from ..models import resolve_device
from ..planning import PrefillPlan, default_chunk_size
from ..prefill import prefill
from ..prompt import Passage, Prompt
from .memory import in_use, peak_memory

METHODS = ("full", "finch")
QUESTION = "Which of the people in these passages was the last director of a museum that stands in a mountain town?"
_DECODED = 16  # tokens decoded to time a step
_WARM_UP_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Case:
    """One method at one length.

    Attributes:
        method: "full" (one plain forward pass with SDPA) or "finch".
        tokens: Tokens of the passages.
        model: What `Finch.from_pretrained` takes.
        budget: Finch's budget.
        chunk_size: Finch's chunk size.
    """

    method: str
    tokens: int
    model: str
    budget: int
    chunk_size: int


@dataclass(frozen=True, slots=True)
class Run:
    """One measurement.

    Attributes:
        first_token_seconds: From the first passage to the logits of the first answer token.
        decode_ms: Milliseconds of one decoding step, the median of some.
        peak_mib: Peak of memory beyond the loaded model.
    """

    first_token_seconds: float
    decode_ms: float
    peak_mib: float


def main(
    model: str = "embedded",
    tokens: Sequence[int] = (8192, 32768),
    budget: int = 512,
    chunk_size: int | None = None,
    repeats: int = 3,
    methods: Sequence[str] = METHODS,
) -> dict[str, Any]:
    """Runs all cases, prints a table and, as the last line, one JSON object.

    Args:
        model: What `Finch.from_pretrained` takes.
        tokens: Lengths of the passages.
        budget: Finch's budget.
        chunk_size: Finch's chunk size; the engine's default when None.
        repeats: Runs of each case; medians are reported.
        methods: Of `METHODS`. "full" is left out where the model's window is too small.

    Returns:
        What the JSON line holds.

    Raises:
        InputError: If an argument cannot work.
    """
    if repeats < 1 or not tokens or min(tokens) < 1:
        raise InputError(f"tokens {list(tokens)} at {repeats} repeats measure nothing: both must be at least 1")
    if unknown := set(methods) - set(METHODS):
        raise InputError(f"method {sorted(unknown)} is unknown: use {', '.join(METHODS)}")
    cases = [Case(method, n, model, budget, chunk_size or 0) for n in tokens for method in methods]
    rows = []
    for case, result in _measure(cases, repeats):
        if isinstance(result, str):
            rows.append({"method": case.method, "tokens": case.tokens, "skipped": result})
            continue
        medians = {name: statistics.median(asdict(run)[name] for run in result) for name in asdict(result[0])}
        rows.append({"method": case.method, "tokens": case.tokens, **{k: round(v, 3) for k, v in medians.items()}})
    summary = {
        "model": model,
        "device": str(resolve_device("auto")),
        "threads": torch.get_num_threads(),
        "budget": budget,
        "repeats": repeats,
        "cases": rows,
        "ratios": _ratios(rows),
    }
    _print(summary)
    return summary


def _measure(cases: Sequence[Case], repeats: int) -> Iterator[tuple[Case, list[Run] | str]]:
    """Runs cases in processes; a string says why a case was left out."""
    at_once = len(cases) if resolve_device("auto").type == "cpu" else 1
    for start in range(0, len(cases), at_once):
        group = cases[start : start + at_once]
        workers = [_Worker(case) for case in group]
        try:
            results: list[list[Run]] = [[] for _ in group]
            for round_number in range(repeats):
                for case, worker, runs in zip(group, workers, results, strict=True):
                    if worker.reason is None:
                        _say(f"{case.method} on {case.tokens:,} tokens, run {round_number + 1} of {repeats}")
                        runs.append(worker.run())
            for case, worker, runs in zip(group, workers, results, strict=True):
                yield case, worker.reason or runs
        finally:
            for worker in workers:
                worker.stop()


class _Worker:
    """A process that holds one case."""

    def __init__(self, case: Case) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(case, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.reason: str | None = self._receive()

    def run(self) -> Run:
        self._pipe.send("run")
        return Run(*self._receive())

    def stop(self) -> None:
        self._pipe.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError as error:
            raise FinchError(f"a measuring process ended with exit code {self._process.exitcode}") from error
        if isinstance(answer, FinchError):
            raise answer
        return answer


def _serve(case: Case, pipe: Connection) -> None:
    """Body of a measuring process: loads, warms up, then measures whenever it is told to."""
    try:
        finch = Finch.from_pretrained(case.model)
        if case.method == "full":
            finch.model.set_attn_implementation("sdpa")
            if case.tokens > finch.window:
                pipe.send(f"the model's window is {finch.window:,}")
                return
        prompt = _prompt(finch, case.tokens)
        loaded = in_use(finch.model.device)
        _run(finch, case, _prompt(finch, min(case.tokens, _WARM_UP_TOKENS)))
        pipe.send(None)
        while pipe.recv() == "run":
            with peak_memory(finch.model.device, loaded) as peak:
                seconds, decode_ms = _run(finch, case, prompt)
            pipe.send((seconds, decode_ms, peak[0]))
    except EOFError:
        return
    except FinchError as error:
        pipe.send(error)


def _prompt(finch: Finch, tokens: int) -> Prompt:
    """A prompt whose passages have exactly ``tokens`` tokens."""
    texts = [text for seed in range(tokens // 900 + 1) for text in make_examples(1, 16, seed)[0].passages]
    prompt = finch.prompts.build(QUESTION, [Passage(text) for text in texts])
    passages: list[list[int]] = []
    left = tokens
    for passage in prompt.passages:
        if left:
            passages.append(passage[:left])
            left -= len(passages[-1])
    if left:
        raise FinchError(f"the benchmark made {tokens - left} tokens of text where {tokens} were asked for")
    return Prompt(prompt.prefix, passages, prompt.question, prompt.question_rows, prompt.tail)


@torch.inference_mode()
def _run(finch: Finch, case: Case, prompt: Prompt) -> tuple[float, float]:
    """Seconds to the first token's logits and milliseconds of a decoding step."""
    model, device = finch.model, finch.model.device
    question = torch.tensor([[*prompt.question, *prompt.tail]], device=device)
    _synchronise(device)
    start = time.perf_counter()
    if case.method == "full":
        document = [token for passage in prompt.passages for token in passage]
        ids = torch.cat((torch.tensor([[*prompt.prefix, *document]], device=device), question), dim=1)
        cache: Any = DynamicCache()
    else:
        chunk_size = case.chunk_size or default_chunk_size(device.type)
        plan = PrefillPlan(case.budget, chunk_size, "passage", finch.retrieval_heads(), reread=True)
        read, _ = prefill(model, prompt, plan, finch.rotation)
        cache, ids = read.fork(question.shape[1] + _DECODED), question
        del read
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token = logits[:, -1].argmax(-1, keepdim=True)
    _synchronise(device)
    seconds = time.perf_counter() - start

    steps = []
    for _ in range(_DECODED):
        began = time.perf_counter()
        logits = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        _synchronise(device)
        steps.append(time.perf_counter() - began)
    return seconds, 1e3 * statistics.median(steps)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Finch over full at each length, and Finch's growth from its shortest length to each longer one."""
    measured = {(row["method"], row["tokens"]): row for row in rows if "skipped" not in row}
    ratios = {}
    for (method, tokens), row in measured.items():
        if method == "finch" and ("full", tokens) in measured:
            full = measured["full", tokens]
            ratios[f"seconds finch/full at {tokens}"] = row["first_token_seconds"] / full["first_token_seconds"]
            ratios[f"memory finch/full at {tokens}"] = row["peak_mib"] / max(full["peak_mib"], 0.001)
    lengths = sorted(tokens for method, tokens in measured if method == "finch")
    for longer in lengths[1:]:
        short, long = measured["finch", lengths[0]], measured["finch", longer]
        ratios[f"seconds finch {longer}/{lengths[0]}"] = long["first_token_seconds"] / short["first_token_seconds"]
        ratios[f"memory finch {longer}/{lengths[0]}"] = long["peak_mib"] / max(short["peak_mib"], 0.001)
    return {name: round(value, 3) for name, value in ratios.items()}


def _print(summary: dict[str, Any]) -> None:
    console = Console()
    table = Table(
        title=f"{summary['model']}, {summary['device']}, budget {summary['budget']}, medians of {summary['repeats']}"
    )
    for name in ("method", "tokens", "to first token (s)", "tokens/s", "decode (ms/token)", "peak memory (MiB)"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in summary["cases"]:
        if "skipped" in row:
            figures = ["skipped", "", "", ""]
        else:
            seconds = row["first_token_seconds"]
            rate = row["tokens"] / seconds
            figures = [f"{seconds:.2f}", f"{rate:,.0f}", f"{row['decode_ms']:.1f}", f"{row['peak_mib']:,.0f}"]
        table.add_row(row["method"], f"{row['tokens']:,}", *figures)
    console.print(table)
    for row in summary["cases"]:
        if "skipped" in row:
            console.print(f"{row['method']} on {row['tokens']:,} tokens skipped: {row['skipped']}", highlight=False)
    for name, value in summary["ratios"].items():
        console.print(f"{name}: {value:.2f}", highlight=False)
    sys.stdout.write(json.dumps(summary) + "\n")


def _say(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
