"""Every text decoder family of transformers: read by the loop, read alone by its own attention, or refused by name."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .families import FAMILIES, LEFT_OUT, config_of
from .model_table import LISTED, listed, prompts, row_of
from .small import model_of

NEWEST = Version(transformers.__version__) >= LISTED


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_what_the_docs_say(kind: str) -> None:
    """`python -m tests.model_table` writes the table anew."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    try:
        model_of(config_of(kind), "eager")
    except Exception as error:
        if NEWEST:
            raise
        pytest.skip(f"transformers {transformers.__version__} has another configuration: {error!r}")
    row = row_of(kind)  # which raises where Finch computes something else than the model
    if NEWEST:
        assert row == listed()[kind]


def test_the_docs_name_every_family() -> None:
    """A release with a new one makes this fail: build it small, and write the table anew."""
    if not NEWEST:
        pytest.skip(f"the table is of transformers {LISTED}")
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(FAMILIES) | set(LEFT_OUT)


def test_the_docs_tell_the_peculiarities_of_prompts() -> None:
    assert [row for row in prompts() if row not in listed().values()] == []
