"""A folder of text: read as passages, searched, and questions about it graded."""

from __future__ import annotations

from .reading import Corpus, Question, load_questions, read_corpus

__all__ = ["Corpus", "Question", "load_questions", "read_corpus"]
