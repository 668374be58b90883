from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from finch_rag.errors import ModelError
from finch_rag.models.compiling import compile_layers

from .small import small_finch, small_model, texts


def test_everything_in_a_layer_but_its_attention_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    model = small_model()
    compile_layers(model)
    layers = model.base_model.layers
    parts = [part for layer in layers for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)]
    assert {id(part) for part, _ in compiled} == {id(part) for part in parts}
    assert all(options == {"dynamic": True} for _, options in compiled)


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="leave compile_layers out"):
        compile_layers(small_model("gpt2"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
@pytest.mark.parametrize("steps", [False, True])
def test_answers_are_the_same_compiled(steps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = small_finch(max_new_tokens=12), small_finch(max_new_tokens=12, compile_layers=True)
    monkeypatch.setattr(fused.runtime.graphs, "enabled", steps)  # as on a GPU, but for the capture
    asked, compiled = plain.ask("When was it?", texts(30)), fused.ask("When was it?", texts(30))
    assert compiled.text == asked.text
    assert [citation.index for citation in compiled.citations] == [citation.index for citation in asked.citations]
    assert len(fused.runtime.graphs.idle) == steps
    layers: Any = fused.model.base_model.layers
    assert layers[0].mlp._compiled_call_impl is not None
