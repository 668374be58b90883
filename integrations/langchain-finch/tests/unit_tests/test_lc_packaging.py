from __future__ import annotations

import ast
import tomllib
from pathlib import Path
from typing import Any

import langchain_finch

import finch_rag

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCE = Path(langchain_finch.__file__).parent


def test_the_public_names_are_these() -> None:
    assert langchain_finch.__all__ == [
        "ChatFinch",
        "FinchLLM",
        "FinchReranker",
        "FinchRetriever",
        "create_finch_documents_chain",
    ]
    for name in langchain_finch.__all__:
        assert getattr(langchain_finch, name).__doc__


def test_it_imports_langchain_core_and_no_other_part_of_langchain() -> None:
    imported = set()
    for file in SOURCE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).partition(".")[0])
    assert {name for name in imported if name.startswith("lang")} == {"langchain_core"}
    assert imported & {"finch_rag", "pydantic", "torch", "transformers"} == {"finch_rag", "pydantic"}


def test_types_license_and_readme_go_with_the_package() -> None:
    assert (SOURCE / "py.typed").exists()
    assert (ROOT / "LICENSE").read_bytes() == (ROOT.parents[1] / "LICENSE").read_bytes()
    assert (ROOT / PROJECT["project"]["readme"]).exists()
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["langchain_finch"]


def test_the_distribution_is_of_the_engines_version() -> None:
    assert PROJECT["project"]["name"] == "langchain-finch"
    assert PROJECT["project"]["version"] == finch_rag.__version__
    major, minor, _ = finch_rag.__version__.split(".")
    dependencies = PROJECT["project"]["dependencies"]
    assert f"finch-rag>={major}.{minor},<{major}.{int(minor) + 1}" in dependencies
    assert "langchain-core>=1.2.5,<2" in dependencies
