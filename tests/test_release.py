"""Releases: each distribution built twice, the same to the byte, with what belongs in it; and the workflow's rights."""

from __future__ import annotations

import importlib.util
import io
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import finch_rag
from tests.supply.projects import PROJECTS, ROOT, project_table, version_of
from tests.supply.release import build_twice, check_contents, check_tag, differences, known_to_git, members
from tests.supply.sbom import pyproject_with_version

WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
IN_A_CLONE = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="not a clone: only git knows what belongs in a release"
)
BUILDS = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("build", "hatchling")),
    reason="build or hatchling is missing: make setup installs them",
)
MUST_HAVE = {
    "finch-rag": (
        "finch_rag/py.typed",
        "finch_rag/heads/shipped/fb2fd1b545549a71.json",
        "finch_rag/quotes/shipped/fb2fd1b545549a71.json",
        "finch_rag/example_corpus/questions.jsonl",
        "licenses/LICENSE",
    ),
    "langchain-finch": ("langchain_finch/py.typed", "licenses/LICENSE"),
    "llama-index-llms-finch": ("llama_index/llms/finch/py.typed", "licenses/LICENSE"),
}


@IN_A_CLONE
@BUILDS
@pytest.mark.slow
@pytest.mark.parametrize("project", PROJECTS, ids=lambda folder: folder.name)
def test_two_builds_are_the_same_and_have_what_they_must(project: Path, tmp_path: Path) -> None:
    source, wheel = build_twice(project, tmp_path)
    assert (source.suffixes[-2:], wheel.suffix) == ([".tar", ".gz"], ".whl")
    for archive in (source, wheel):
        check_contents(project, archive, known_to_git())
    names = [name for name, _ in members(wheel)]
    for wanted in MUST_HAVE[project_table(project)["name"]]:
        assert any(name.endswith(wanted) for name in names), wanted
    packed = dict(members(source))
    top = source.name.removesuffix(".tar.gz")
    assert packed[f"{top}/LICENSE"][2] == (ROOT / "LICENSE").read_bytes()
    assert not [name for name in packed if re.search(r"__pycache__|\.eval|\.pytest_cache|\.pyc$|/build/", name)]


def wheel_of(folder: Path, files: dict[str, tuple[int, bytes]]) -> Path:
    made = folder / "langchain_finch-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for name, (rights, content) in files.items():
            info = zipfile.ZipInfo(name, (2020, 2, 2, 0, 0, 0))
            info.external_attr = rights << 16
            archive.writestr(info, content)
    return made


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"langchain_finch/__pycache__/a.pyc": (0o644, b"")}, "has langchain_finch/__pycache__/a.pyc"),
        ({".eval/notes.txt": (0o644, b"")}, "has .eval/notes.txt"),
        ({"langchain_finch/py.typed": None}, "lacks langchain_finch/py.typed"),
        ({"langchain_finch-0.1.0.dist-info/licenses/LICENSE": None}, "lacks .*LICENSE"),
        ({"langchain_finch/py.typed": (0o600, b"")}, "files that not all may read"),
        ({"langchain_finch/py.typed": (0o666, b"")}, "some may write"),
    ],
)
def test_a_wheel_has_what_it_must_and_nothing_else(
    tmp_path: Path, change: dict[str, tuple[int, bytes] | None], said: str | None
) -> None:
    known = ["integrations/langchain-finch/langchain_finch/py.typed", "integrations/langchain-finch/tests/test_a.py"]
    info = "langchain_finch-0.1.0.dist-info"
    names = ["langchain_finch/py.typed", *(f"{info}/{n}" for n in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE"))]
    files = dict.fromkeys(names, (420, b"")) | change
    wheel = wheel_of(tmp_path, {name: file for name, file in files.items() if file is not None})
    project = ROOT / "integrations" / "langchain-finch"
    if said is None:
        check_contents(project, wheel, known)
        return
    with pytest.raises(SystemExit, match=said):
        check_contents(project, wheel, known)


def test_differences_are_named(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    same, changed = (0o644, b"same"), (0o644, b"other")
    one = wheel_of(folders[0], {"a": same, "b": same, "c": same, "d": same})
    other = wheel_of(folders[1], {"a": same, "b": changed, "c": (0o600, b"same"), "e": same})
    assert differences(one, other) == ["b", "c", "d", "e"]
    assert differences(one, one) == []


def test_no_link_and_no_owner_comes_along(tmp_path: Path) -> None:
    odd_ones: list[dict[str, Any]] = [{"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, {"uid": 1000}]
    for number, odd in enumerate(odd_ones):
        made = tmp_path / f"{number}.tar.gz"
        with tarfile.open(made, "w:gz") as archive:
            member = tarfile.TarInfo("odd")
            for name, value in odd.items():
                setattr(member, name, value)
            archive.addfile(member, io.BytesIO())
        with pytest.raises(SystemExit, match="no plain file of nobody"):
            list(members(made))


def test_a_tag_is_the_version_of_all() -> None:
    assert {version_of(folder) for folder in PROJECTS} == {finch_rag.__version__}
    check_tag(f"v{finch_rag.__version__}")
    with pytest.raises(SystemExit, match="langchain-finch"):
        check_tag("v9.9.9")


def test_the_list_of_parts_has_the_version() -> None:
    assert f'version = "{finch_rag.__version__}"' in pyproject_with_version()


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    return loaded


def test_the_workflow_has_no_more_rights_than_each_job_needs(workflow: dict[Any, Any]) -> None:
    assert workflow["permissions"] == {}
    assert {name: job["permissions"] for name, job in workflow["jobs"].items()} == {
        "build": {"contents": "read"},
        "attest": {"id-token": "write", "attestations": "write"},
        "publish": {"id-token": "write"},
    }
    assert [*workflow[True]] == ["push"]  # YAML reads "on" as true
    assert [*workflow[True]["push"]] == ["tags"]
    assert workflow["jobs"]["publish"]["needs"] == "attest"
    assert workflow["jobs"]["attest"]["needs"] == "build"


def test_nothing_that_is_built_can_publish(workflow: dict[Any, Any]) -> None:
    """The job that runs the repository's code has no identity; those that have one run none of it."""
    for name, job in workflow["jobs"].items():
        runs = [step for step in job["steps"] if "run" in step]
        assert bool(runs) is (name == "build")
    assert "secrets." not in WORKFLOW.read_text(encoding="utf-8")


def test_actions_are_pinned_to_full_versions(workflow: dict[Any, Any]) -> None:
    used = [step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert len(used) >= 6
    assert [name for name in used if not re.fullmatch(r"[\w-]+/[\w-]+@(v\d+\.\d+\.\d+|[0-9a-f]{40})", name)] == []


def test_what_the_workflow_runs_is_in_the_makefile(workflow: dict[Any, Any]) -> None:
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands == ['make dist TAG="$GITHUB_REF_NAME"']
    shown = subprocess.run(
        ["make", "--dry-run", "dist", "TAG=v1.2.3"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "-m tests.supply.release dist v1.2.3" in shown
    assert "--require-hashes" in shown or (ROOT / ".venv-release" / ".installed").exists()
