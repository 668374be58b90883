"""What adapters of other frameworks build on, beside the public names of `finch_rag` itself."""

from __future__ import annotations

from .decode.constraint import can_force_json
from .prefill.planning import ChunkSize, Prior, Strategy
from .prefill.selection import Selection
from .prompts.builder import INSTRUCTIONS
from .prompts.chat_template import ASSISTANT, SYSTEM, USER, Message, Render
from .prompts.marked import CONTEXT_MARK, QUESTION_MARK, kind_of, parse_marked
from .prompts.parsing import ParsedPrompt
from .request import Cancelled
from .settings import CallOptions, ReadingOptions, check_options
from .sharing import release_engine, shared_engine
from .store.opening import StorePlace
from .streaming import AsyncAnswerStream

__all__ = [
    "ASSISTANT",
    "CONTEXT_MARK",
    "INSTRUCTIONS",
    "QUESTION_MARK",
    "SYSTEM",
    "USER",
    "AsyncAnswerStream",
    "CallOptions",
    "Cancelled",
    "ChunkSize",
    "Message",
    "ParsedPrompt",
    "Prior",
    "ReadingOptions",
    "Render",
    "Selection",
    "StorePlace",
    "Strategy",
    "can_force_json",
    "check_options",
    "kind_of",
    "parse_marked",
    "release_engine",
    "shared_engine",
]
