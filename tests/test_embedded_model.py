"""The embedded model's conversion into a folder that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finch_rag.errors import FinchError, ModelError
from finch_rag.models import embedded as module
from finch_rag.models.embedded import embedded_folder
from finch_rag.models.loading import load_model

from .crafted import DEEP
from .small import CONVERTS


def conversion(folder: Path) -> Path:
    """A folder that looks like a conversion."""
    folder.mkdir(exist_ok=True)
    for name in module._NEEDED:
        (folder / name).write_bytes(b"abc")
    checksums = {name: module.sha256(folder / name) for name in module._NEEDED}
    (folder / "finch-manifest.json").write_text(json.dumps(checksums))
    return folder


def test_a_folder_is_intact_only_while_every_file_is_as_it_was_written(tmp_path: Path) -> None:
    folder = conversion(tmp_path / "model")
    assert module.is_intact(folder)
    for name in module._NEEDED:
        (folder / name).write_bytes(b"abd")
        assert not module.is_intact(folder)
        (folder / name).unlink()
        assert not module.is_intact(folder)
        conversion(folder)
    (folder / "finch-manifest.json").unlink()
    assert not module.is_intact(folder)
    assert not module.is_intact(tmp_path / "missing")


MANIFESTS = ["", "[]", "7", "{", "{}", "null", DEEP, '{"config.json": ' + DEEP + "}", "{" + " " * 2**21 + "}"]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest[:9])
def test_a_damaged_manifest_is_not_intact(tmp_path: Path, manifest: str) -> None:
    (conversion(tmp_path) / "finch-manifest.json").write_text(manifest)
    assert not module.is_intact(tmp_path)


@pytest.mark.parametrize("name", ["../weights", "/dev/zero", "folder", "\0", "x" * 5000])
def test_a_manifest_that_names_other_files_is_not_intact(tmp_path: Path, name: str) -> None:
    file = conversion(tmp_path / "model") / "finch-manifest.json"
    (tmp_path / "model" / "folder").mkdir()
    (tmp_path / "weights").write_bytes(b"abc")
    known = json.loads(file.read_text())
    file.write_text(json.dumps({**known, name: known["config.json"]}))
    assert not module.is_intact(tmp_path / "model")


def test_a_transformers_that_misreads_the_tokenizer_converts_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "version", lambda name: "5.5.4")
    with pytest.raises(ModelError, match=r"^transformers 5\.5\.4 misreads .*: install transformers>=5\.6 \(once"):
        module.convert_gguf(tmp_path / "x.gguf", tmp_path / "folder")
    monkeypatch.setattr(module, "version", lambda name: "5.10.0rc1")
    with pytest.raises(Exception, match=r"x\.gguf"):  # it goes on to the file, which is missing
        module.convert_gguf(tmp_path / "x.gguf", tmp_path / "folder")


@pytest.mark.embedded
def test_the_converted_tokenizer_gives_back_what_it_read() -> None:
    tokenizer = load_model("embedded").tokenizer
    text = "The ferry of 1874 ? A naïve café.\n\n東京"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text) == ids  # nothing is put before it


@pytest.mark.embedded
def test_the_embedded_model_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded_folder()

    def again(*_: Any) -> None:
        raise FinchError("converted again")

    monkeypatch.setattr(module, "convert_gguf", again)
    assert embedded_folder() == folder
    assert load_model("embedded").name == "SmolLM2-135M-Instruct"


@CONVERTS
@pytest.mark.slow
@pytest.mark.embedded
def test_a_damaged_conversion_is_made_again_once_by_two_processes(tmp_path: Path) -> None:
    good = embedded_folder()
    copy = tmp_path / "finch-rag" / "models" / good.name
    shutil.copytree(good, copy)
    weights = copy / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\xff" * 100)
    assert not module.is_intact(copy)

    code = "import finch_rag.models.embedded as m; f = m.embedded_folder(); print(f, m.is_intact(f))"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    ends = [process.communicate(timeout=240) for process in both]
    assert [out.strip().splitlines()[-1:] for out, _ in ends] == [[f"{copy} True"]] * 2, ends
    assert sum(err.count("converting the embedded model") for _, err in ends) == 1
    assert module.sha256(weights) == module.sha256(good / "model.safetensors")


@pytest.mark.embedded
def test_a_cache_folder_that_cannot_be_written_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "cache"
    blocked.write_text("a file where a folder is needed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(ModelError, match="XDG_CACHE_HOME"):
        embedded_folder()
