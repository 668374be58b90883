"""Prompts of frameworks that set a task over a text: summarise, grade, extract, choose.

They are read whole wherever they fit. Where they do not, all their words are kept, and the text is what may be evicted.
Their first and last words, and those next to the text, are enough to know them by. Read off llama-index-core 0.14.25,
langchain 1.4.7 and langchain-classic 1.0.8, and LangGraph's tutorial of agentic RAG, as of 2026.
"""

from __future__ import annotations

from .template import Template

_DASHES = "-" * 21

TASKS = tuple(
    Template(name, pattern, keeps_words=True)
    for name, pattern in (
        ("llama-index/title", "Context: {context}. Give a title that summarizes {words} Title:"),
        (
            "llama-index/title-of-titles",
            "{context}. Based on the above candidate titles and content, {words} Title:",
        ),
        (
            "llama-index/keywords-of-node",
            "{context}. Give {words} unique keywords for this document. Format as comma separated. Keywords:",
        ),
        ("llama-index/questions", "Here is the context:\n{context}\n\nGiven the contextual information, {words}"),
        ("llama-index/section-summary", "Here is the content of the section:\n{context}\n\nSummarize the key {words}"),
        (
            "llama-index/extract",
            "Here is the content of the section:\n----------------\n{context}\n----------------\nGiven the contextual"
            " information, {words}",
        ),
        ("llama-index/summary", 'Write a summary of the following.{words}\n\n\n{context}\n\n\nSUMMARY:"""'),
        (
            "llama-index/faithfulness",
            "Please tell if a given piece of information{words}crosswise strips).\nAnswer: NO\nInformation: {words}"
            "\nContext: {context}\nAnswer:",
        ),
        (
            "llama-index/faithfulness-llama",
            "Please tell if a given piece of information{words}products and services.\nAnswer: YES\n\nInformation: "
            "{words}\nContext: {context}\nAnswer:",
        ),
        (
            "llama-index/relevancy",
            "Your task is to evaluate if the response for the query{words}\nContext:{context}\nAnswer:",
        ),
        (
            "llama-index/context-relevancy",
            "Your task is to evaluate if the retrieved context{words}\n\nQuery:{words}\nContext:{context}\nFeedback:",
        ),
        (
            "llama-index/evaluation-refine",
            "We want to understand if the following {words}\n------------\n{context}\n------------\nIf the existing "
            "{words}",
        ),
        (
            "llama-index/question-generation",
            f"Context information is below.\n{_DASHES}\n{{context}}\n{_DASHES}\nGiven the context information and not"
            " prior knowledge.{words}",
        ),
        (
            "llama-index/choice-select",
            "A list of documents is shown below.{words}Let's try this now:{context}\nQuestion: {words}\nAnswer:",
        ),
        (
            "llama-index/keywords",
            f"Some text is provided below.{{words}}stopwords.{_DASHES}{{context}}\n{_DASHES}"
            f"\nProvide keywords {{words}}",
        ),
        (
            "llama-index/triplets",
            f"Some text is provided below.{{words}}(Philz, founded in, 1982)\n{_DASHES}\nText: {{context}}\nTriplets:",
        ),
        (
            "llama-index/dynamic-triplets",
            f"Extract up to {{words}} knowledge triplets {{words}}'RESEARCH_TOPIC'}}]\n{_DASHES}\nText: {{context}}"
            "\nOutput:",
        ),
        (
            "llama-index/dynamic-triplets-with-properties",
            f"Extract up to {{words}} knowledge triplets {{words}}'val', ...}}}}]\n{_DASHES}\nText: {{context}}"
            f"\nOutput:",
        ),
        (
            "llama-index/schema-triplets",
            "Give the following text, extract the knowledge graph{words}\n-------\n{context}\n-------",
        ),
        (
            "llama-index/tree-insert",
            f"Context information is below. It is provided in a numbered list{{words}}\n{_DASHES}\n{{context}}"
            f"{_DASHES}\nGiven the context information, here is a new piece{{words}}",
        ),
        (
            "llama-index/tree-select",
            f"Some choices are given below.{{words}}\n{_DASHES}\n{{context}}\n{_DASHES}\nUsing only the choices above"
            "{words}",
        ),
        (
            "llama-index/sql-answer",
            "Given an input question, synthesize a response{words}\nSQL Response: {context}\nResponse:",
        ),
        (
            "llama-index/graph-answer",
            "The original question is given below.{words}\nGraph response: {context}\nResponse:",
        ),
        (
            "llama-index/fields",
            "We wish to extract relevant fields{words}-text-----------\n{context}"
            "\n-----------schema-----------\n{words}\nFields:",
        ),
        (
            "llama-index/private",
            'The current context information is provided.{words}July 31st"}\nContext:\n'
            "{context}\nTask: {words}\nOutput:",
        ),
        ("langchain/summary", 'Write a concise summary of the following:{words}"{context}"\n\n\nCONCISE SUMMARY:'),
        (
            "langchain/summary-refine",
            "Your job is to produce a final summary.{words}\n------------\n{context}\n------------\nGiven the new "
            "context, refine the original summary.{words}",
        ),
        (
            "langchain/map-reduce",
            "Use the following portion of a long document{words}Return any relevant text verbatim.\n{context}"
            "\nQuestion: {words}\nRelevant text, if any:",
        ),
        (
            "langchain/with-sources",
            "Given the following extracted parts of a long document and a question, create a final answer with"
            " references{words}The president did not mention Michael Jackson.\nSOURCES:\n\nQUESTION: {words}\n========="
            "\n{context}\n=========\nFINAL ANSWER:",
        ),
        (
            "langchain/combine",
            "Given the following extracted parts of a long document and a question, create a final answer.{words}"
            "\nFINAL ANSWER: The president did not mention Michael Jackson.\n\nQUESTION: {words}\n=========\n{context}"
            "\n=========\nFINAL ANSWER:",
        ),
        (
            "langchain/refine-chat",
            "We have the opportunity to refine the existing answer{words}\n------------\n{context}\n------------\n"
            "Given the new context, refine {words}",
        ),
        (
            "langchain/question-generation",
            "You are a smart assistant designed to help high school teachers{words}for the following text:"
            "\n----------------\n{context}",
        ),
        (
            "langchain/quiz",
            "You are a teacher coming up with questions{words}Begin!\n\n<Begin Document>{context}<End Document>",
        ),
        (
            "langchain/grade",
            "You are a teacher grading a quiz.{words}Begin!\n\nQUESTION: {words}\nCONTEXT: {context}"
            "\nSTUDENT ANSWER: {words}",
        ),
        (
            "langchain/extract",
            "Given the following question and context, extract any part{words}> Context:\n>>>\n{context}\n>>>\n"
            "Extracted relevant parts:",
        ),
        (
            "langchain/filter",
            "Given the following question and context, return YES{words}> Context:\n>>>\n{context}\n>>>\n"
            "> Relevant (YES / NO):",
        ),
        ("langchain/facts", 'Given some text, extract a list of facts{words}Text:\n"""\n{context}\n"""\n\nFacts:'),
        (
            "langchain/assertions",
            'You are an expert fact checker.{words}\n"""\n{context}\n"""\n\nFor each fact, determine {words}',
        ),
        (
            "langchain/trajectory",
            "An AI language model has been given access {words}[AGENT_TRAJECTORY]\n{context}\n[END_AGENT_TRAJECTORY]"
            "{words}",
        ),
        (
            "langchain/conversation-summary",
            "Progressively summarize the lines of conversation{words}END OF EXAMPLE\n\nCurrent summary:{words}"
            "\n\nNew lines of conversation:\n{context}\n\nNew summary:",
        ),
        (
            "langgraph/grade",
            "You are a grader assessing relevance of a retrieved document{words}Here is the retrieved document:"
            "{context}\nHere is the user question: {words}",
        ),
        ("langchain/middleware-summary", "<role>{words}<messages>\nMessages to summarize:\n{context}</messages>"),
        (
            "langchain/condense",
            "Given the following conversation{words}Chat History:\n{context}\nFollow Up Input: "
            "{words}\nStandalone question:",
        ),
        (
            "llama-index/condense",
            "Given a conversation (between Human and Assistant){words}<Chat History>\n{context}"
            "\n\n<Follow Up Message>{words}<Standalone question>",
        ),
    )
)
# LangChain's map_rerank begins and ends as its stuff prompt does; its examples are no passages.
MAP_RERANK = Template(
    "langchain/map-rerank",
    "Use the following pieces of context to answer the question at the end. If you don't know the answer, just say "
    "that you don't know, don't try to make up an answer. In addition to giving an answer, also return a score"
    "{words}Begin!\n\nContext:\n---------\n{context}\n---------\nQuestion: {words}\nHelpful Answer:",
    keeps_words=True,
)
# A task whose text stands in a system message, the question in the user's.
TASKS_IN_SYSTEM_MESSAGE = tuple(
    Template(name, pattern, keeps_words=True, open_end=True)
    for name, pattern in (
        (
            "langchain/map-reduce-chat",
            "Use the following portion of a long document{words}\n______________________\n{context}",
        ),
        (
            "langchain/combine-chat",
            "Given the following extracted parts of a long document{words}\n______________________\n{context}",
        ),
    )
)
