from __future__ import annotations

import pytest

from finch_rag import errors
from finch_rag.errors import (
    CorpusError,
    DeviceMemoryError,
    FinchError,
    InputError,
    MissingExtraError,
    ModelError,
    NumericsError,
    SettingsError,
    StoreError,
    WindowError,
)

ALL = (
    CorpusError,
    DeviceMemoryError,
    InputError,
    MissingExtraError,
    ModelError,
    NumericsError,
    SettingsError,
    StoreError,
    WindowError,
)


@pytest.mark.parametrize("error", ALL)
def test_every_error_is_a_finch_error_and_a_runtime_error(error: type[Exception]) -> None:
    assert issubclass(error, FinchError)
    assert issubclass(error, RuntimeError)


def test_the_list_of_errors_is_complete() -> None:
    defined = {e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, FinchError)}
    assert defined == {FinchError, *ALL}


def test_only_a_settings_error_is_a_value_error() -> None:  # LlamaIndex swallows ValueError during a query
    assert [error for error in ALL if issubclass(error, (ValueError, TypeError))] == [SettingsError]


def test_branches_of_the_tree() -> None:
    assert issubclass(WindowError, InputError)
    assert issubclass(NumericsError, ModelError)
    assert issubclass(MissingExtraError, ImportError)
    assert not issubclass(ModelError, InputError)


def test_a_missing_extra_names_package_and_command() -> None:
    error = MissingExtraError.of("faiss-cpu", "retrieval")
    assert "faiss-cpu" in str(error)
    assert "pip install 'finch-rag[retrieval]'" in str(error)
