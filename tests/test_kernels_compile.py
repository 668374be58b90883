"""The kernels compile for a GPU, without one: Triton's interpreter forgives what its compiler does not."""

from __future__ import annotations

import inspect
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from finch_rag.decode.fused_step import FusedStep
from finch_rag.models.attention import use_finch_attention

from .small import small_model

pytest.importorskip("triton", reason="Triton is not made for this platform")

HOPPER = ("cuda", 90, 32)  # compute capability 9.0, warps of 32 threads


def compiled(kind: str, changes: dict[str, Any], dtype: torch.dtype, answers: int) -> list[str]:
    """Compiles what a step launches, in place of launching it; the kernels' names. Runs in a process of its own."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction, mangle_type

    names = []

    def compile_launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        fixed = {name: options.pop(name) for name in kernel.arg_names if name in options}
        values = inspect.signature(kernel.fn).bind(*args, **fixed).arguments
        constants = {name: value for name, value in values.items() if name in fixed or value is None}
        signature = {name: "constexpr" if name in constants else mangle_type(value) for name, value in values.items()}
        source = ASTSource(kernel, signature, constants)
        if triton.compile(source, target=GPUTarget(*HOPPER), options=options).asm["cubin"]:
            names.append(str(kernel.fn.__name__))

    JITFunction.run = compile_launch
    model = small_model(kind, head_dim=64, **changes).to(dtype)
    use_finch_attention(model)
    shape = answers, 2, 512, 64
    cache = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(2)]
    tokens = torch.zeros(answers, 1, dtype=torch.long)
    with torch.inference_mode():
        FusedStep(model, answers)(tokens, tokens[:, 0], cache)
    return names


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process whose Triton compiles and does not interpret."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield process


@pytest.mark.parametrize(
    ("kind", "changes", "dtype"),
    [
        ("llama", {}, torch.bfloat16),
        ("llama", {"attention_bias": True, "mlp_bias": True}, torch.float16),
        ("qwen3", {}, torch.float32),
    ],
    ids=["plain", "biases", "norms of heads"],
)
def test_every_kernel_of_a_step_compiles(
    compiler: ProcessPoolExecutor, kind: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    layer = ["_linear", "_attend", "_join", "_linear", "_gated_linear", "_linear"]
    assert compiler.submit(compiled, kind, changes, dtype, 1).result() == [*layer, *layer, "_linear"]
    assert compiler.submit(compiled, kind, changes, dtype, 3).result() == ["_attend", "_join"] * 2
