"""The rooms of this package, in the order in which they may import each other; run as a module, it draws them.

A room is a folder, or a module of the root. It imports only from itself and from rooms before it, type-checking imports
included, and no module takes part in a circle; ``tests/test_house.py`` holds the package to that.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOMS = {
    "errors": "what users are told when something cannot work",
    "checks": "rules for what users pass in",
    "paths": "files on the user's machine",
    "jsonl": "JSON lines",
    "prompts": "messages, passages and question as token ids; flat prompts of frameworks taken apart",
    "models": "loading, attention that can be observed, re-rotation, the cache, forward passes",
    "prefill": "which passages matter: each read alone, or the loop (scan a chunk, evict, go on); re-prefill",
    "heads": "which attention heads find passages",
    "decode": "sampling, JSON by a schema, text deltas, CUDA graphs, fused kernels",
    "answer": "answer, citations, figures",
    "store": "passages that are read once and asked for ever",
    "request": "one call, resolved",
    "settings": "an engine's settings, a call's options",
    "runtime": "executes requests on a model",
    "fitting": "what fits into the window: parsed prompts, a conversation's turns",
    "resolving": "question, passages and settings -> a request",
    "reading": "a request -> the cache that it is answered from",
    "answering": "before an answer's first token, and after its last",
    "quotes": "which sentences an answer rests on, and how well they support it",
    "streaming": "an answer that arrives in pieces, to a thread or an event loop",
    "batch": "several requests, executed together",
    "attributes": "what an engine tells about itself",
    "engine": "`Finch`, a thin face of the runtime",
    "checkup": "whether a model computes with Finch what it computes without",
    "sharing": "one engine for all who ask for the same model",
    "adapters": "what adapters of frameworks build on",
    "corpus": "a folder of text: passages, index, grading",
    "terminal": "output and progress",
    "ray_data": "tables of questions, answered by batches, also on many machines",
    "serve": "an HTTP server in OpenAI's shapes",
    "bench": "benchmarks",
    "cli": "the command line, one file a command",
    "house": "this drawing",
}


def imports_of(package: Path) -> dict[str, set[str]]:
    """What each module of a package imports of the others, wherever the import stands.

    Args:
        package: Its folder. The files ``__init__.py`` are left out: they only hand names on.

    Returns:
        Module names without the package's, such as "prefill.loop".
    """
    modules = {
        ".".join(file.relative_to(package).with_suffix("").parts): file
        for file in sorted(package.rglob("*.py"))
        if file.name != "__init__.py"
    }
    return {
        name: {found for found in _imported(name, file, modules) if found != name} for name, file in modules.items()
    }


def _imported(module: str, file: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            parts = module.split(".")[: -node.level]
        elif (node.module or "").split(".")[0] == __package__:
            parts = []
        else:
            continue
        named = (node.module or "").removeprefix(__package__ or "").strip(".") if not node.level else node.module
        base = ".".join([*parts, *([named] if named else [])])
        for name in node.names:
            inner = f"{base}.{name.name}" if base else name.name
            if inner in modules:
                yield inner
            elif base in modules:
                yield base


def room_of(module: str) -> str:
    """The room that a module is in.

    Args:
        module: Such as "prefill.loop".
    """
    return module.partition(".")[0]


def draw(imports: Mapping[str, set[str]]) -> str:
    """The rooms in order, each with those that it imports from; last, whether there is a circle.

    Args:
        imports: Of `imports_of`.
    """
    lines = []
    for room, what in ROOMS.items():
        own = [module for module in imports if room_of(module) == room]
        used = {room_of(found) for module in own for found in imports[module]} - {room}
        arrows = " ".join(other for other in ROOMS if other in used)
        lines.append(f"{room:10}{len(own):3}  {what}")
        if arrows:
            lines.append(f"{'':15}<- {arrows}")
    try:
        order = list(TopologicalSorter(imports).static_order())
        lines.append(f"{len(order)} modules, {sum(map(len, imports.values()))} imports, no circle")
    except CycleError as circle:
        lines.append("circle: " + " -> ".join(circle.args[1]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(draw(imports_of(Path(__file__).parent)) + "\n")
