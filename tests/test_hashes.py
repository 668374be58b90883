"""requirements-hashed.txt is constraints.txt with hashes, and pip takes a file by its hash alone."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.supply.hashes import ASIDE, CONSTRAINTS, HASHED, RELEASE, download, hashes_of, part_of
from tests.supply.projects import ROOT, normalised, pins, stated

NO_INDEX = re.compile(
    r"name resolution|resolve host|Failed to resolve|ConnectionError|Connection (refused|reset|aborted|broken)|"
    r"Max retries|timed out|ProxyError|from versions: none",
    re.IGNORECASE,
)
SMALL = ("filelock", "jinja2", "markupsafe")


@pytest.mark.parametrize("file", [HASHED, RELEASE], ids=lambda file: file.name)
def test_every_file_has_a_sum(file: Path) -> None:
    found = hashes_of(file.read_text(encoding="utf-8"))
    assert [name for name, sums in found.items() if not sums] == []
    assert all(re.fullmatch("[0-9a-f]{64}", one) for sums in found.values() for one in sums)


def test_all_that_is_pinned_has_hashes_but_torch() -> None:
    pinned = {name: version for name, version in pins(CONSTRAINTS).items() if name not in ASIDE}
    assert pins(HASHED) == pinned, "constraints.txt has changed: run `make lock`"
    assert pinned.keys() < pins(CONSTRAINTS).keys()


def test_a_release_is_built_by_what_is_pinned() -> None:
    tools = {normalised(requirement.name) for extra, requirement in stated(ROOT) if extra == "release"}
    built_by = pins(RELEASE)
    assert tools <= built_by.keys(), "pyproject.toml has changed: run `make lock`"
    hashed = hashes_of(HASHED.read_text(encoding="utf-8"))
    for name, sums in hashes_of(RELEASE.read_text(encoding="utf-8")).items():
        if name != "pip":  # pip is there before anything is pinned
            assert pins(HASHED)[name] == built_by[name]
            assert sums == hashed[name]


def test_pip_takes_a_file_by_its_hash_and_no_other(tmp_path: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip")
    listed = part_of(HASHED.read_text(encoding="utf-8"), SMALL)
    patience = ("--retries", "0", "--timeout", "20", "--no-cache-dir")
    right = download(listed, tmp_path, *patience)
    if right.returncode and NO_INDEX.search(right.stderr) and "HASHES" not in right.stderr:
        pytest.skip(f"no package index can be reached, so no hash was tried: {right.stderr.strip().splitlines()[-1]}")
    assert right.returncode == 0, right.stderr
    assert len([*tmp_path.glob("*.whl")]) == len(SMALL)
    forged = re.sub(r"sha256:[0-9a-f]{8}", "sha256:00000000", part_of(listed, SMALL[:1]))
    for file in tmp_path.iterdir():
        file.unlink()
    wrong = download(forged, tmp_path, *patience)
    assert wrong.returncode != 0
    assert "DO NOT MATCH THE HASHES" in wrong.stderr
    assert not [*tmp_path.glob("*.whl")]
