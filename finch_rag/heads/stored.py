"""Heads that are known: stored by the user, or shipped with the package; else they are found and stored."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, first_line
from ..jsonl import is_number, read_object
from ..models.fingerprint import fingerprint
from ..models.inspection import text_config
from ..models.parallel import agreed, writes_files
from ..paths import cache_folder, write_atomically
from ..prefill.planning import RetrievalHeads
from .alone import find_alone_heads, usual_alone_heads
from .pairs import AloneHeads, Heads, HeadUse, check_heads, heads_by_layer, layers_to_search
from .search import EXAMPLES, HEADS, HeadScore, find_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FORMAT = 1

_KEYS: Mapping[HeadUse, str] = {"loop": "heads", "alone": "alone_heads"}  # in the file

_log = logging.getLogger(__name__)


def resolve_heads(
    heads: Heads,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RetrievalHeads | None:
    """The heads to rank passages with.

    Args:
        heads: "auto" looks them up and finds them at the first use of a model, "all" sums all heads, pairs of
            (layer, head) are taken as given.
        model: The model.
        tokenizer: Its tokenizer.
        name: What to call the model in messages.
        on_progress: Called while heads are found.

    Returns:
        Heads by layer, or None for all.
    """
    if heads == "all":
        return None
    if isinstance(heads, str):
        return _known_or_found("loop", model, tokenizer, name, on_progress)
    return heads_by_layer(heads)


def resolve_alone_heads(
    heads: AloneHeads,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RetrievalHeads:
    """The heads to rank passages with that were read alone.

    Args:
        heads: "auto" looks them up and finds them at the first use of a model, (layer, head) pairs are taken as given.
        model: The model.
        tokenizer: Its tokenizer.
        name: What to call the model in messages.
        on_progress: Called while heads are found.

    Returns:
        Heads by layer.
    """
    if isinstance(heads, str):
        return _known_or_found("alone", model, tokenizer, name, on_progress)
    return heads_by_layer(heads)


def _known_or_found(
    use: HeadUse,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    on_progress: Callable[[int, int], None],
) -> RetrievalHeads:
    pairs = agreed(model, load_heads(model, use))
    if pairs is None:
        what = "the retrieval heads" if use == "loop" else "the retrieval heads for passages read alone"
        _log.warning(
            "finding %s of %s on %d examples; this happens once, the result is kept in %s",
            what,
            name,
            EXAMPLES,
            _user_file(fingerprint(model)),
        )
        if use == "loop":
            searched = layers_to_search(text_config(model)) * text_config(model).num_attention_heads
            found = find_heads(model, tokenizer, min(HEADS, searched), on_progress=on_progress)
        else:
            found = find_alone_heads(model, tokenizer, usual_alone_heads(model), on_progress=on_progress)
        try:
            save_heads(model, name, found, use)
        except OSError as error:
            _log.warning("the heads of %s cannot be stored (%s); they will be found again next time", name, error)
        pairs = [(score.layer, score.head) for score in found]
    return heads_by_layer(pairs)


def load_heads(model: PreTrainedModel, use: HeadUse = "loop") -> list[tuple[int, int]] | None:
    """The heads stored for a model by the user or shipped with the package, None if there are none.

    Args:
        model: The model.
        use: What they are for: the loop, or passages read alone.
    """
    name = f"{fingerprint(model)}.json"
    for file in (cache_folder("heads") / name, resources.files(__package__) / "shipped" / name):
        try:
            stored = read_object(file)
            if stored["format"] == _FORMAT and _KEYS[use] in stored:
                return _pairs(stored[_KEYS[use]], text_config(model))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, KeyError, TypeError, InputError) as error:
            _log.warning("%s cannot be read (%s); its heads are found again", file, first_line(error))
    return None


def _pairs(stored: Any, config: Any) -> list[tuple[int, int]]:
    """The (layer, head) pairs of what is stored: with their scores, and such that the model has.

    Raises:
        ValueError: If it is something else.
        TypeError: If it is something else.
        InputError: If the model has no such heads.
    """
    if not isinstance(stored, list) or not all(isinstance(row, list) for row in stored):
        raise TypeError("its heads are no lists")
    if not all(is_number(score) for _, _, score in stored):
        raise TypeError("a score is no number")
    pairs = [(layer, head) for layer, head, _ in stored]
    check_heads(pairs, config)
    return pairs


def save_heads(model: PreTrainedModel, name: str, heads: Sequence[HeadScore], use: HeadUse = "loop") -> Path:
    """Stores a model's heads in the user's cache, beside those for the other use.

    Args:
        model: The model.
        name: Written into the file for people who read it.
        heads: By falling score.
        use: What they are for: the loop, or passages read alone.

    Returns:
        The file.
    """
    file = _user_file(fingerprint(model))
    content: dict[str, Any] = {"format": _FORMAT, "model": name}
    for other in _KEYS.values():
        content |= _stored_part(file, other, text_config(model))
    content[_KEYS[use]] = [[h.layer, h.head, round(h.score, 5)] for h in heads]
    if writes_files(model):
        write_atomically(file, json.dumps(content, indent=1) + "\n")
    return file


def _stored_part(file: Path, key: str, config: Any) -> dict[str, Any]:
    try:
        stored = read_object(file)
        if stored["format"] == _FORMAT:
            _pairs(stored[key], config)
            return {key: stored[key]}
    except (OSError, ValueError, KeyError, TypeError, InputError):
        pass
    return {}


def _user_file(model_fingerprint: str) -> Path:
    return cache_folder("heads") / f"{model_fingerprint}.json"
