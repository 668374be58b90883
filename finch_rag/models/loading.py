"""Loading models: a hub id, a local folder, a GGUF file, or the embedded model."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.distributed.configuration_utils import DistributedConfig

from ..errors import ModelError, first_line
from ..paths import cache_folder
from .embedded import EMBEDDED, EMBEDDED_NAME, embedded_folder, require_gguf, unpacked_gguf
from .gguf_header import check_gguf
from .parallel import is_spread
from .processes import check_not_forked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SPREADS = ("tp_plan", "tp_size", "distributed_config", "device_mesh")  # a model over several processes
_HUB_OPTIONS = ("cache_dir", "revision", "subfolder", "token")  # of configuration and tokenizer too


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        model: In evaluation mode, on its device.
        tokenizer: Its tokenizer.
        name: For reports.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_model(
    model: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    tokenizer: str | Path | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    tokenizer_kwargs: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Loads a decoder-only model with its tokenizer.

    Args:
        model: "embedded", a local folder, a GGUF file or a hub id.
        dtype: A torch dtype or its name; "auto" takes the checkpoint's on an accelerator, and on a CPU bfloat16 where
            it has instructions for it, else float32.
        device: A torch device; "auto" takes the first CUDA device, else the CPU.
        trust_remote_code: Whether code that comes with the model may run.
        tokenizer: Hub id or folder of the tokenizer, where it is not the model's.
        model_kwargs: Handed to transformers' ``from_pretrained``: ``revision``, ``device_map`` or ``tp_plan`` (which
            then decide the device, see docs/serving.md), ``quantization_config`` (also for a GGUF file, which is
            unpacked first) and so on.
        tokenizer_kwargs: Handed to the tokenizer's ``from_pretrained``: ``use_fast``, ``subfolder`` and so on.

    Raises:
        ModelError: If the model is unknown, damaged or incomplete, or not a decoder.
        InputError: In a fork of a process that has computed, see `finch_rag.models.processes`.
        MissingExtraError: If a GGUF file is to be read and the packages for that are not installed.
    """
    device = resolve_device(device)
    check_not_forked(device)
    extra = dict(model_kwargs or {})
    trusted: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    options = trusted | {key: extra.pop(key) for key in _HUB_OPTIONS if key in extra}
    name, source = str(model), str(model)
    if name == EMBEDDED:
        name, source = EMBEDDED_NAME, str(embedded_folder())
    elif Path(source).is_file():
        require_gguf()
        file = Path(source)
        check_gguf(file)
        name, source, options["gguf_file"] = file.name, str(file.parent), file.name
    try:
        with ExitStack() as unpacked:
            if "gguf_file" in options and _quantises_anew(extra.get("quantization_config")):
                source = str(unpacked.enter_context(_unpacked(Path(source) / options.pop("gguf_file"))))
            config = AutoConfig.from_pretrained(source, **options)
            if config.is_encoder_decoder:
                raise ModelError(f"{name} is an encoder-decoder; Finch runs decoder-only models such as Llama or Qwen")
            loaded_tokenizer = AutoTokenizer.from_pretrained(
                source if tokenizer is None else str(tokenizer),
                **{**(options if tokenizer is None else trusted), **(tokenizer_kwargs or {})},
            )
            _check_words(name if tokenizer is None else str(tokenizer), loaded_tokenizer)
            if any(extra.get(option) is not None for option in _SPREADS) and _is_quantised(config, extra):
                raise ModelError(
                    f"the weights of {name} are quantised, which is not supported under tensor parallelism: use "
                    "device_map in place of tp_plan"
                )
            extra = _as_distributed(extra)
            extra = {"dtype": resolve_dtype(dtype, device, config), **extra}
            if _is_quantised(config, extra) and importlib.util.find_spec("accelerate") is not None:
                extra.setdefault("device_map", {"": str(device)})  # some are quantised, or packed, on a GPU alone
            loaded = _weights(name, source, config, {**options, **extra})
    except ModelError:
        raise
    except Exception as error:  # transformers, tokenizers and gguf raise whatever their parsers hit
        expected = f'expected a hub id, a folder that save_pretrained wrote, a .gguf file, or "{EMBEDDED}"'
        raise _cannot_load(name, error, expected) from error
    try:
        if "device_map" not in extra and not any(map(is_spread, loaded.parameters())):
            torch.nn.Module.to(loaded, device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"cannot put {name} on the device {str(device)!r}: {first_line(error)}") from error
    return LoadedModel(loaded.eval(), loaded_tokenizer, name)


def _as_distributed(options: dict[str, Any]) -> dict[str, Any]:
    """Options with a tensor parallel plan where this release of transformers takes it."""
    own = [name for name in ("tp_plan", "tp_size") if options.get(name) is not None]
    fields = getattr(DistributedConfig, "__dataclass_fields__", {})
    if not own or "distributed_config" in options or not fields.keys() >= {*own}:
        return options
    rest = {name: value for name, value in options.items() if name not in own}
    return {**rest, "distributed_config": DistributedConfig(**{name: options[name] for name in own})}


@contextmanager
def _unpacked(file: Path) -> Iterator[Path]:
    """A folder with the weights of a GGUF file that are to be quantised anew, while it is needed."""
    with ExitStack() as unpacked:
        try:
            folder = unpacked.enter_context(unpacked_gguf(file))
        except ModelError:
            raise
        except Exception as error:
            place = f"for quantization_config it is unpacked into {cache_folder('models')}; XDG_CACHE_HOME moves that"
            raise _cannot_load(file.name, error, place) from error
        yield folder


def _weights(name: str, source: str, config: Any, options: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a checkpoint, complete."""
    try:
        made: Any = _auto_class(config).from_pretrained(source, output_loading_info=True, **options)
    except Exception as error:
        if not _is_quantised(config, options):
            raise
        needs = "its weights are quantised, which may need another device, dtype or package; see transformers' log"
        raise _cannot_load(name, error, needs) from error
    loaded: PreTrainedModel
    loaded, found = made
    _check_complete(name, found)
    return loaded


def _cannot_load(name: str, error: Exception, hint: str) -> ModelError:
    return ModelError(f"cannot load the model {name!r}: {first_line(error)} ({hint})")


def _auto_class(config: Any) -> Any:
    """The class of transformers that loads a decoder, also one that sees or hears."""
    sees = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def _quantises_anew(quantisation: Any) -> bool:
    """Whether weights are to be quantised otherwise than they lie in a GGUF file, which transformers refuses to do."""
    return quantisation is not None and type(quantisation).__name__ != "GgufConfig"  # older transformers have none


def _is_quantised(config: Any, options: Mapping[str, Any]) -> bool:
    """Whether weights are quantised, in the checkpoint or when they are loaded."""
    parts = (config, config.get_text_config(decoder=True))
    asked = options.get("quantization_config")
    return asked is not None or any(getattr(part, "quantization_config", None) is not None for part in parts)


def _check_words(name: str, tokenizer: Any) -> None:
    """Raises if a tokenizer has special tokens alone: what transformers makes of a folder without its files."""
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ModelError(f"{name!r} has no tokenizer: add its files (tokenizer.json), or name another by tokenizer=")


def _check_complete(name: str, found: Mapping[str, Any]) -> None:
    """Raises if weights were not in the checkpoint, or of another shape: transformers makes them up at random."""
    missing = sorted(map(str, found.get("missing_keys") or ()))
    reshaped = found.get("mismatched_keys") or ()  # names, or tuples of name and shapes
    mismatched = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in reshaped)
    for weights, what in ((missing, "lacks"), (mismatched, "has another shape for")):
        if weights:
            shown = ", ".join(weights[:3]) + (", ..." if len(weights) > 3 else "")
            raise ModelError(
                f"the checkpoint of {name!r} {what} {len(weights)} of the weights that its configuration names "
                f"({shown}): download or save the model again"
            )


def resolve_device(device: str | torch.device) -> torch.device:
    """Resolves "auto" to the first CUDA device where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device {device!r} is not one that torch knows: use auto, cpu, cuda or cuda:N") from error


def resolve_dtype(dtype: str | torch.dtype, device: torch.device, config: Any) -> torch.dtype:
    """Resolves "auto" to the dtype that runs fast on a device."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ModelError(f"dtype {dtype!r} is unknown: use auto, float32, bfloat16 or float16")
        return found
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) and stored != torch.float32 else torch.bfloat16


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware.

    With such instructions the prototype read twice as fast in bfloat16 as in float32; without them it is emulated, and
    a matrix product of the embedded model's shape takes twice as long.
    """
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older torch
    names = ("avx512_bf16", "amx_bf16") if platform.machine() in ("x86_64", "AMD64") else ("bf16",)
    return any(capabilities.get(name, False) for name in names)
