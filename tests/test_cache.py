from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finch_rag.engine import Finch
from finch_rag.errors import InputError, WindowError
from finch_rag.models.cache import CompressedCache, CompressedLayer
from finch_rag.models.cached_document import CachedDocument, ReadingFigures
from finch_rag.models.rope import KeyRotation

from .small import small_finch, small_model, texts

QUESTION = "When was the lighthouse built?"


@pytest.fixture(scope="module")
def cache(finch: Finch) -> CompressedCache:
    return finch.compress(QUESTION, texts(8))


def tensors_of(cache: CompressedCache) -> list[torch.Tensor]:
    """Keys and values in use, and what was kept: copies."""
    found = [cache.kept.clone()]
    for layer in cache.layers:
        assert layer.keys is not None
        assert layer.values is not None
        found += [layer.keys[:, :, : layer.length].clone(), layer.values[:, :, : layer.length].clone()]
    return found


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def states(tokens: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(1, 2, tokens, 4)


def test_a_layer_appends_in_place_and_returns_what_is_in_use() -> None:
    layer = CompressedLayer(10)
    layer.update(states(4), states(4, 1))
    assert layer.keys is not None
    memory = layer.keys.data_ptr()
    keys, values = layer.update(states(3, 2), states(3, 3))
    assert torch.equal(keys, torch.cat((states(4), states(3, 2)), dim=2))
    assert torch.equal(values, torch.cat((states(4, 1), states(3, 3)), dim=2))
    assert (layer.length, layer.get_seq_length(), layer.keys.data_ptr()) == (7, 7, memory)


def test_a_full_layer_refuses_more_and_stays_as_it_is() -> None:
    layer = CompressedLayer(5)
    layer.update(states(4), states(4))
    with pytest.raises(InputError, match=r"5 tokens.*6"):
        layer.update(states(2), states(2))
    assert layer.length == 4


def test_the_figures_of_a_cache(cache: CompressedCache) -> None:
    assert cache.length == cache.prefix + cache.kept_tokens
    assert cache.kept_tokens == 60
    assert cache.layers[0].capacity == cache.length  # the room that reading took is free again
    assert cache.bytes_per_token == 2 * 2 * 2 * 16 * 4  # layers, keys and values, kv heads, head_dim, float32
    assert cache.nbytes == cache.bytes_per_token * cache.length


def test_a_forked_cache_is_independent(cache: CompressedCache) -> None:
    before = tensors_of(cache)
    copy = cache.fork(3)
    assert equal(tensors_of(copy), before)
    assert copy.layers[0].capacity == cache.length + 3
    for layer in copy.layers:
        layer.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16))
        assert layer.keys is not None
        layer.keys.zero_()
    assert equal(tensors_of(cache), before)
    assert (cache.length, copy.length) == (cache.prefix + 60, cache.prefix + 63)


def test_a_fork_is_evicted_from_as_its_own_cache_is() -> None:
    rotation = KeyRotation(torch.ones(2), False, (True,))
    cache = CompressedCache(1, 12)
    cache.layers[0].update(states(6), states(6, 1))
    cache.evict(torch.tensor([1, 3, 4, 5]), range(6), rotation)
    copy = cache.fork(4)
    for each in (cache, copy):
        each.layers[0].update(states(2, 2), states(2, 3))
        each.evict(torch.tensor([0, 2, 5]), range(6, 8), rotation)
    assert copy.kept.tolist() == cache.kept.tolist() == [[1, 4, 7]]
    for found, expected in zip(copy.layers[0].in_use(), cache.layers[0].in_use(), strict=True):
        torch.testing.assert_close(found, expected)


def test_one_choice_for_all_layers_may_follow_one_for_each() -> None:
    rotation = KeyRotation(torch.ones(2), False, (True, True))
    cache = CompressedCache(2, 8)
    for layer in cache.layers:
        layer.update(states(5), states(5, 1))
    cache.evict(torch.tensor([[0, 2, 4], [1, 2, 3]]), range(5), rotation)
    cache.evict(torch.tensor([1, 2]), range(0), rotation)
    assert cache.kept.tolist() == [[2, 4], [2, 3]]
    for layer, kept in zip(cache.layers, cache.kept, strict=True):
        assert torch.equal(layer.in_use()[1], states(5, 1)[:, :, kept])
        moved = rotation.re_rotate(states(5)[:, :, kept], rotation.between(kept, torch.arange(2)), 0)
        torch.testing.assert_close(layer.in_use()[0], moved)


def test_crop_drops_the_end_only(cache: CompressedCache) -> None:
    copy = cache.fork(0)
    copy.crop_to(10)
    assert [layer.length for layer in copy.layers] == [10, 10]
    for found, whole in zip(tensors_of(copy)[1:], tensors_of(cache)[1:], strict=True):
        assert torch.equal(found, whole[:, :, :10])


def test_a_cached_question_is_answered_the_same_again_and_leaves_the_cache_as_it_was(
    finch: Finch, cache: CompressedCache
) -> None:
    before = tensors_of(cache)
    first, other = finch.ask_cached(cache), finch.ask_cached(cache, "who built the bridge?")
    assert finch.ask_cached(cache).text == first.text
    assert first.text != other.text
    assert equal(tensors_of(cache), before)


def test_a_cached_question_is_answered_as_asking_would(finch: Finch, cache: CompressedCache) -> None:
    asked, cached = finch.ask(QUESTION, texts(8)), finch.ask_cached(cache)
    assert cached.text == asked.text
    assert cached.citations == asked.citations
    assert cached.report.kept_tokens == asked.report.kept_tokens


@pytest.mark.parametrize("selection", ["passage", "token"])
def test_a_saved_cache_answers_the_same(finch: Finch, tmp_path: Path, selection: Any) -> None:
    cache = finch.compress(QUESTION, texts(8), selection=selection)
    cache.save(tmp_path / "cache.safetensors")
    loaded = CompressedCache.load(tmp_path / "cache.safetensors")
    assert equal(tensors_of(loaded), tensors_of(cache))
    assert loaded.document == cache.document
    before, after = finch.ask_cached(cache), finch.ask_cached(loaded)
    assert (after.text, after.citations) == (before.text, before.citations)
    assert after.report.to_dict().keys() == before.report.to_dict().keys()


def test_titles_and_ids_survive_saving(finch: Finch, tmp_path: Path) -> None:
    from finch_rag import Passage

    passages = [Passage(text, id=f"id {n}", title=None if n else "Märchen") for n, text in enumerate(texts(3))]
    finch.compress(QUESTION, passages).save(tmp_path / "cache")
    document = CompressedCache.load(tmp_path / "cache").document
    assert document.passage_ids == ("id 0", "id 1", "id 2")
    assert document.titles == ("Märchen", None, None)
    assert document.question == QUESTION


def test_a_cache_without_passages_can_be_saved(finch: Finch, tmp_path: Path) -> None:
    cache = finch.compress(QUESTION, [])
    cache.save(tmp_path / "cache")
    assert finch.ask_cached(CompressedCache.load(tmp_path / "cache")).text == finch.ask_cached(cache).text


def test_the_file_is_safetensors_without_pickle(cache: CompressedCache, tmp_path: Path) -> None:
    file = tmp_path / "cache.safetensors"
    cache.save(file)
    with safe_open(str(file), framework="pt") as content:
        assert set(content.keys()) == {"kept", *(f"{name}.{layer}" for name in ("keys", "values") for layer in (0, 1))}
        assert json.loads(content.metadata()["document"])["question"] == QUESTION
    assert b"pickle" not in file.read_bytes()
    assert file.stat().st_size < cache.nbytes + 8192  # what is in use, not the whole buffer


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.safetensors"):
        CompressedCache.load(tmp_path / "nowhere.safetensors")


def test_a_folder_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        CompressedCache.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04pickled", bytes(range(256)) * 8])
def test_a_foreign_file_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cache").write_bytes(content)
    with pytest.raises(InputError, match="cache"):
        CompressedCache.load(tmp_path / "cache")


def test_another_safetensors_file_is_an_input_error(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match="not a Finch cache"):
        CompressedCache.load(tmp_path / "model.safetensors")


def test_a_cut_file_is_an_input_error(cache: CompressedCache, tmp_path: Path) -> None:
    cache.save(tmp_path / "cache")
    whole = (tmp_path / "cache").read_bytes()
    for length in (5, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(InputError, match="cut"):
            CompressedCache.load(tmp_path / "cut")


@pytest.mark.parametrize("loss", ["keys.0", "values.1", "kept", "prefix", "document"])
def test_a_file_that_lacks_a_part_is_an_input_error(cache: CompressedCache, tmp_path: Path, loss: str) -> None:
    cache.save(tmp_path / "cache")
    with safe_open(str(tmp_path / "cache"), framework="pt") as content:
        metadata = {name: value for name, value in content.metadata().items() if name != loss}
    tensors = {name: value for name, value in load_file(str(tmp_path / "cache")).items() if name != loss}
    save_file(tensors, str(tmp_path / "cache"), metadata=metadata)
    with pytest.raises(InputError):
        CompressedCache.load(tmp_path / "cache")


@pytest.mark.parametrize(("part", "value"), [("document", "{"), ("document", '{"colour": 1}'), ("prefix", "many")])
def test_a_file_with_broken_metadata_is_an_input_error(
    cache: CompressedCache, tmp_path: Path, part: str, value: str
) -> None:
    cache.save(tmp_path / "cache")
    with safe_open(str(tmp_path / "cache"), framework="pt") as content:
        metadata = {**content.metadata(), part: value}
    save_file(load_file(str(tmp_path / "cache")), str(tmp_path / "cache"), metadata=metadata)
    with pytest.raises(InputError):
        CompressedCache.load(tmp_path / "cache")


def test_a_cache_of_another_model_is_refused(cache: CompressedCache) -> None:
    with pytest.raises(InputError, match="another model"):
        small_finch(seed=1).ask_cached(cache)


def test_a_cache_of_the_same_model_in_another_dtype_answers_or_is_refused(cache: CompressedCache) -> None:
    model = small_model().to(torch.bfloat16)
    from .small import chat_tokenizer

    finch = Finch(model, chat_tokenizer(), heads="all", max_new_tokens=4)
    try:
        answer = finch.ask_cached(cache)
    except InputError:
        return
    assert answer.report.new_tokens > 0


def test_a_cached_question_too_long_is_a_window_error(finch: Finch, cache: CompressedCache) -> None:
    with pytest.raises(WindowError, match="512"):
        finch.ask_cached(cache, "who built the bridge? " * 200)


def test_the_largest_budget_still_leaves_room_for_the_same_question(finch: Finch) -> None:
    many = texts(40)
    with pytest.raises(WindowError) as caught:
        finch.compress(QUESTION, many, budget=5000, chunk_size=None)
    largest = int(str(caught.value).split("budget=")[1].split()[0])
    cache = finch.compress(QUESTION, many, budget=largest, chunk_size=None)
    assert finch.ask_cached(cache).text == finch.ask(QUESTION, many, budget=largest, chunk_size=None).text


def test_a_document_survives_json() -> None:
    document = CachedDocument(("a", None), (None, "t"), (3, 4), (0.25, 0.75), "q", "f", ReadingFigures(heads=((1, 2),)))
    assert CachedDocument.from_json(document.to_json()) == document


def test_a_cache_goes_to_the_device_of_what_is_appended(cache: CompressedCache) -> None:
    elsewhere = cache.fork(3)  # "meta" stands in for a GPU
    for layer in elsewhere.layers:
        keys, values = layer.update(torch.ones(1, 2, 2, 16, device="meta"), torch.ones(1, 2, 2, 16, device="meta"))
        assert (keys.device.type, values.device.type) == ("meta", "meta")
        assert keys.shape[2] == elsewhere.length


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_cache_that_was_loaded_on_the_cpu_is_asked_on_a_gpu(tmp_path: Path) -> None:
    finch = small_finch()
    torch.nn.Module.to(finch.model, "cuda")
    cache = finch.compress(QUESTION, texts(8))
    expected = finch.ask_cached(cache).text
    cache.save(tmp_path / "cache")
    assert finch.ask_cached(CompressedCache.load(tmp_path / "cache")).text == expected


def test_a_cache_of_an_earlier_release_is_told(cache: CompressedCache, tmp_path: Path) -> None:
    save_file({"kept": torch.zeros(1, 1)}, str(tmp_path / "old"), metadata={"format": "finch-cache-1"})
    with pytest.raises(InputError, match=r"earlier finch-rag: compress the passages again"):
        CompressedCache.load(tmp_path / "old")
