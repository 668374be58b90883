"""The prompts of RAG frameworks, by the words that they put around context and question.

Read off llama-index-core 0.14.25 and langchain-classic 1.0.8; LangChain's hub (rlm/rag-prompt, langchain-ai/
retrieval-qa-chat) and LangGraph's tutorial of agentic RAG, as of 2026.
"""

from __future__ import annotations

from .template import Template

_DASHES = "-" * 21
_NO_GUESSING = (
    "If you don't know the answer, just say that you don't know, don't try to make up an answer.",
    "If you don't know the answer, say that you don't know.",
    "If you don't know the answer, just say that you don't know.",
)
_BRIEF = "Use three sentences maximum and keep the answer concise."
_ASSISTANT = (
    "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer the "
    "question."
)
_REFINE_WORDING = (
    "to better answer the query. If the context isn't useful, return the original answer.",
    "to better answer the question. If the context isn't useful, return the original answer.",
    "(only if needed)",
)
_FRIENDLY = (
    "The assistant is talkative and provides lots of specific details from its context. If the assistant does not know "
    "the answer to a question, it truthfully says it does not know."
)
_TWO_MODES = (
    "1. **Rewrite** an original answer using the new context. 2. **Repeat** the original answer if the new context "
    "isn't useful. Never reference the original answer or context directly in your answer. When in doubt, just repeat "
    "the original answer."
)

# Each message is read as a whole: question and context stand in it.
IN_ONE_MESSAGE = (
    Template(
        "llama-index/text-qa",
        f"Context information is below.{{words}}\n{_DASHES}\n{{context}}\n{_DASHES}\n{{words}}"
        "Given the context information and not prior knowledge, answer the query.{words}\nQuery: {question}"
        "\nAnswer:",
    ),
    Template(
        "llama-index/tree-summarize",
        f"Context information from multiple sources is below.{{words}}\n{_DASHES}\n{{context}}\n{_DASHES}\n{{words}}"
        "Given the information from multiple sources and not prior knowledge, answer the query.{words}"
        "\nQuery: {question}\nAnswer:",
    ),
    Template(
        "llama-index/refine",
        "The original query is as follows: {question}\nWe have provided an existing answer: {answer}\n"
        "We have the opportunity to refine the existing answer{words}with some more context below.{words}"
        "\n------------\n{context}\n------------\nGiven the new context, refine the original answer{words}"
        "\nRefined Answer:",
        wording=_REFINE_WORDING,
    ),
    Template(
        "llama-index/refine-chat",
        "You are an expert Q&A system that strictly operates in two modes when refining existing answers:{words}"
        "\nNew Context: {context}\nQuery: {question}\nOriginal Answer: {answer}\nNew Answer:",
        wording=(_TWO_MODES,),
    ),
    Template(
        "llama-index/citation",
        "Please provide an answer based solely on the provided sources.{words}Now it's your turn. "
        "Below are several numbered sources of information:\n------\n{context}\n------\nQuery: {question}\nAnswer:",
        keeps_words=True,
    ),
    Template(
        "llama-index/citation-refine",
        "Please provide an answer based solely on the provided sources.{words}Now it's your turn. "
        "We have provided an existing answer: {words}\nBegin refining!\n------\n{context}\n------\n"
        "Query: {question}\nAnswer:",
        keeps_words=True,
    ),
    Template(
        "langchain/stuff",
        "Use the following pieces of context to answer the question at the end.{words}\n\n{context}"
        "\nQuestion: {question}\nHelpful Answer:",
        wording=_NO_GUESSING,
        open_start=True,
        open_end=True,
    ),
    Template(
        "langchain/refine-start",
        "Context information is below.{words}\n------------\n{context}\n------------\n{words}"
        "Given the context information and not prior knowledge, answer the question: {question}",
    ),
    Template(
        "langchain/refine",
        "The original question is as follows: {question}\nWe have provided an existing answer: {answer}\n"
        "We have the opportunity to refine the existing answer{words}with some more context below.{words}"
        "\n------------\n{context}\n------------\nGiven the new context, refine the original answer{words}",
        wording=_REFINE_WORDING,
    ),
    Template(
        "langchain/rag-prompt",
        f"{_ASSISTANT}{{words}}\nQuestion: {{question}}\nContext: {{context}}\nAnswer:",
        wording=(*_NO_GUESSING, _BRIEF),
    ),
    Template(
        "langgraph/agentic-rag",
        f"{_ASSISTANT}{{words}}\nQuestion: {{question}}\nContext: {{context}}",
        wording=(*_NO_GUESSING, _BRIEF),
        open_end=True,
    ),
)
# The context stands in a system message, the question in the user's.
IN_SYSTEM_MESSAGE = (
    Template(
        "llama-index/context-chat",
        "Use the context information below to assist the user.{words}\n--------------------\n{context}"
        "\n--------------------\n{rest}",
    ),
    Template(
        "llama-index/context-chat-refine",
        "Using the context below, refine the following existing answer using the provided context to assist the user."
        "{words}\n--------------------\n{context}\n--------------------\nExisting Answer:\n{answer}"
        "\n--------------------\n{rest}",
        wording=("If the context isn't helpful, just repeat the existing answer and nothing more.",),
    ),
    Template(
        "llama-index/condense-plus-context",
        "The following is a friendly conversation between a user and an AI assistant.{words}"
        "Here are the relevant documents for the context:{context}"
        "\nInstruction: Based on the above documents, provide a detailed answer for the user question below.\n"
        'Answer "don\'t know" if not present in the document.{rest}',
        wording=(_FRIENDLY,),
    ),
    Template(
        "llama-index/condense-plus-context-refine",
        "The following is a friendly conversation between a user and an AI assistant.{words}"
        "Here are the relevant documents for the context:{context}"
        "\nExisting Answer:\n{answer}"
        "\nInstruction: Refine the existing answer using the provided context to assist the user.\n"
        "If the context isn't helpful, just repeat the existing answer and nothing more.{rest}",
        wording=(_FRIENDLY,),
    ),
    Template(
        "langchain/stuff-chat",
        "Use the following pieces of context to answer the user's question.{words}\n----------------\n{context}",
        wording=_NO_GUESSING,
        open_end=True,
    ),
    Template(
        "langchain/refine-start-chat",
        "Context information is below.{words}\n------------\n{context}\n------------\n{words}"
        "Given the context information and not prior knowledge, answer any questions{rest}",
    ),
    Template(
        "langchain/retrieval-qa-chat",
        "Answer any use questions based solely on the context below:{words}\n<context>{context}</context>{rest}",
    ),
    Template(
        "langchain/rag-chat",
        f"{_ASSISTANT}{{words}}\n\n{{context}}",
        wording=(*_NO_GUESSING, _BRIEF),
        open_start=True,
        open_end=True,
    ),
)
# LlamaIndex puts it before its own prompts for chat models; it says no more than Finch's own.
DEFAULT_SYSTEM_PROMPT = (
    "You are an expert Q&A system that is trusted around the world.\n"
    "Always answer the query using the provided context information, and not prior knowledge.\n"
    "Some rules to follow:\n1. Never directly reference the given context in your answer.\n"
    "2. Avoid statements like 'Based on the context, ...' or 'The context information ...' or anything along "
    "those lines."
)
