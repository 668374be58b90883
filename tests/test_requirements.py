"""What pyproject.toml asks for: bounds, the versions that are pinned, and that it names all that is imported."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.supply.projects import PROJECTS, ROOT, TOOL_EXTRAS, normalised, pins, project_table, stated, used

UNBOUNDED = frozenset(("filelock", "typing-extensions"))  # pyproject.toml says why
# Imported, but brought along by what is named: by transformers, by ray[data], by an adapter's own engine.
BROUGHT = frozenset(("tokenizers", "pyarrow", "triton"))
PEERS = frozenset(("kvpress", "llmlingua"))  # of `make bench-peers`, which has requirements of its own
PACKAGES = {
    "finch-rag": ROOT / "finch_rag",
    "langchain-finch": ROOT / "integrations" / "langchain-finch" / "langchain_finch",
    "llama-index-llms-finch": ROOT / "integrations" / "llama-index-llms-finch" / "llama_index",
}


def upper_bounded(requirement: Requirement) -> bool:
    return any(specifier.operator in ("<", "<=", "==", "~=") for specifier in requirement.specifier)


@pytest.mark.parametrize("name", sorted(used().keys() - UNBOUNDED))
def test_a_major_that_may_break_is_kept_out(name: str) -> None:
    assert [str(found) for found in used()[name] if not upper_bounded(found)] == []


def test_what_has_no_bound_is_meant() -> None:
    assert {name for name, found in used().items() if not all(map(upper_bounded, found))} == UNBOUNDED


@pytest.mark.parametrize("folder", PROJECTS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("file", ["constraints.txt", "constraints-lowest.txt"])
def test_what_is_pinned_is_what_is_asked_for(folder: Path, file: str) -> None:
    pinned = pins(ROOT / file)
    # Neither `make test-lowest` nor what it pins has these extras.
    left_out = {"quantised", "ray", "release", "test"} if file == "constraints-lowest.txt" else set()
    own = {normalised(project_table(project)["name"]) for project in PROJECTS}
    for extra, requirement in stated(folder):
        if extra not in left_out and normalised(requirement.name) not in own:
            version = pinned.get(normalised(requirement.name))
            assert requirement.specifier.contains(version or ""), f"{requirement}: {file} has {version}"


def imported(package: Path) -> set[str]:
    found = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    return found - sys.stdlib_module_names - {"finch_rag"} - PEERS - BROUGHT


@pytest.mark.parametrize("folder", PROJECTS, ids=lambda folder: folder.name)
def test_whatever_is_imported_is_asked_for(folder: Path) -> None:
    name = project_table(folder)["name"]
    asked = {normalised(requirement.name) for extra, requirement in stated(folder) if extra not in TOOL_EXTRAS}
    if name != "finch-rag":  # an adapter may use what the engine cannot do without
        asked |= {normalised(requirement.name) for extra, requirement in stated(ROOT) if not extra}
    brought_by = packages_distributions()
    missing = {
        module
        for module in imported(PACKAGES[name])
        if asked.isdisjoint({normalised(module), *map(normalised, brought_by.get(module, ()))})
    }
    assert missing == set()
