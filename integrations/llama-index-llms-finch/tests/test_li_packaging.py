from __future__ import annotations

import importlib
import tomllib
from pathlib import Path
from typing import Any

import llama_index.core
import llama_index.llms.finch as package

import finch_rag

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCE = Path(package.__file__).parent


def test_the_public_names_are_these() -> None:
    assert package.__all__ == ["FinchLLM", "FinchRerank", "FinchRetriever", "FinchSynthesizer", "PassagesMessage"]
    for name in package.__all__:
        assert getattr(package, name).__doc__


def test_llamahub_finds_every_class_that_it_is_told_of() -> None:
    hub = PROJECT["tool"]["llamahub"]
    module = importlib.import_module(hub["import_path"])
    assert module is package
    named = {*hub["class_authors"], *hub["secondary_class_authors"]}
    assert named == {name for name in package.__all__ if name.startswith("Finch")}


def test_namespaces_that_many_distributions_share_have_no_module_of_their_own() -> None:
    assert SOURCE == ROOT / "llama_index" / "llms" / "finch"
    assert list((ROOT / "llama_index").glob("*.py")) == list((ROOT / "llama_index" / "llms").glob("*.py")) == []
    assert Path(llama_index.core.__file__).parent.parent != ROOT / "llama_index"


def test_types_license_and_readme_go_with_the_package() -> None:
    assert (SOURCE / "py.typed").exists()
    assert (ROOT / "LICENSE").read_bytes() == (ROOT.parents[1] / "LICENSE").read_bytes()
    assert (ROOT / PROJECT["project"]["readme"]).exists()
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["include"] == ["/llama_index/"]


def test_the_distribution_is_of_the_engines_version() -> None:
    assert PROJECT["project"]["name"] == "llama-index-llms-finch"
    assert PROJECT["project"]["version"] == finch_rag.__version__
    major, minor, _ = finch_rag.__version__.split(".")
    assert f"finch-rag>={major}.{minor},<{major}.{int(minor) + 1}" in PROJECT["project"]["dependencies"]
