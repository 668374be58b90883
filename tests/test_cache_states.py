"""Any row of appends, evictions, crops, forks and savings leaves a cache that says what a plain list of tokens says.

The list has each token's key as the cache first got it, and rotates it in float64.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finch_rag.errors import InputError
from finch_rag.models.cache import CompressedCache
from finch_rag.models.cached_document import CachedDocument
from finch_rag.models.rope import KeyRotation

from .state_settings import run_machine

LAYERS, HEADS, WIDTH = 3, 2, 8
ROTATES = (True, False, True)
MOST_CACHES = 4


@dataclass
class Token:
    """One token of one layer.

    Attributes:
        key: As the cache first got it, float64, shape [HEADS, WIDTH].
        at: Its position then.
        value: Shape [HEADS, WIDTH].
        document: Its document position; -1 in the prefix and behind what is kept.
    """

    key: Any
    at: int
    value: Any
    document: int = -1


@dataclass
class Plain:
    """What a cache should hold.

    Attributes:
        capacity: Tokens that it has room for.
        layers: Tokens of each layer in their order.
        prefix: Tokens that always stay.
        kept: Tokens kept of the document.
        read: Document tokens read so far.
        whole: Whether it can be evicted from: nothing that is kept was cropped.
    """

    capacity: int
    layers: list[list[Token]] = field(default_factory=lambda: [[] for _ in range(LAYERS)])
    prefix: int = 0
    kept: int = 0
    read: int = 0
    whole: bool = True

    @property
    def length(self) -> int:
        return len(self.layers[0])

    @property
    def fresh(self) -> int:
        """Tokens behind what is kept."""
        return self.length - self.prefix - self.kept

    @property
    def is_compressed(self) -> bool:
        """Whether it is what is saved: a prefix and what was kept."""
        return self.whole and self.length > 0 and self.fresh == 0


@dataclass
class Pair:
    cache: CompressedCache
    plain: Plain


class CacheMachine(RuleBasedStateMachine):
    """A cache and its forks."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[Pair] = []
        self.dtype = torch.float32
        self.rotation = KeyRotation(torch.ones(1), False, ROTATES)
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize(
        dtype=st.sampled_from((torch.float32, torch.bfloat16)),
        interleaved=st.booleans(),
        pairs=st.sampled_from((WIDTH // 2, WIDTH // 4)),
        prefix=st.integers(0, 4),
        capacity=st.integers(8, 40),
        seed=st.integers(0, 999),
    )
    def begin(self, dtype: torch.dtype, interleaved: bool, pairs: int, prefix: int, capacity: int, seed: int) -> None:
        self.dtype = dtype
        self.rotation = KeyRotation(10000.0 ** (-torch.arange(pairs) / pairs), interleaved, ROTATES)
        pair = Pair(CompressedCache(LAYERS, capacity), Plain(capacity))
        self.pairs = [pair]
        if prefix:
            self._append(pair, prefix, seed)
        pair.cache.prefix = pair.plain.prefix = prefix

    def _one(self, number: int) -> Pair:
        return self.pairs[number % len(self.pairs)]

    def _states(self, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        made = torch.Generator().manual_seed(seed)
        keys, values = (torch.randn(LAYERS, HEADS, count, WIDTH, generator=made).to(self.dtype) for _ in range(2))
        return keys, values

    def _append(self, pair: Pair, count: int, seed: int, document: int = -1) -> None:
        keys, values = self._states(count, seed)
        for number, (layer, tokens) in enumerate(zip(pair.cache.layers, pair.plain.layers, strict=True)):
            layer.update(keys[number][None], values[number][None])
            for place in range(count):
                tokens.append(
                    Token(
                        keys[number, :, place].double().numpy(),
                        len(tokens),
                        values[number, :, place].double().numpy(),
                        document + place if document >= 0 else -1,
                    )
                )

    @rule(which=st.integers(0, 9), count=st.integers(1, 7), seed=st.integers(0, 999))
    def append(self, which: int, count: int, seed: int) -> None:
        pair = self._one(which)
        if pair.plain.length + count > pair.plain.capacity:
            keys, values = self._states(count, seed)
            for number, layer in enumerate(pair.cache.layers):
                with pytest.raises(InputError, match=f"room for {pair.plain.capacity} tokens"):
                    layer.update(keys[number][None], values[number][None])
            return
        self._append(pair, count, seed, pair.plain.read)
        pair.plain.read += count

    @precondition(lambda self: any(pair.plain.whole and pair.plain.length for pair in self.pairs))
    @rule(which=st.integers(0, 9), data=st.data(), by_layer=st.booleans())
    def evict(self, which: int, data: st.DataObject, by_layer: bool) -> None:
        able = [pair for pair in self.pairs if pair.plain.whole and pair.plain.length]
        pair = able[which % len(able)]
        plain = pair.plain
        evictable = plain.kept + plain.fresh
        size = data.draw(st.integers(0, evictable))
        choices = [
            sorted(data.draw(st.permutations(range(evictable)))[:size]) for _ in range(LAYERS if by_layer else 1)
        ]
        index = torch.tensor(choices, dtype=torch.long).view(len(choices), size)
        appended = range(plain.read - plain.fresh, plain.read)
        pair.cache.evict(index if by_layer else index[0], appended, self.rotation)
        for number in range(LAYERS):
            tokens, choice = plain.layers[number], choices[number if by_layer else 0]
            plain.layers[number] = [*tokens[: plain.prefix], *(tokens[plain.prefix + place] for place in choice)]
        plain.kept = size

    @rule(which=st.integers(0, 9), length=st.integers(0, 45))
    def crop(self, which: int, length: int) -> None:
        pair = self._one(which)
        plain = pair.plain
        pair.cache.crop_to(length)
        plain.whole = plain.whole and min(length, plain.length) >= plain.prefix + plain.kept
        if plain.whole:
            plain.read -= max(0, plain.length - length)
        plain.layers = [tokens[:length] for tokens in plain.layers]

    @precondition(lambda self: len(self.pairs) < MOST_CACHES)
    @rule(which=st.integers(0, 9), room=st.integers(0, 20))
    def fork(self, which: int, room: int) -> None:
        pair = self._one(which)
        copy = pair.cache.fork(room)
        self._add(pair, copy, pair.plain.length + room)

    @precondition(lambda self: any(pair.plain.is_compressed for pair in self.pairs))
    @rule(which=st.integers(0, 9), room=st.integers(0, 20), replaces=st.booleans())
    def save_and_load(self, which: int, room: int, replaces: bool) -> None:
        able = [pair for pair in self.pairs if pair.plain.is_compressed]
        pair = able[which % len(able)]
        read = (pair.plain.read,) if pair.plain.read else ()
        none, shares = (None,) * len(read), (1.0,) * len(read)
        pair.cache.document = CachedDocument(none, none, read, shares, question=str(which))
        file = Path(self.folder.name) / ("cache" if replaces else f"cache-{which}")
        pair.cache.save(file)
        loaded = CompressedCache.load(file)
        assert loaded.document == pair.cache.document
        assert [layer.capacity for layer in loaded.layers] == [pair.plain.length] * LAYERS
        if len(self.pairs) >= MOST_CACHES:
            self.pairs.remove(pair)
        self._add(pair, loaded.fork(room), pair.plain.length + room)

    def _add(self, pair: Pair, copy: CompressedCache, capacity: int) -> None:
        """A copy begins anew: its references are the keys that it got."""
        layers = []
        for layer, tokens in zip(copy.layers, pair.plain.layers, strict=True):
            keys = layer.in_use()[0][0].double().numpy() if tokens else np.zeros((HEADS, 0, WIDTH))
            layers.append([replace(token, key=keys[:, place], at=place) for place, token in enumerate(tokens)])
        self._check(Pair(copy, replace(pair.plain, capacity=capacity)))  # before that: as the other's
        self.pairs.append(Pair(copy, replace(pair.plain, capacity=capacity, layers=layers)))

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(which=st.integers(0, 9))
    def drop(self, which: int) -> None:
        del self.pairs[which % len(self.pairs)]

    @invariant()
    def all_are_as_they_should_be(self) -> None:
        for pair in self.pairs:
            self._check(pair)

    def _check(self, pair: Pair) -> None:
        cache, plain = pair.cache, pair.plain
        assert [layer.length for layer in cache.layers] == [plain.length] * LAYERS
        assert (cache.length, cache.prefix, cache.layers[0].capacity) == (plain.length, plain.prefix, plain.capacity)
        assert cache.kept_tokens == plain.kept
        if plain.whole:
            expected = [[t.document for t in layer[plain.prefix :][: plain.kept]] for layer in plain.layers]
            assert cache.kept.expand(LAYERS, -1).tolist() == expected
        if not plain.length:
            return
        for number, (layer, tokens) in enumerate(zip(cache.layers, plain.layers, strict=True)):
            keys, values = (states[0].double().numpy() for states in layer.in_use())
            assert np.array_equal(values, np.stack([token.value for token in tokens], 1))
            wanted = np.stack([self._rotated(token, place, number) for place, token in enumerate(tokens)], 1)
            rounding = 2**-8 if self.dtype == torch.bfloat16 else 2**-22
            assert (np.abs(keys - wanted) <= np.abs(wanted) * rounding + 2e-5).all()

    def _rotated(self, token: Token, place: int, layer: int) -> Any:
        """The token's key at a place, by float64."""
        if not ROTATES[layer] or place == token.at:
            return token.key
        frequencies = self.rotation.inv_freq.double().numpy()
        pairs = len(frequencies)
        angle = (place - token.at) * frequencies
        cos, sin = np.cos(angle), np.sin(angle)
        rotated = token.key.copy()
        if self.rotation.interleaved:
            first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
        else:
            first, second = slice(0, pairs), slice(pairs, 2 * pairs)
        rotated[:, first] = token.key[:, first] * cos - token.key[:, second] * sin
        rotated[:, second] = token.key[:, second] * cos + token.key[:, first] * sin
        return rotated


@pytest.mark.slow
def test_a_cache_is_what_a_list_of_tokens_is() -> None:
    run_machine(CacheMachine, examples=120, steps=25)
