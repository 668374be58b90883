"""Every file that constraints.txt may bring, by its SHA-256: requirements-hashed.txt, written and tried.

    python -m tests.supply.hashes write    # asks the index for the hashes of all files of all pins; needs uv
    python -m tests.supply.hashes check    # downloads what this machine would install, and lets pip compare

requirements-release.txt is the part of it that builds and checks a release, with all that it needs.

torch is left aside. Users choose its build (for the CPU, or a release of CUDA), builds of one version have different
hashes, and most of them do not come from PyPI: on machines that have it on disk, as on the one that CI runs on, PyPI's
hashes would refuse it. So it is installed before the rest, from an index that the user trusts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .projects import ROOT, normalised, pins, stated

CONSTRAINTS = ROOT / "constraints.txt"
HASHED = ROOT / "requirements-hashed.txt"
RELEASE = ROOT / "requirements-release.txt"
ASIDE = frozenset(("torch",))  # see above

_HEADERS = {
    HASHED: """\
# constraints.txt with the hashes of all files that PyPI has of each version. Made by `make lock`, tried by
# `make hashes`. It leaves torch aside, whose builds differ by machine: install that first, then
#     pip install --require-hashes --no-deps -r requirements-hashed.txt
# --no-deps, because torch is not in it; all else that anything in it needs is.
""",
    RELEASE: """\
# What builds and checks a release (pyproject.toml's extra "release"), with all that it needs on Linux with Python 3.11:
# the part of requirements-hashed.txt that `make dist` installs. Made by `make lock`.
""",
}


def hashes_of(text: str) -> dict[str, frozenset[str]]:
    """The SHA-256 sums that a file of hashed requirements allows, by normalised name.

    Args:
        text: Of the file, a requirement with its hashes on lines that end in a backslash.
    """
    found: dict[str, frozenset[str]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if line[:1].isalnum():
            pin, *options = line.split()
            sums = frozenset(option.removeprefix("--hash=sha256:") for option in options)
            found[normalised(pin.partition("==")[0])] = sums
    return found


def compiled(file: Path) -> str:
    """The content of a file of hashed requirements, as the index has it now.

    Args:
        file: `HASHED` or `RELEASE`.

    Raises:
        SystemExit: If uv is missing or fails, or the index has no hash of a pin.
    """
    options = ["--generate-hashes", "--no-annotate", "--no-header", "--no-config", "--quiet"]
    if file == HASHED:
        options += ["--no-deps", *(option for name in sorted(ASIDE) for option in ("--no-emit-package", name))]
        asked, wanted = CONSTRAINTS.read_text(encoding="utf-8"), {*pins(CONSTRAINTS)} - ASIDE
    else:
        options += ["--python-version", "3.11", "--constraints", str(CONSTRAINTS)]
        tools = [requirement for extra, requirement in stated(ROOT) if extra == "release"]
        asked, wanted = "\n".join(map(str, tools)), {normalised(tool.name) for tool in tools}
    done = _run([sys.executable, "-m", "uv", "pip", "compile", *options, "-"], asked)
    if done.returncode:
        raise SystemExit(f"uv cannot write {file.name}: {_last_line(done.stderr)}; `make lock` installs it")
    text = done.stdout.partition("\n# The following")[0].rstrip()
    if missing := wanted - {name for name, sums in hashes_of(text).items() if sums}:
        raise SystemExit(f"the index has no hash of {', '.join(sorted(missing))}: pin versions that it has")
    return f"{_HEADERS[file]}{text}\n"


def download(requirements: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Downloads requirements as pip does when it insists on hashes.

    Args:
        requirements: Content of a requirements file.
        folder: Where the files go.
        options: More options of ``pip download``.
    """
    listed = folder / "requirements.txt"
    listed.write_text(requirements, encoding="utf-8")
    asked = ["--require-hashes", "--no-deps", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    return _run([sys.executable, "-m", "pip", "download", *asked, *options, "--requirement", str(listed)])


def part_of(text: str, names: Sequence[str]) -> str:
    """The requirements of some packages.

    Args:
        text: Of requirements-hashed.txt.
        names: Normalised names.
    """
    lines = text.replace("\\\n", " ").splitlines()
    return "".join(f"{line}\n" for line in lines if normalised(line.partition("==")[0]) in names)


def _check() -> None:
    with tempfile.TemporaryDirectory() as folder:
        done = download(HASHED.read_text(encoding="utf-8"), Path(folder))
        files = [file for file in Path(folder).iterdir() if file.suffix != ".txt"]
        if done.returncode:
            raise SystemExit(f"a file is not what requirements-hashed.txt says: {_last_line(done.stderr)}")
        size = sum(file.stat().st_size for file in files) / 2**20
        sys.stdout.write(f"{len(files)} files, {size:,.0f} MiB, have the hashes of requirements-hashed.txt\n")


def _run(command: Sequence[str], told: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=told, capture_output=True, text=True, check=False)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it says nothing"


def main(arguments: Sequence[str]) -> None:
    """Writes both files, or tries requirements-hashed.txt.

    Args:
        arguments: "write" or "check".
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("what", choices=("write", "check"))
    if parser.parse_args(arguments).what == "write":
        for file in (HASHED, RELEASE):
            file.write_text(compiled(file), encoding="utf-8")
    else:
        _check()


if __name__ == "__main__":
    main(sys.argv[1:])
