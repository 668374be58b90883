"""The files of a corpus: found without leaving its folder, however deep it is and whatever stands in it."""

from __future__ import annotations

import heapq
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import escaped

_SHOWN = 160  # characters of a name in a message; a longer one is shown without its middle

_Key = tuple[int, int]  # what a folder is known by: device and inode


def shown(name: str) -> str:
    """A file's name in a message.

    Args:
        name: May hold anything, and be of any length.
    """
    if len(name) > _SHOWN:
        name = f"{name[: _SHOWN // 2]}...{name[-_SHOWN // 2 :]}"
    return escaped(name)


@dataclass(slots=True)
class Found:
    """What a folder holds.

    Attributes:
        files: The name of each below the folder, with slashes, as a text; and its path.
        warnings: One line for each that is left out, and one for all links that are not followed.
    """

    files: list[tuple[str, Path]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find_files(root: Path, is_wanted: Callable[[str], bool], follow_links: bool) -> Found:
    """The files of a folder and its subfolders, sorted by name; what begins with a dot is passed over.

    A link to a file is followed where it stays in the folder. With ``follow_links`` all links are. A folder that is
    reached in several ways is read once, so links may lead in circles: where it stands itself, else by the first link.

    Args:
        root: The folder.
        is_wanted: Whether a file of such a name is read.
        follow_links: Whether links to folders are followed, and links out of the folder.
    """
    return _Search(os.path.realpath(root), is_wanted, follow_links).run()


class _Search:
    """A walk through a folder; by lists of what is to do, as a folder may be deeper than Python calls."""

    def __init__(self, root: str, is_wanted: Callable[[str], bool], follow_links: bool) -> None:
        self._root, self._is_wanted, self._follow_links = root, is_wanted, follow_links
        self._found = Found()
        self._seen: set[_Key] = set()  # folders that have been read, where links are followed
        self._linked: list[tuple[str, str]] = []  # links to folders that are followed: name and path
        self._left: list[str] = []  # names of links that are not

    def run(self) -> Found:
        self._walk("", self._root)
        while self._linked:
            name, path = heapq.heappop(self._linked)
            self._walk(f"{name}/", path)
        if self._left:
            count, first = len(self._left), shown(min(self._left))
            what = "1 link is" if count == 1 else f"{count:,} links are"
            self._found.warnings.append(
                f"{what} not followed, such as {first}: follow_links (--follow-links) reads what they lead to"
            )
        self._found.files.sort()
        return self._found

    def _walk(self, prefix: str, path: str) -> None:
        waiting = [(prefix, path)]
        while waiting:
            prefix, path = waiting.pop()
            try:
                if self._follow_links and not self._is_new(path):
                    continue
                entries = sorted(_entries(path), key=lambda entry: entry.name)
            except OSError as error:
                self._leave_out(prefix.rstrip("/") or path, f"cannot be listed ({error.strerror})")
                continue
            for entry in entries:
                name = prefix + as_text(entry.name)
                try:
                    if entry.is_symlink():
                        self._link(name, entry)
                    elif entry.is_dir(follow_symlinks=False):
                        waiting.append((f"{name}/", entry.path))
                    elif self._is_wanted(entry.name):
                        self._file(name, entry.path, entry.is_file(follow_symlinks=False))
                except OSError as error:
                    if self._is_wanted(entry.name):
                        self._leave_out(name, f"cannot be read ({error.strerror})")

    def _is_new(self, path: str) -> bool:
        status = Path(path).stat()
        key = status.st_dev, status.st_ino
        new = key not in self._seen
        self._seen.add(key)
        return new

    def _link(self, name: str, entry: os.DirEntry[str]) -> None:
        mode = entry.stat().st_mode
        if stat.S_ISDIR(mode):
            if self._follow_links:
                heapq.heappush(self._linked, (name, entry.path))
            else:
                self._left.append(name)
        elif self._is_wanted(entry.name):
            regular = stat.S_ISREG(mode)
            if not regular or self._follow_links or self._is_inside(entry.path):
                self._file(name, entry.path, regular)
            else:
                self._left.append(name)

    def _is_inside(self, path: str) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self._root)

    def _file(self, name: str, path: str, regular: bool) -> None:
        if regular:
            self._found.files.append((name, Path(path)))
        else:
            self._leave_out(name, "is no regular file")

    def _leave_out(self, name: str, reason: str) -> None:
        self._found.warnings.append(left_out(name, reason))


def left_out(name: str, reason: str) -> str:
    """A warning.

    Args:
        name: Of the file.
        reason: Why it is not read.
    """
    return f"{shown(name)} {reason}, so it is left out"


def _entries(path: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        yield from (entry for entry in entries if not entry.name.startswith("."))


def as_text(name: str) -> str:
    """A name whose bytes are not UTF-8 with these bytes escaped: it becomes part of ids, which must be texts.

    Args:
        name: As the system lists it.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    return name
