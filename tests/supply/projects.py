"""The distributions of this repository, and what users of them install; run as a module, it lists that for pip."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECTS = (ROOT, *sorted(file.parent for file in (ROOT / "integrations").glob("*/pyproject.toml")))

# Extras for those who work on the repository, or on its notebooks: nobody who uses the package needs them.
TOOL_EXTRAS = frozenset(("dev", "examples", "release", "test"))


def normalised(name: str) -> str:
    """A distribution's name as indexes compare it: in small letters, with hyphens.

    Args:
        name: As anybody writes it.
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def project_table(folder: Path) -> dict[str, Any]:
    """The table ``project`` of a distribution's pyproject.toml.

    Args:
        folder: Of the distribution.
    """
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def version_of(folder: Path) -> str:
    """The version of a distribution, which pyproject.toml or the package itself says.

    Args:
        folder: Of the distribution.
    """
    named: str | None = project_table(folder).get("version")
    if named is not None:
        return named
    lines = (folder / "finch_rag" / "__init__.py").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("__version__")).split('"')[1]


def stated(folder: Path) -> Iterator[tuple[str, Requirement]]:
    """All that a distribution's pyproject.toml asks for, with the extra that asks ("" for the package itself).

    Args:
        folder: Of the distribution.
    """
    table = project_table(folder)
    for extra, lines in {"": table["dependencies"], **table.get("optional-dependencies", {})}.items():
        for line in lines:
            yield extra, Requirement(line)


def used() -> dict[str, list[Requirement]]:
    """What users of the distributions install beside them, by normalised name; the repository's own are left out."""
    own = {normalised(project_table(folder)["name"]) for folder in PROJECTS}
    found: dict[str, list[Requirement]] = {}
    for folder in PROJECTS:
        for extra, requirement in stated(folder):
            if extra not in TOOL_EXTRAS and normalised(requirement.name) not in own:
                found.setdefault(normalised(requirement.name), []).append(requirement)
    return dict(sorted(found.items()))


def pins(file: Path) -> dict[str, str]:
    """The versions of a constraints file, by normalised name.

    Args:
        file: With a line "name==version" a package; what follows behind a space is left aside, comments too.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    pairs = (line.split()[0].partition("==") for line in lines if line[:1].isalnum())
    return {normalised(name): version for name, _, version in pairs}


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in sorted({str(found) for group in used().values() for found in group}))
