"""Where models get their engine from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finch_rag import Finch, SettingsError
from finch_rag.adapters import shared_engine


class EngineSource:
    """Where copies of a model get their engine from: one that was given, or one that is loaded at the first use.

    LangChain makes a new instance for each call of a model with configurable fields. Such copies share this, so that
    what one of them loads stays loaded.

    Args:
        given: An engine to use in any case.
    """

    def __init__(self, given: Finch | None = None) -> None:
        self.given = given
        self._loaded: dict[str, Finch] = {}

    def engine(self, model: str, loading: Mapping[str, Any]) -> Finch:
        """The engine of a model.

        Args:
            model: See `FinchSettings`.
            loading: Keyword arguments of `Finch.from_pretrained`.

        Raises:
            ModelError: If the model cannot be loaded, or Finch cannot run it.
        """
        if self.given is not None:
            return self.given
        key = repr((model, sorted(loading.items())))
        if key not in self._loaded:
            self._loaded[key] = shared_engine(model, **loading)
        return self._loaded[key]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EngineSource) and self.given is other.given

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineSource:
        return self

    def __copy__(self) -> EngineSource:
        return self

    def __reduce__(self) -> tuple[type[EngineSource], tuple[()]]:
        if self.given is not None:
            raise SettingsError(
                "a model with engine= cannot be pickled, because the engine holds a loaded model: pass model=, which "
                "is loaded again where it is unpickled"
            )
        return EngineSource, ()
