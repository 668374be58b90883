"""What processes leave that are killed while they write: removed at the next start, never that of one that lives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finch_rag import Finch, paths
from finch_rag.paths import making, remove_leftovers, replacing, write_atomically

from .test_store import HEADS, new_finch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs locks of folders, and SIGKILL")

WRITES = """
import sys, time
from pathlib import Path
from finch_rag.paths import making, replacing
place = Path(sys.argv[1])
with (making if sys.argv[2] == "folder" else replacing)(place) as new:
    file = new / "weights" if sys.argv[2] == "folder" else new
    file.write_bytes(b"half")
    (file.parent / ".tmpAbCdEf").write_bytes(b"what safetensors was writing")
    print("ready", flush=True)
    time.sleep(300)
"""


@contextmanager
def writing(place: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has written half of what belongs at a place."""
    process = subprocess.Popen([sys.executable, "-c", WRITES, str(place), kind], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_a_killed_process_left_goes_and_what_a_living_one_makes_stays(tmp_path: Path, kind: str) -> None:
    with writing(tmp_path / "killed", kind) as killed, writing(tmp_path / "living", kind):
        assert len(names(tmp_path)) == 2
        remove_leftovers(tmp_path)
        assert len(names(tmp_path)) == 2
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        write_atomically(tmp_path / "other", "text")
        assert [name.split(".")[1] for name in names(tmp_path) if name.startswith(".")] == ["living"]
        long_ago = time.time() - 30 * 24 * 3600
        (left,) = (path for path in tmp_path.iterdir() if path.name.startswith("."))
        os.utime(left, (long_ago, long_ago))
        remove_leftovers(tmp_path)  # its maker lives, however long it takes
        assert left.exists()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["other"]


def test_what_another_machine_makes_stays_for_a_day(tmp_path: Path) -> None:
    foreign = tmp_path / ".cache.0badcafe.17.0123abcd"
    foreign.mkdir()
    (foreign / "half").write_text("half")
    assert paths._machine() != "0badcafe"
    remove_leftovers(tmp_path)
    assert foreign.exists()
    a_day_ago = time.time() - 25 * 3600
    os.utime(foreign, (a_day_ago, a_day_ago))
    remove_leftovers(tmp_path)
    assert not foreign.exists()


def test_a_process_id_that_is_in_use_again_keeps_nothing(tmp_path: Path) -> None:
    left = tmp_path / f".cache.{paths._machine()}.{os.getpid()}.0123abcd"  # nobody has it locked
    left.mkdir()
    remove_leftovers(tmp_path)
    assert not left.exists()


def test_where_folders_cannot_be_locked_what_is_new_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "_locked", lambda folder: None)
    with making(tmp_path / "file") as new:
        remove_leftovers(tmp_path)
        assert new.is_dir()
    left = tmp_path / f".cache.{paths._machine()}.17.0123abcd"
    left.mkdir()
    remove_leftovers(tmp_path)
    assert left.exists()
    a_day_ago = time.time() - 25 * 3600
    os.utime(left, (a_day_ago, a_day_ago))
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_other_files_stay(tmp_path: Path, private_cache: Path) -> None:
    a_month_ago = time.time() - 30 * 24 * 3600
    kept = [
        ".bashrc",
        ".config.1.2",
        "notes.0badcafe.17.0123abcd",
        ".tmpAbCdEf",
        "tmpabcd1234",
        ".x.17.0123abcd",
        "file",
    ]
    for name in kept:
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (a_month_ago, a_month_ago))
    (tmp_path / ".link.0badcafe.17.0123abcd").symlink_to(tmp_path / "file")
    remove_leftovers(tmp_path)
    assert set(kept) <= set(names(tmp_path))
    remove_leftovers(tmp_path / "missing")
    cache = private_cache / "models"  # a folder of finch-rag's own: what earlier releases left goes too
    cache.mkdir(parents=True)
    for name in kept:
        (cache / name).write_text("x")
        os.utime(cache / name, (a_month_ago, a_month_ago))
    (cache / "tmpnew12345").mkdir()
    remove_leftovers(cache)
    assert names(cache) == [".bashrc", ".config.1.2", "file", "notes.0badcafe.17.0123abcd", "tmpnew12345"]


def test_a_link_in_a_leftover_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    left = tmp_path / f".cache.{paths._machine()}.17.0123abcd"
    left.mkdir()
    (left / "link").symlink_to(tmp_path / "precious")
    remove_leftovers(tmp_path)
    assert not left.exists()
    assert (tmp_path / "precious" / "file").read_text() == "x"


def test_many_threads_replace_one_file(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def write(number: int) -> None:
        write_atomically(tmp_path / "file", json.dumps([number] * 1000))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(200)))
    assert len(set(json.loads((tmp_path / "file").read_text()))) == 1
    assert names(tmp_path) == ["file"]


CONVERTS = """
import sys, time
from pathlib import Path
from finch_rag.models import embedded

class Slow:
    def save_pretrained(self, folder):
        (folder / "model.safetensors").write_bytes(bytes(1000))
        print("ready", flush=True)
        time.sleep(300)

folder = embedded.cache_folder("models") / "model"
folder.parent.mkdir(parents=True, exist_ok=True)
embedded.put_in_place(Slow(), Slow(), folder)
"""


def test_a_killed_conversion_is_removed_by_the_next_one(private_cache: Path) -> None:
    from .test_full_disk import write_conversion

    environment = {**os.environ, "XDG_CACHE_HOME": str(private_cache.parent)}
    process = subprocess.Popen([sys.executable, "-c", CONVERTS], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(names(private_cache / "models")) == 1
    write_conversion(private_cache.parent, "new")
    assert [name for name in names(private_cache / "models") if not name.endswith(".lock")] == ["model-0-2"]


@pytest.fixture(scope="module")
def finch() -> Finch:
    return new_finch()


def test_what_a_killed_writer_left_in_a_store_is_removed_when_it_is_opened(finch: Finch, tmp_path: Path) -> None:
    finch.open_store(tmp_path / "s", heads=HEADS).close()
    with writing(tmp_path / "s" / "keys-00000001.safetensors", "file"):
        finch.open_store(tmp_path / "s", heads=HEADS).close()
        assert any(name.startswith(".keys-") for name in names(tmp_path / "s"))
    finch.open_store(tmp_path / "s", heads=HEADS, read_only=True).close()
    assert any(name.startswith(".keys-") for name in names(tmp_path / "s"))
    finch.open_store(tmp_path / "s", heads=HEADS).close()
    assert not any(name.startswith(".") for name in names(tmp_path / "s"))


def test_a_file_keeps_its_rights_to_be_read(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with replacing(tmp_path / "file") as new:
            new.write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
