"""The prompt templates that the installed frameworks bring: LlamaIndex and LangChain, every module of theirs."""

from __future__ import annotations

import importlib
import pkgutil
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

PACKAGES = ("llama_index.core", "langchain_core", "langchain_classic", "langchain")
_TEXTS = re.compile(r"PROMPT|TMPL|TEMPLATE|TEMPALTE")
_FIELD = re.compile(r"(?<!\{)\{(\w+)\}(?!\})")
# Fields that hold what was retrieved, or a text to work on; and those that hold what the user wants.
CONTEXTS = frozenset(
    "context context_str context_msg text summaries context_list docs doc summary reference_contexts passages "
    "assertions agent_trajectory new_lines messages chat_history history kg_response_str sql_response_str".split()
)
QUESTIONS = frozenset("question query query_str input user_input".split())


@dataclass(frozen=True)
class Installed:
    """A template of a framework.

    Attributes:
        name: Module and variable.
        text: With fields in braces.
    """

    name: str
    text: str

    @property
    def fields(self) -> set[str]:
        """Names of the fields."""
        return set(_FIELD.findall(self.text))

    @property
    def words(self) -> list[str]:
        """The framework's own words, in pieces between fields."""
        return [piece.replace("{{", "{").replace("}}", "}") for piece in _FIELD.split(self.text)[::2]]

    def filled(self, **values: str) -> str:
        """The prompt; a field that is not given gets its own name."""
        text = _FIELD.sub(lambda found: values.get(found[1], found[1]), self.text)
        return text.replace("{{", "{").replace("}}", "}")


@cache
def installed_prompts() -> list[Installed]:
    """Each template once that has a field, in one message; chat templates' messages are templates of their own."""
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in PACKAGES:
            for module in _modules(package):
                for name, value in list(vars(module).items()):
                    for text in _texts(name, value):
                        found.setdefault(text, f"{module.__name__}.{name}")
    return [Installed(name, text) for text, name in found.items() if Installed(name, text).fields]


def _modules(package: str) -> Iterator[ModuleType]:
    root = importlib.import_module(package)
    yield root
    for info in pkgutil.walk_packages(root.__path__, f"{package}.", onerror=lambda name: None):
        try:
            yield importlib.import_module(info.name)
        except Exception:
            continue  # needs a package that is not installed


def _texts(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if _TEXTS.search(name.upper()):
            yield value
        return
    parts = getattr(value, "message_templates", None) or getattr(value, "messages", None)
    if isinstance(parts, list):
        for part in parts:
            text = getattr(getattr(part, "prompt", None), "template", None) or getattr(part, "content", None)
            if isinstance(text, str):
                yield text
        return
    for attribute in ("template", "template_str"):
        text = getattr(value, attribute, None)
        if (
            isinstance(text, str)
            and hasattr(value, "format")
            and getattr(value, "template_format", "f-string") != "jinja2"
        ):
            yield text
            return
