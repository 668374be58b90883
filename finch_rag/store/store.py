"""`PassageStore`: each passage is read once; the model's own retrieval heads search all of them for every question."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch

from ..answer import Citation
from ..errors import InputError, StoreError
from ..models.forward import memory_guard
from ..models.processes import Uncopied
from ..prefill.alone import AloneReader, token_groups
from ..prefill.planning import RetrievalHeads
from ..prompts.builder import PromptBuilder
from ..prompts.passages import Passage, as_passages
from .figures import Added, Retrieved, Shortlist, StoreInfo
from .fusion import fused
from .index import Reading
from .reading import Precision, check_ids, hash_of, read_keys, with_unique_ids
from .searching import Search
from .storage import Storage
from .together import Together

StoreProgress = Callable[[int, int], None]  # tokens read, and in all

_SHOWN = 100  # characters of an id in a message
_SEGMENT_TOKENS = 16384  # what one commit of `add` holds, about; what a crash loses at most


class PassageStore(Uncopied):
    """Passages that are read once and asked for ever. `Finch.open_store` makes one. Safe to share between threads.

    Of each passage the keys of a few retrieval heads are kept, one or two KB a token. A question is read alone, and its
    attention over all passages is one product with these keys. A passage's keys depend on its tokens alone: not on
    instructions, system prompt, history or other passages.

    Args:
        reader: Reads passages and questions.
        prompts: Makes token ids of them.
        model: Fingerprint of the model.
        window: Positions of the model.
        path: A folder, made if it is missing; None keeps all in memory.
        max_bytes: The most bytes of head keys: the least recently used passages go; None for no limit.
        precision: Of the keys.
        read_only: Open a folder beside its writer; nothing can be added.

    Attributes:
        model: Fingerprint of the model.
        path: Its folder; None in memory.
        max_bytes: The most bytes of head keys; None for no limit.
        precision: Of the keys.
        closed: Whether it has let go of its folder.

    Raises:
        StoreError: If the folder cannot be opened, has another writer, or is of another model or precision.
    """

    def __init__(
        self,
        reader: AloneReader,
        prompts: PromptBuilder,
        *,
        model: str,
        window: int,
        path: str | Path | None = None,
        max_bytes: int | None = None,
        precision: Precision = "bfloat16",
        read_only: bool = False,
    ) -> None:
        self._reader, self._prompts, self.model, self._window = reader, prompts, model, window
        self.path = None if path is None else Path(path).expanduser()
        self.max_bytes, self.precision = max_bytes, precision
        self._lock = threading.RLock()
        prefix = hash_of(reader.prefix)[:16]
        heads = " ".join(f"{layer}.{head}" for layer, head in self.heads)
        about = {"model": model, "heads": heads, "prefix": prefix, "precision": precision}
        layout = len(reader.groups), reader.head_dim
        self._storage = Storage(self.path, about, writes=not read_only, layout=layout)
        self._index = self._storage.index
        self._search = Search(reader, prompts, self._storage, window)
        self._everything = Together(self._lock, self._search.everything)
        self.closed = False

    # What is in it

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """The retrieval heads as (layer, head) pairs."""
        return tuple((layer, head) for layer, heads in sorted(self._reader.heads.items()) for head in sorted(heads))

    @property
    def heads_by_layer(self) -> RetrievalHeads:
        """The same by layer."""
        return self._reader.heads

    def __len__(self) -> int:
        return self._index.count()

    def __contains__(self, passage_id: object) -> bool:
        return isinstance(passage_id, str) and passage_id in self._index.ids()

    def info(self) -> StoreInfo:
        """What it holds."""
        tokens = sum(reading.tokens for reading in self._index.readings())
        return StoreInfo(
            path=None if self.path is None else str(self.path),
            passages=len(self),
            tokens=tokens,
            nbytes=tokens * self.bytes_per_token,
            bytes_per_token=self.bytes_per_token,
            precision=self.precision,
            heads=self.heads,
            model=self.model,
            max_bytes=self.max_bytes,
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's head keys."""
        groups, head_dim = len(self._reader.groups), self._reader.head_dim
        return groups * (head_dim + 4) if self.precision == "int8" else groups * head_dim * 2

    def passages(self) -> list[Passage]:
        """All passages, in the order in which they were added."""
        return self._index.all_passages()

    # Adding and removing

    def add(
        self,
        passages: Iterable[str | Passage],
        on_progress: StoreProgress = lambda done, total: None,
    ) -> Added:
        """Reads passages that are not known yet; what was read before a crash or an error stays.

        Args:
            passages: Texts or `Passage` objects. One without text is skipped. An id that is known gets the new text;
                one without id is known by its text.
            on_progress: Called with the tokens read and in all, of those that are not known; may raise to stop.

        Raises:
            InputError: If a passage is no text, or longer than the model's window.
            StoreError: If the store cannot be written.
            DeviceMemoryError: If the device has no memory for a single passage.
        """
        checked = as_passages(passages)
        encoded = self._encoded(checked)
        return self.add_encoded(checked, encoded, on_progress)

    def _encoded(self, passages: Sequence[Passage]) -> list[list[int]]:
        texts = [f"{passage.titled_text}\n\n" if passage.text.strip() else "" for passage in passages]
        return self._prompts.encode(texts)

    def add_encoded(
        self,
        passages: Sequence[Passage],
        encoded: Sequence[Sequence[int]],
        on_progress: StoreProgress = lambda done, total: None,
        *,
        unique_ids: bool = True,
    ) -> Added:
        """Like `add`, for passages whose token ids are known.

        Args:
            passages: Checked passages.
            encoded: Token ids of each, as a prompt has them; none for one without text.
            on_progress: See `add`.
            unique_ids: Whether one id of two different texts is an error; else such passages are kept without it.
        """
        self._check_lengths(passages, encoded)
        hashes = [hash_of(tokens) for tokens in encoded]
        if unique_ids:
            check_ids(passages, hashes)
        else:
            passages = with_unique_ids(passages, hashes)
        with self._lock, memory_guard(self._reader.model, f"{len(passages)} passages of a store"):
            known = self._index.known(key for key in hashes if key)
            new = {key: tokens for key, tokens in zip(hashes, encoded, strict=True) if tokens and key not in known}
            tokens = {key: len(ids) for key, ids in zip(hashes, encoded, strict=True) if ids}
            if self.max_bytes is not None and sum(tokens.values()) * self.bytes_per_token > self.max_bytes:
                raise InputError(
                    f"the passages need {sum(tokens.values()) * self.bytes_per_token:,} bytes of head keys, more than "
                    f"max_bytes={self.max_bytes:,}: raise it, or pass fewer passages"
                )
            named = [(passage, key) for passage, key in zip(passages, hashes, strict=True) if key]
            if self._storage.writes:
                if new or not self._index.has_passages(named):
                    self._read(new, named, on_progress)
            elif new:
                raise StoreError(
                    f"the store in {self.path} is open read-only, and {len(new)} passages are not known to it"
                )
            self._storage.use(tokens)
        total, read = sum(tokens.values()), sum(map(len, new.values()))
        return Added(hashes, total - read, read, frozenset(new))

    def _check_lengths(self, passages: Sequence[Passage], encoded: Sequence[Sequence[int]]) -> None:
        room = self._window - 2 * len(self._reader.prefix)
        for number, (passage, tokens) in enumerate(zip(passages, encoded, strict=True)):
            if len(tokens) > room:
                raise InputError(
                    f"passage {str(passage.id or number)[:_SHOWN]} has {len(tokens)} tokens, and the model's window "
                    f"has room for {room}: split it"
                )

    def _read(
        self, new: Mapping[str, Sequence[int]], named: Sequence[tuple[Passage, str]], on_progress: StoreProgress
    ) -> None:
        """Reads new passages, segment by segment; each is named when its keys are there."""
        lengths = {key: len(tokens) for key, tokens in new.items()}
        done, total = 0, sum(lengths.values())

        def tell(tokens: int) -> None:
            nonlocal done
            done += tokens
            on_progress(done, total)

        # The known ones first: a text that one of them has is not dropped where another one's text changes.
        self._storage.name([(passage, key) for passage, key in named if key not in new])
        for group in token_groups(list(lengths.values()), _SEGMENT_TOKENS):
            batch = list(lengths)[group.start : group.stop]
            keys = read_keys(self._reader, [new[key] for key in batch], self.precision, tell)
            present = set(batch)
            having = [(passage, key) for passage, key in named if key in present]
            self._storage.write(batch, [lengths[key] for key in batch], keys, having)
        self._storage.drop_unnamed()
        if self.max_bytes is not None:
            self._storage.evict(self.max_bytes // self.bytes_per_token, {key for _, key in named})

    def remove(self, ids: Iterable[str]) -> None:
        """Removes passages.

        Args:
            ids: Of the passages.

        Raises:
            InputError: If one of them is not there; then none is removed.
            StoreError: If the store cannot be written.
        """
        wanted = [ids] if isinstance(ids, str) else list(ids)
        with self._lock:
            self._storage.check_writes()
            known = self._index.ids()
            if unknown := [own for own in wanted if own not in known]:
                shown = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
                raise InputError(
                    f"{len(unknown)} of {len(wanted)} ids are not in the store: {shown}; nothing was removed"
                )
            self._storage.change()
            self._index.remove_passages(wanted)
            self._storage.compact()

    def clear(self) -> None:
        """Removes all passages."""
        with self._lock:
            self._storage.clear()

    # Searching

    def search(
        self, question: str, top_k: int = 10, fuse: Sequence[Sequence[str]] = (), fuse_k: int = 20
    ) -> list[Citation]:
        """The passages that the question pays most attention to, over the whole store.

        Args:
            question: The question.
            top_k: The most passages to return.
            fuse: Rankings by other retrievers, each the ids of its passages, the best first: reciprocal rank fusion
                (Cormack et al., SIGIR 2009) with the store's own. Shares stay those of the attention.
            fuse_k: The constant of the fusion.

        Returns:
            By falling share, or by the fused rank; ``index`` is the passage's place in the store.

        Raises:
            InputError: If the question is empty, or ``top_k`` is below 1.
        """
        return [
            Citation(found.passage.id, found.place, found.passage.title, found.share, 0, found.tokens)
            for found in self.retrieve(question, top_k, fuse, fuse_k)
        ]

    def retrieve(
        self, question: str, top_k: int = 10, fuse: Sequence[Sequence[str]] = (), fuse_k: int = 20
    ) -> list[Retrieved]:
        """Like `search`, with the passages themselves.

        Args:
            question: See `search`.
            top_k: See `search`.
            fuse: See `search`.
            fuse_k: See `search`.
        """
        for name, value in (("top_k", top_k), ("fuse_k", fuse_k)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} is {value!r}: pass a whole number, the least is 1")
        if isinstance(fuse, str) or any(isinstance(ranking, str) for ranking in fuse):
            raise InputError("fuse holds ids: pass a list of rankings, each a list of ids, such as fuse=[ids]")
        with memory_guard(self._reader.model, "a search in a store"):
            return self._best(*self._everything(question), top_k, fuse, fuse_k)

    def _best(
        self,
        readings: Sequence[Reading],
        attention: torch.Tensor,
        top_k: int,
        fuse: Sequence[Sequence[str]],
        fuse_k: int,
    ) -> list[Retrieved]:
        order = attention.argsort(descending=True, stable=True).tolist()
        if fuse:
            ids = self._index.ids()
            places = {reading.hash: place for place, reading in enumerate(readings)}
            rankings = [[places[ids[own]] for own in ranking if own in ids] for ranking in fuse]
            order = fused([order, *rankings], fuse_k)
        return self._retrieved(readings, attention, order[:top_k])

    def shortlist(self, question: str, tokens: int) -> Shortlist:
        """The best passages that fit into so many tokens, at least one, the best first.

        Args:
            question: The question.
            tokens: The most tokens.
        """
        readings, attention = self._everything(question)
        chosen: dict[str, float] = {}
        filled = 0
        for place in attention.argsort(descending=True, stable=True).tolist():
            filled += readings[place].tokens
            if filled > tokens and chosen:
                break
            chosen[readings[place].hash] = float(attention[place])
        found = self._index.passages(chosen)
        self._storage.use(chosen)
        return Shortlist(
            tuple(found[key][1] for key in chosen if key in found),
            tuple(paid for key, paid in chosen.items() if key in found),
            sum(reading.tokens for reading in readings),
        )

    def attention_to(self, question: str, hashes: Sequence[str]) -> torch.Tensor:
        """What a question pays to some passages, see `attention_to_many`.

        Args:
            question: The question.
            hashes: Of the passages.
        """
        return self.attention_to_many([(question, hashes)])[0]

    def attention_to_many(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[torch.Tensor]:
        """What questions pay to passages of their own, as if there were no others.

        Args:
            asked: Questions, each with the hashes of its passages, as `Added` has them; 0 for an empty one.

        Returns:
            For each on the CPU, float32, shape [hashes].

        Raises:
            StoreError: If one of them is not there any more.
        """
        with self._lock:
            return self._search.some(asked)

    def _retrieved(
        self, readings: Sequence[Reading], attention: torch.Tensor, places: Sequence[int]
    ) -> list[Retrieved]:
        found = self._index.passages(readings[place].hash for place in places)
        numbers = {number: place for place, number in enumerate(self._index.numbers())}
        total = float(attention.sum()) or 1.0
        known = [(place, *found[readings[place].hash]) for place in places if readings[place].hash in found]
        self._storage.use(readings[place].hash for place, _, _ in known)
        return [
            Retrieved(passage, float(attention[place]) / total, readings[place].tokens, numbers[number])
            for place, number, passage in known
        ]

    # Keeping it

    def verify(self, repair: bool = False) -> list[str]:
        """Reads all head keys and compares them with their checksums.

        Args:
            repair: Remove passages whose keys are damaged, so that they are read again when they are added again.

        Returns:
            The ids of passages whose keys are damaged or missing; empty where all is well.
        """
        with self._lock:
            return self._storage.verify(repair)

    def close(self) -> None:
        """Writes down what was used, and lets go of the folder."""
        with self._lock:
            self.closed = True
            self._storage.close()

    def __enter__(self) -> PassageStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
