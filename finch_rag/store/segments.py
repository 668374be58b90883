"""Head keys in files, or in memory: what was read together stands in one segment, which is never changed.

A file is written beside its place and moved there when it is whole and on the disk: no crash leaves half of one.
Files are mapped into memory: what a search does not touch is not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import StoreError, first_line
from ..models.checksums import checksum, is_finite
from ..paths import remove_leftovers, replacing, sync, told_where

_LEFT_BY_EARLIER = (
    ".keys-*.part",
    ".tmp??????",
)  # releases, and safetensors, killed in a folder of which we are the writer


class Keys(NamedTuple):
    """Head keys of a segment.

    Attributes:
        keys: Shape [groups, tokens, head_dim].
        scales: What int8 keys are multiplied by, float32, shape [groups, tokens]; None for other dtypes.
    """

    keys: torch.Tensor
    scales: torch.Tensor | None

    def part(self, start: int, stop: int) -> Keys:
        """Some of its tokens, as views."""
        return Keys(self.keys[:, start:stop], None if self.scales is None else self.scales[:, start:stop])

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and their scales."""
        return self.keys.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def is_finite(self) -> bool:
        """Whether all of its numbers are."""
        return all(
            is_finite(part) for part in (self.keys, self.scales) if part is not None and part.is_floating_point()
        )

    @property
    def is_sound(self) -> bool:
        """Whether its dtypes and shapes are those of head keys."""
        if self.keys.dim() != 3:
            return False
        if self.scales is None:
            return self.keys.dtype == torch.bfloat16
        kinds = self.keys.dtype, self.scales.dtype
        return kinds == (torch.int8, torch.float32) and self.scales.shape == self.keys.shape[:2]


def joined(parts: Iterable[Keys]) -> Keys:
    """Parts of segments as one; a single one is not copied."""
    found = list(parts)
    if len(found) == 1:
        return found[0]
    scales = [part.scales for part in found if part.scales is not None]
    return Keys(torch.cat([part.keys for part in found], 1), torch.cat(scales, 1) if scales else None)


class Segments(Protocol):
    """Where segments are kept."""

    def write(self, number: int, keys: Keys) -> str:
        """Keeps a segment; returns its checksum."""

    def read(self, number: int) -> Keys:
        """A segment."""

    def delete(self, number: int) -> None:
        """Drops a segment, if it is there."""

    def checksum(self, number: int) -> str:
        """The checksum of what is there now."""

    def keep_only(self, numbers: Iterable[int]) -> None:
        """Drops all other segments: what a writer left that did not come to its end."""


class MemorySegments:
    """Segments in memory, on the model's device."""

    def __init__(self) -> None:
        self._segments: dict[int, Keys] = {}

    def write(self, number: int, keys: Keys) -> str:
        """See `Segments`."""
        self._segments[number] = keys
        return ""  # nothing damages memory

    def read(self, number: int) -> Keys:
        """See `Segments`."""
        return self._segments[number]

    def delete(self, number: int) -> None:
        """See `Segments`."""
        self._segments.pop(number, None)

    def checksum(self, number: int) -> str:
        """See `Segments`."""
        return ""

    def keep_only(self, numbers: Iterable[int]) -> None:
        """See `Segments`."""


class FileSegments:
    """Segments as safetensors files in a folder.

    Args:
        folder: It is there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _file(self, number: int) -> Path:
        return self._folder / f"keys-{number:08}.safetensors"

    def write(self, number: int, keys: Keys) -> str:
        """See `Segments`.

        Raises:
            StoreError: If the disk is full or the folder cannot be written.
        """
        tensors = {"keys": keys.keys.cpu().contiguous()}
        if keys.scales is not None:
            tensors["scales"] = keys.scales.cpu().contiguous()
        file = self._file(number)
        with told_where(f"{file.name}, {keys.nbytes} bytes,", self._folder, StoreError, "set max_bytes"):
            try:
                with replacing(file) as new:
                    save_file(tensors, str(new))
                sync(self._folder)  # what was moved stays moved after a power cut
            except OSError:
                self.delete(number)
                raise
        return checksum(tensors)

    def read(self, number: int) -> Keys:
        """See `Segments`.

        Raises:
            StoreError: If the file is missing or damaged.
        """
        try:
            with safe_open(str(self._file(number)), framework="pt") as file:
                names = set(file.keys())
                keys = file.get_tensor("keys")
                return Keys(keys, file.get_tensor("scales") if "scales" in names else None)
        except (OSError, SafetensorError, ValueError) as error:
            raise StoreError(
                f"{self._file(number)} cannot be read: {first_line(error)}; `verify(repair=True)` removes what is "
                "damaged"
            ) from error

    def delete(self, number: int) -> None:
        """See `Segments`."""
        with suppress(OSError):  # the next writer drops it
            self._file(number).unlink(missing_ok=True)

    def checksum(self, number: int) -> str:
        """See `Segments`."""
        found = self.read(number)
        tensors = {"keys": found.keys} if found.scales is None else {"keys": found.keys, "scales": found.scales}
        return checksum(tensors)

    def keep_only(self, numbers: Iterable[int]) -> None:
        """See `Segments`."""
        kept = {self._file(number) for number in numbers}
        remove_leftovers(self._folder)
        for pattern in ("keys-*.safetensors", *_LEFT_BY_EARLIER):
            for file in self._folder.glob(pattern):
                if file not in kept:
                    with suppress(OSError):
                        file.unlink(missing_ok=True)
