"""The list of parts (SBOM, CycloneDX) of finch-rag with its extras and integrations, from an environment that has them.

    python -m tests.supply.sbom .venv-runtime/bin/python sbom.json    # or make sbom

cyclonedx-py validates what it writes. Two runs over the same environment write the same bytes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .projects import ROOT, version_of

_DYNAMIC = 'dynamic = ["version"]'


def pyproject_with_version() -> str:
    """The root's pyproject.toml with its version in it, which cyclonedx-py does not look for in the code.

    Raises:
        SystemExit: If it does not say that the code has the version.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if _DYNAMIC not in text:
        raise SystemExit(f"pyproject.toml has no line {_DYNAMIC}: let tests/supply/sbom.py know where the version is")
    return text.replace(_DYNAMIC, f'version = "{version_of(ROOT)}"')


def main(arguments: Sequence[str]) -> None:
    """Writes the list.

    Args:
        arguments: The Python of the environment, and the file to write.

    Raises:
        SystemExit: If cyclonedx-py fails.
    """
    if len(arguments) != 2:
        raise SystemExit("of which environment, and where to? python -m tests.supply.sbom PYTHON FILE")
    environment, out = arguments
    with tempfile.TemporaryDirectory() as folder:
        about = Path(folder) / "pyproject.toml"
        about.write_text(pyproject_with_version(), encoding="utf-8")
        options = ["--pyproject", str(about), "--mc-type", "library", "--output-reproducible", "--validate"]
        command = [sys.executable, "-m", "cyclonedx_py", "environment", *options, "--output-file", out, environment]
        done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(f"cyclonedx-py cannot list the parts of {environment}: see what it says above")


if __name__ == "__main__":
    main(sys.argv[1:])
