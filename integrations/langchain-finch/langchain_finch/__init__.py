"""LangChain on finch-rag: a chat model and an LLM that read every retrieved document, a chain, a reranker, a
retriever.

Example:
    >>> from langchain_finch import ChatFinch, create_finch_documents_chain
    >>> chain = create_retrieval_chain(retriever, create_finch_documents_chain(ChatFinch(model="embedded")))
"""

from .chains import create_finch_documents_chain
from .chat_models import ChatFinch
from .llms import FinchLLM
from .rerank import FinchReranker
from .retrievers import FinchRetriever

__all__ = ["ChatFinch", "FinchLLM", "FinchReranker", "FinchRetriever", "create_finch_documents_chain"]
