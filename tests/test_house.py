"""The house: each room imports only from those before it, and no module takes part in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import finch_rag
from finch_rag import adapters
from finch_rag.house import ROOMS, imports_of, room_of

PACKAGE = Path(finch_rag.__file__).parent
ROOT = PACKAGE.parent
INTEGRATIONS = sorted((ROOT / "integrations").glob("*/l*/**/*.py"))


@pytest.fixture(scope="module")
def imports() -> Mapping[str, set[str]]:
    return imports_of(PACKAGE)


def test_every_module_is_in_a_room(imports: Mapping[str, set[str]]) -> None:
    assert {room_of(module) for module in imports} <= set(ROOMS)
    assert len(imports) > 80


def test_a_room_imports_only_from_those_before_it(imports: Mapping[str, set[str]]) -> None:
    order = list(ROOMS)
    wrong = [
        f"{module} -> {imported}"
        for module, found in imports.items()
        for imported in found
        if order.index(room_of(imported)) > order.index(room_of(module))
    ]
    assert wrong == []


def test_there_is_no_circle(imports: Mapping[str, set[str]]) -> None:
    try:
        order = list(TopologicalSorter(imports).static_order())
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))
    assert set(order) == set(imports)


def test_circles_and_type_checking_imports_are_seen(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").touch()
    (tmp_path / "a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import x\n")
    (tmp_path / "b.py").write_text("def x():\n    from . import a\n")
    found = imports_of(tmp_path)
    assert found == {"a": {"b"}, "b": {"a"}}
    with pytest.raises(CycleError):
        list(TopologicalSorter(found).static_order())


def test_contributing_shows_the_order() -> None:
    shown = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    places = [shown.index(f"\n    {room} ") for room in ROOMS if room]
    assert places == sorted(places)


def test_a_command_draws_the_house() -> None:
    drawn = subprocess.run([sys.executable, "-m", "finch_rag.house"], capture_output=True, text=True, check=True).stdout
    for room in ROOMS:
        assert f"\n{room} " in f"\n{drawn}"
    assert "no circle" in drawn


def core_imports(file: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "finch_rag":
            for name in node.names:
                yield str(node.module), name.name
        elif isinstance(node, ast.Import):
            yield from (("", name.name) for name in node.names if name.name.split(".")[0] == "finch_rag")


@pytest.mark.parametrize("file", INTEGRATIONS, ids=lambda file: file.name)
def test_integrations_import_public_names_only(file: Path) -> None:
    public = {"finch_rag": finch_rag.__all__, "finch_rag.adapters": adapters.__all__}
    assert [found for found in core_imports(file) if found[1] not in public.get(found[0], ())] == []


def test_there_are_integrations_to_look_at() -> None:
    assert sum(bool(list(core_imports(file))) for file in INTEGRATIONS) >= 8


@pytest.mark.parametrize("name", adapters.__all__)
def test_a_public_name_for_adapters_is_there(name: str) -> None:
    assert hasattr(adapters, name)
