"""Builds the distributions twice, in different surroundings, and lets nothing through but what belongs in them.

    python -m tests.supply.release dist [v0.1.0]    # the tag must be the version of all of them

Each is built from two copies of the files that git knows: in folders of different depth, with other times, other
rights, another umask and hash seed, and the second among the litter of a working copy. Where one byte differs, nothing
is written. The build backend is the environment's, so that its version is pinned too.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .projects import PROJECTS, ROOT, project_table, version_of

_LITTER = (".eval/notes.txt", "__pycache__/module.cpython-311.pyc", ".pytest_cache/README.md", "build/old.txt")
_BACKEND_FILES = frozenset(("PKG-INFO", "pyproject.toml", ".gitignore"))  # of every source distribution
_RIGHTS = (0o644, 0o755)  # what files of a distribution may have
_EARLIEST = 315_532_800  # seconds; ZIP knows no time before 1980


def known_to_git() -> list[str]:
    """The files of the repository that git knows, by their paths from its root.

    Raises:
        SystemExit: If this is no clone.
    """
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{ROOT} is no clone of the repository: build a release in one")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def build_twice(project: Path, folder: Path) -> list[Path]:
    """Builds a distribution from two copies, and compares what comes out.

    Args:
        project: Folder of the distribution.
        folder: For copies and outcome; empty.

    Returns:
        Wheel and source distribution.

    Raises:
        SystemExit: If a build fails, or the two differ.
    """
    first = _build(_copy(folder / "a", litter=False), project, folder / "first", umask=0o022, seed="1")
    second = _build(_copy(folder / "b" / "deeper", litter=True), project, folder / "second", umask=0o077, seed="2")
    for one, other in zip_longest(first, second):
        if one is None or other is None or one.name != other.name:
            raise SystemExit(f"two builds of {project.name} made different files: {first}, {second}")
        if one.read_bytes() != other.read_bytes():
            raise SystemExit(
                f"two builds of {one.name} differ: {', '.join(differences(one, other)) or 'in the archive'}"
            )
    return first


def differences(one: Path, other: Path) -> list[str]:
    """The members of two archives that are not alike.

    Args:
        one: A wheel or source distribution.
        other: Another one.
    """
    left, right = dict(members(one)), dict(members(other))
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def members(archive: Path) -> Iterator[tuple[str, tuple[int, float, bytes]]]:
    """The files of a wheel or a source distribution: their names, and their rights, times and contents.

    Args:
        archive: The file.

    Raises:
        SystemExit: If something in it is no plain file.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                time = float("".join(f"{part:02}" for part in info.date_time))
                yield info.filename, ((info.external_attr >> 16) & 0o7777, time, opened.read(info))
        return
    with tarfile.open(archive) as opened_tar:
        for member in opened_tar.getmembers():
            if not member.isfile() or member.uid or member.gid:
                raise SystemExit(f"{archive.name} has {member.name}, which is no plain file of nobody")
            content = opened_tar.extractfile(member)
            yield member.name, (member.mode, float(member.mtime), content.read() if content else b"")


def expected(project: Path, archive: Path, known: Sequence[str]) -> set[str]:
    """The names that an archive has to have, and no others.

    Args:
        project: Folder of the distribution.
        archive: Its wheel or source distribution.
        known: Of `known_to_git`.
    """
    table: dict[str, Any] = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    targets = table["tool"]["hatch"]["build"]["targets"]
    inside = project.relative_to(ROOT).as_posix()
    own = (
        known if inside == "." else [name.removeprefix(f"{inside}/") for name in known if name.startswith(f"{inside}/")]
    )
    if archive.suffix != ".whl":
        top = archive.name.removesuffix(".tar.gz")
        return {f"{top}/{name}" for name in (*_below(targets["sdist"]["include"], own), *_BACKEND_FILES)}
    wheel = targets["wheel"]
    names = _below(wheel.get("packages") or wheel["include"], own)
    for source, place in wheel.get("force-include", {}).items():
        names |= {f"{place}{name.removeprefix(source)}" for name in _below([source], own)}
    info = "-".join(archive.name.split("-")[:2]) + ".dist-info"
    about = {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}
    if "scripts" in table["project"]:
        about.add("entry_points.txt")
    return names | {f"{info}/{name}" for name in about}


def check_contents(project: Path, archive: Path, known: Sequence[str]) -> None:
    """Raises where an archive lacks something, has something else, or a file with odd rights.

    Args:
        project: Folder of the distribution.
        archive: Its wheel or source distribution.
        known: Of `known_to_git`.

    Raises:
        SystemExit: With the names.
    """
    found = dict(members(archive))
    wanted = expected(project, archive, known)
    if missing := sorted(wanted - found.keys()):
        raise SystemExit(f"{archive.name} lacks {', '.join(missing)}")
    if more := sorted(found.keys() - wanted):
        raise SystemExit(f"{archive.name} has {', '.join(more)}, which git does not know or nobody should get")
    if odd := sorted(name for name, (rights, *_) in found.items() if rights not in _RIGHTS):
        raise SystemExit(f"{archive.name} has files that not all may read, or some may write: {', '.join(odd)}")


def check_tag(tag: str) -> None:
    """Raises where a tag does not say the version of every distribution.

    Args:
        tag: Such as "v0.1.0".

    Raises:
        SystemExit: With the versions.
    """
    versions = {project_table(folder)["name"]: version_of(folder) for folder in PROJECTS}
    if wrong := [f"{name} {version}" for name, version in versions.items() if tag != f"v{version}"]:
        raise SystemExit(f"the tag is {tag}, but the code says {', '.join(wrong)}: change one of them")


def _below(places: Sequence[str], names: Sequence[str]) -> set[str]:
    """The names that are one of some places, or below one."""
    cleaned = [place.strip("/") for place in places]
    return {name for name in names if any(name == place or name.startswith(f"{place}/") for place in cleaned)}


def _copy(place: Path, *, litter: bool) -> Path:
    """A copy of all files that git knows; with litter, also what lies about where somebody works, and other times."""
    for name in known_to_git():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, place / name)
    if litter:
        packages = {file.parent for file in place.rglob("py.typed")}
        for name in (f"{folder}/{part}" for folder in (place, place / "tests", *packages) for part in _LITTER):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text("litter", encoding="utf-8")
        for file in place.rglob("*"):
            os.utime(file, (_EARLIEST, _EARLIEST))
            if file.is_file():
                file.chmod(0o600)
    return place


def _build(copy: Path, project: Path, out: Path, *, umask: int, seed: str) -> list[Path]:
    """The wheel, made from the source distribution, and that."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), "."]
    environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": f"UTC{seed}"}
    place = copy / project.relative_to(ROOT)
    done = subprocess.run(command, cwd=place, umask=umask, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"building {project.name} fails: {(done.stderr or done.stdout).strip()[-500:]}")
    return sorted(out.iterdir(), key=lambda file: file.suffix)


def main(arguments: Sequence[str]) -> None:
    """Builds, checks and writes all distributions.

    Args:
        arguments: The folder to write to, and the tag of the release if there is one.
    """
    if not 1 <= len(arguments) <= 2:
        raise SystemExit("where to? python -m tests.supply.release FOLDER [TAG]")
    for tag in arguments[1:]:
        check_tag(tag)
    out, known = Path(arguments[0]), known_to_git()
    with tempfile.TemporaryDirectory() as folder:
        built = []
        for place, project in enumerate(PROJECTS):
            archives = build_twice(project, Path(folder) / str(place))
            for archive in archives:
                check_contents(project, archive, known)
            built += archives
        out.mkdir(parents=True, exist_ok=True)
        for archive in built:
            shutil.copyfile(archive, out / archive.name)
            sys.stdout.write(f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  {archive.name}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
