"""LlamaIndex on finch-rag: a drop-in LLM, a synthesizer with citations, a reranker, a retriever.

Example:
    >>> from llama_index.llms.finch import FinchLLM
    >>> query_engine = index.as_query_engine(llm=FinchLLM("embedded"), similarity_top_k=200)
"""

from .base import FinchLLM
from .messages import PassagesMessage
from .rerank import FinchRerank
from .retriever import FinchRetriever
from .synthesizer import FinchSynthesizer

__all__ = ["FinchLLM", "FinchRerank", "FinchRetriever", "FinchSynthesizer", "PassagesMessage"]
