from __future__ import annotations

import json
import subprocess
import sys

import pytest

import finch_rag

_FRAMEWORKS = (
    "llama_index",
    "langchain",
    "typer",
    "rich",
    "faiss",
    "sentence_transformers",
    "fastapi",
    "uvicorn",
    "ray",
    "pyarrow",
)
_OUTER_ROOMS = ("finch_rag.bench", "finch_rag.serve", "finch_rag.ray_data")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_public_names_are_these() -> None:
    assert finch_rag.__all__ == [
        "Answer",
        "AnswerStream",
        "Citation",
        "CompressedCache",
        "CompressionReport",
        "CorpusError",
        "DeviceMemoryError",
        "Finch",
        "FinchError",
        "Finding",
        "InputError",
        "MissingExtraError",
        "ModelError",
        "NumericsError",
        "Passage",
        "PassageStore",
        "Quote",
        "Retrieved",
        "SettingsError",
        "Source",
        "Statement",
        "StoreError",
        "StoreInfo",
        "WindowError",
        "check_model",
        "find_alone_heads",
        "find_heads",
    ]


@pytest.mark.parametrize("name", finch_rag.__all__)
def test_a_public_name_is_importable_and_listed(name: str) -> None:
    assert getattr(finch_rag, name).__name__ == name
    assert name in dir(finch_rag)


def test_a_star_import_brings_all_names() -> None:
    names = json.loads(run_python("import json; from finch_rag import *; print(json.dumps(dir()))"))
    assert set(finch_rag.__all__) <= set(names)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        finch_rag.nonsense  # noqa: B018


def test_a_bare_import_is_fast_and_leaves_torch_alone() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import finch_rag; seconds = time.perf_counter() - start\n"
        "print(seconds, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    seconds, torch_loaded, transformers_loaded = run_python(code).split()
    assert float(seconds) < 0.3
    assert (torch_loaded, transformers_loaded) == ("False", "False")


def test_the_core_imports_no_framework_and_no_command_line() -> None:
    code = (
        "import json, sys, transformers.modeling_utils\n"
        "before = set(sys.modules)\n"  # some releases of what it needs import rich
        "import finch_rag\n"
        "for name in finch_rag.__all__: getattr(finch_rag, name)\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    modules = json.loads(run_python(code))
    assert "finch_rag.engine" in modules
    assert [m for m in modules if m.split(".")[0].startswith(_FRAMEWORKS) or m.startswith(_OUTER_ROOMS)] == []
