"""What commands do before they begin: check their numbers, load an engine with its progress shown."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from ..errors import InputError
from ..models.embedded import EMBEDDED
from .output import err
from .progress import ProgressBars

if TYPE_CHECKING:
    from ..engine import Finch
    from ..settings import EngineSettings


# torchao, which transformers imports where it is installed, names each of its kernels that this machine cannot load.
_TALKATIVE = ("torchao", "torch.utils._pytree")


def check_positive(**options: int | None) -> None:
    """Raises an InputError that names the first option below 1, before models are loaded."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}: the least is 1")


def load_finch(model: str, bars: ProgressBars, dtype: str = "auto", **settings: Unpack[EngineSettings]) -> Finch:
    """An engine whose progress is shown; the libraries below it are kept quiet."""
    local = model == EMBEDDED or Path(model).exists()
    waiting = bars.busy(f"loading {model}") if local else nullcontext()  # a download has bars of its own
    with waiting:
        for library in _TALKATIVE:
            logging.getLogger(library).setLevel(logging.ERROR)
        import transformers

        from ..engine import Finch

        transformers.logging.set_verbosity_error()
        if local or not err.is_terminal:
            transformers.logging.disable_progress_bar()
        settings["on_progress"] = bars
        finch = Finch.from_pretrained(model, dtype=dtype, **settings)
        transformers.logging.disable_progress_bar()  # the embedding model is loaded by the same library
        return finch
