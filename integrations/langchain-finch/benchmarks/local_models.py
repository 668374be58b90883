"""Other ways to run a local model in LangChain, beside ChatFinch: the table of the README.

All answer the same questions about the example corpus, with the same model and the same vector store: ChatFinch from
all documents, the others from the best three, and from the best 40, which nearly fill the model's window. Beside what
the rest of the repository needs:

    pip install --no-deps langchain-huggingface==1.2.3
    python integrations/langchain-finch/benchmarks/local_models.py

Without its dependencies, because that release wants huggingface-hub<2, and what it uses of it is in 2.4, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.language_models import BaseLanguageModel
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import Runnable
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_finch import ChatFinch, create_finch_documents_chain
from langchain_huggingface import ChatHuggingFace, HuggingFaceEmbeddings, HuggingFacePipeline
from transformers import PreTrainedModel

from finch_rag.corpus import Question, load_questions, read_corpus
from finch_rag.corpus.example import example_corpus
from finch_rag.corpus.metrics import contains_answer
from finch_rag.corpus.retrieval import embedding_model_folder
from finch_rag.models.embedded import embedded_folder

NEW_TOKENS = 32
FEW, MANY = 3, 40
PROMPT = PromptTemplate.from_template(
    "Answer the question in a few words, based only on the following context:\n{context}\n\nQuestion: {input}"
)


class Calls(BaseCallbackHandler):
    """Counts the calls of a model."""

    made = 0

    def on_llm_start(self, *args: Any, **kwargs: Any) -> None:
        """Of a completion model."""
        self.made += 1

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        """Of a chat model."""
        self.made += 1


class TokensRead:
    """Counts the tokens that a model reads before it answers, whoever calls it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.count = 0
        model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        if args[0].shape[-1] > 1:  # one token is a step of the answer
            self.count += args[0].shape[-1]


def pipeline(**options: Any) -> HuggingFacePipeline:
    """The embedded model, run by transformers."""
    return HuggingFacePipeline.from_model_id(
        str(embedded_folder()),
        "text-generation",
        model_kwargs={"dtype": "float32"},
        pipeline_kwargs={"max_new_tokens": NEW_TOKENS, "do_sample": False, **options},
    )


def measure(chain: Runnable[Any, Any], read: TokensRead, questions: list[Question]) -> dict[str, Any]:
    """What a chain does with questions: medians of a question, and how many answers are right.

    Seconds of the processor, of all cores together, are the better measure where other programs run, too.
    """
    seconds, processor, tokens, right, found, calls = [], [], [], 0, 0, Calls()
    for question in questions:
        started, ran, read.count = time.perf_counter(), time.process_time(), 0
        result = chain.invoke({"input": question.question}, config={"callbacks": [calls]})
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - ran)
        tokens.append(read.count)
        right += contains_answer(result["answer"], question.answers)
        found += bool({document.id for document in result["context"]} & set(question.gold_ids))
        sys.stderr.write(f"{seconds[-1]:.1f} s, {processor[-1]:.1f} s of the processor: {result['answer']!r}\n")
    return {
        "calls": calls.made / len(questions),
        "tokens read": statistics.median(tokens),
        "seconds": round(statistics.median(seconds), 1),
        "processor seconds": round(statistics.median(processor), 1),
        "right": f"{right} of {len(questions)}",
        "passage among the documents": f"{found} of {len(questions)}",
    }


def behaviour(model: BaseLanguageModel[Any], default: BaseLanguageModel[Any]) -> dict[str, Any]:
    """Whether a model echoes its prompt as it comes, and obeys options of a call."""
    prompt = "Count from one to ten in words."

    def said(asked: BaseLanguageModel[Any], **options: Any) -> str:
        answer = asked.invoke(prompt, **options)
        return str(getattr(answer, "content", answer))

    whole = said(model)
    word = whole.split()[3]
    return {
        "echoes the prompt": prompt in said(default),
        "stop obeyed": word not in said(model, stop=[word]),
        "max_tokens of a call obeyed": len(said(model, max_tokens=3)) < len(whole),
    }


def main() -> None:
    """Prints one line of JSON for each way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=5, help="how many of the corpus's questions, from the first")
    questions = load_questions(example_corpus() / "questions.jsonl")[: parser.parse_args().questions]
    documents = [Document(p.text, id=p.id, metadata={"title": p.title}) for p in read_corpus(example_corpus()).passages]
    embeddings = HuggingFaceEmbeddings(model_name=str(embedding_model_folder()))
    store = InMemoryVectorStore.from_documents(documents, embeddings)
    plain, default = pipeline(return_full_text=False), pipeline()
    chat = ChatHuggingFace(llm=plain)
    finch = ChatFinch(model="embedded", dtype="float32", max_tokens=NEW_TOKENS)
    finch.engine.retrieval_heads()  # found once a model, and then stored
    read, read_by_finch = TokensRead(plain.pipeline.model), TokensRead(finch.engine.model)
    of_pipeline, of_chat = create_stuff_documents_chain(plain, PROMPT), create_stuff_documents_chain(chat, PROMPT)
    ways: list[tuple[str, Runnable[Any, Any], int, TokensRead, dict[str, Any]]] = [
        ("HuggingFacePipeline", of_pipeline, FEW, read, behaviour(plain, default)),
        ("ChatHuggingFace", of_chat, FEW, read, behaviour(chat, ChatHuggingFace(llm=default))),
        ("ChatHuggingFace", of_chat, MANY, read, {}),
        ("ChatFinch", create_finch_documents_chain(finch), len(documents), read_by_finch, behaviour(finch, finch)),
    ]
    for name, chain, k, counter, behaved in ways:
        retrieval = create_retrieval_chain(store.as_retriever(search_kwargs={"k": k}), chain)
        row = {"model": name, "documents": k, **measure(retrieval, counter, questions), **behaved}
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
