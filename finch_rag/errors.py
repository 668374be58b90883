"""Every error that finch-rag raises on purpose.

    FinchError                  (RuntimeError)
    ├── SettingsError           (also ValueError)  an engine built with settings that cannot work
    ├── InputError              a call with passages, a question or settings that cannot work
    │   └── WindowError         the call needs more positions than the model's window has
    ├── ModelError              a model that cannot be loaded or that Finch cannot run
    │   └── NumericsError       the model computed NaN or infinity
    ├── DeviceMemoryError       the device ran out of memory
    ├── CorpusError             a corpus that is missing, empty or unreadable
    └── MissingExtraError       (also ImportError) an optional dependency is not installed

All of them are ``RuntimeError``, because LlamaIndex's response synthesizers swallow ``ValueError`` and answer
"Empty Response" instead. Only ``SettingsError``, raised while the engine is built and so before any framework runs,
is a ``ValueError`` too.
"""

from __future__ import annotations

import unicodedata

_MOST_SHOWN = 300  # characters of another library's message
_JOINERS = "\u200c\u200d"  # of Persian letters and of emoji; they are invisible, and steer nothing


def escaped(text: str, keep: str = "") -> str:
    r"""A text that can be shown: what would steer a terminal, or is no character, as Python writes it (``\x1b``).

    That is control characters, ends of lines among them, overrides of the direction of writing, and halves of surrogate
    pairs. Backslashes stay single: the text is for reading, not for parsing.

    Args:
        text: Any text.
        keep: Characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_shown(c) or c in keep else c.encode("unicode_escape").decode() for c in text)


def _is_shown(character: str) -> bool:
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


class FinchError(RuntimeError):
    """Base class: one clear line that says what is wrong and what to do about it.

    What it quotes, such as the name of a file, cannot make it two lines or steer a terminal: see `escaped`.

    Args:
        parts: The message; what is no text stays as it is.
    """

    def __init__(self, *parts: object) -> None:
        super().__init__(*(escaped(part) if isinstance(part, str) else part for part in parts))


class SettingsError(FinchError, ValueError):
    """The engine was built with settings that cannot work."""


class InputError(FinchError):
    """A call got passages, a question or settings that cannot work."""


class WindowError(InputError):
    """A call needs more positions than the model's window has."""


class ModelError(FinchError):
    """A model cannot be loaded, or its architecture is one that Finch cannot run."""


class NumericsError(ModelError):
    """The model computed NaN or infinity, so no answer can be read from it."""


class DeviceMemoryError(FinchError):
    """The device ran out of memory during a forward pass."""


class StoreError(FinchError):
    """A passage store cannot be opened, read or written."""


class CorpusError(FinchError):
    """A corpus is missing, empty or not readable."""


class MissingExtraError(FinchError, ImportError):
    """An optional dependency is needed for this call and is not installed."""

    @classmethod
    def of(cls, package: str, extra: str) -> MissingExtraError:
        """The error for ``package``, naming the extra that brings it.

        Args:
            package: Name of the missing distribution.
            extra: Name of the extra of finch-rag that installs it.
        """
        return cls(f"{package} is not installed; install it with: pip install 'finch-rag[{extra}]'")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, as much of it as fits into a line of ours; its class where it has none.

    Args:
        error: Of another library.
    """
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line if len(line) <= _MOST_SHOWN else f"{line[:_MOST_SHOWN]}..."
