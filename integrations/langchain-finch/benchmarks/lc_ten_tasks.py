"""Ten tasks of LangChain, with ChatFinch, ChatHuggingFace and HuggingFacePipeline: a table of the README.

All run the embedded model on the CPU, through LangChain's own components. What is looked at is the plumbing: whether
the model read the whole question and every text, whether its window was kept, and whether the framework got the object
that it promises. A model of 135M parameters is often wrong; that is not looked at. It needs what `local_models` needs:

    pip install --no-deps langchain-huggingface==1.2.3
    python integrations/langchain-finch/benchmarks/lc_ten_tasks.py
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from langchain.agents import create_agent
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.chains.question_answering import load_qa_chain
from langchain_classic.chains.summarize import load_summarize_chain
from langchain_classic.evaluation import load_evaluator
from langchain_classic.evaluation.schema import EvaluatorType
from langchain_classic.retrievers.document_compressors import LLMChainExtractor, LLMListwiseRerank
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_finch import ChatFinch, create_finch_documents_chain
from langchain_huggingface import ChatHuggingFace, HuggingFaceEmbeddings
from local_models import PROMPT, Calls, pipeline
from pydantic import BaseModel
from transformers import AutoTokenizer, PreTrainedModel

from finch_rag.corpus import load_questions, read_corpus
from finch_rag.corpus.example import example_corpus
from finch_rag.corpus.retrieval import embedding_model_folder
from finch_rag.models.embedded import embedded_folder

WINDOW = 8192
NEW_TOKENS = 64
OVER_THE_WINDOW = 60  # passages of the corpus; about 10,000 tokens
SHOWN = 28  # characters of a passage by which it is found in what a model read
SAID = 150  # characters of an error in the table
PASSAGES = read_corpus(example_corpus()).passages
QUESTION = load_questions(example_corpus() / "questions.jsonl")[0].question
STATEMENT = "Morag Tulloch was the first keeper of the Skerry Holm light."
DOCUMENTS = [Document(passage.text, id=passage.id, metadata={"title": passage.title}) for passage in PASSAGES]
TEXTS = [passage.text for passage in PASSAGES]


class Lighthouse(BaseModel):
    """What a text says about a lighthouse."""

    name: str
    height_in_metres: int


class Read:
    """What a model reads before it answers, whoever calls it."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.passes: list[list[int]] = []
        self._tokenizer = tokenizer
        model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        if args[0].shape[-1] > 1:  # one token is a step of the answer
            self.passes.extend(args[0].reshape(-1, args[0].shape[-1]).tolist())

    def tokens(self) -> int:
        """Of all passes."""
        return sum(map(len, self.passes))

    def longest(self) -> int:
        """Tokens of the longest pass."""
        return max(map(len, self.passes), default=0)

    def text(self) -> str:
        """All passes, one after the other."""
        return "".join(self._tokenizer.batch_decode(self.passes))


class CallsAndKept(Calls):
    """Counts the calls of a model, and what Finch keeps."""

    kept = context = 0

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        """Of both kinds of models."""
        metadata = getattr(getattr(response.generations[0][0], "message", None), "response_metadata", {})
        if report := metadata.get("report"):
            self.kept += report["kept_tokens"]
            self.context += report["context_tokens"]


@dataclass(frozen=True)
class Task:
    """Something that a user does with an LLM.

    Attributes:
        name: What it is called in the table.
        run: Does it.
        promised: Class of what the framework hands back.
        asked: What must reach the model.
        texts: Texts that must be read, too.
        is_useful: Whether a result of that class holds what it is for.
        lacking: What is said where it does not.
        needs_all: The answer needs all texts, so that leaving some out is a caveat.
    """

    name: str
    run: Callable[[Any], Any]
    promised: type | tuple[type, ...]
    asked: Sequence[str]
    texts: Sequence[str] = ()
    is_useful: Callable[[Any], bool] = bool
    lacking: str = "an empty answer"
    needs_all: bool = False


def retrieved(llm: Any) -> Any:
    """An answer from all documents: by Finch's chain, or by LangChain's."""
    is_finch = isinstance(llm, ChatFinch)
    chain = create_finch_documents_chain(llm) if is_finch else create_stuff_documents_chain(llm, PROMPT)
    embeddings = HuggingFaceEmbeddings(model_name=str(embedding_model_folder()))
    retriever = InMemoryVectorStore.from_documents(DOCUMENTS, embeddings).as_retriever(
        search_kwargs={"k": len(DOCUMENTS)}
    )
    return create_retrieval_chain(retriever, chain).invoke({"input": QUESTION})


def conversation() -> list[BaseMessage]:
    """A history that does not fit into the window, and a question."""
    turns: list[BaseMessage] = []
    for passage in PASSAGES[:OVER_THE_WINDOW]:
        turns += [HumanMessage(f"What do you know about {passage.title}?"), AIMessage(passage.text)]
    return [*turns, HumanMessage(QUESTION)]


def evaluated(llm: Any) -> Any:
    """Whether an answer is right, by twenty texts."""
    evaluator: Any = load_evaluator(EvaluatorType.CONTEXT_QA, llm=llm)
    return evaluator.evaluate_strings(prediction=STATEMENT, input=QUESTION, reference="\n\n".join(TEXTS[:20]))


def tasks() -> list[Task]:
    """Ten of them."""
    return [
        Task(
            "RAG: `create_retrieval_chain`, all 108 documents",
            retrieved,
            dict,
            [QUESTION],
            TEXTS,
            lambda result: bool(result["answer"].strip()),
        ),
        Task(
            "chat over the window: `invoke`, 120 earlier messages",
            lambda llm: llm.invoke(conversation()),
            (AIMessage, str),
            [QUESTION],
            TEXTS[:OVER_THE_WINDOW],
            lambda result: bool(getattr(result, "content", result).strip()),
        ),
        Task(
            f"summarise: `load_summarize_chain`, stuff, {OVER_THE_WINDOW} documents",
            lambda llm: load_summarize_chain(llm, "stuff").invoke({"input_documents": DOCUMENTS[:OVER_THE_WINDOW]}),
            dict,
            ["Write a concise summary of the following"],
            TEXTS[:OVER_THE_WINDOW],
            lambda result: bool(result["output_text"].strip()),
            needs_all=True,
        ),
        Task(
            "extract: `LLMChainExtractor`, 3 documents",
            lambda llm: LLMChainExtractor.from_llm(llm).compress_documents(DOCUMENTS[:3], QUESTION),
            list,
            [QUESTION, "*DO NOT* edit"],
            TEXTS[:3],
        ),
        Task(
            "evaluate: `context_qa`, 20 texts",
            evaluated,
            dict,
            [QUESTION, STATEMENT, "CORRECT or INCORRECT"],
            TEXTS[:20],
            lambda result: result["score"] is not None,
            "no verdict could be parsed",
        ),
        Task(
            "rerank: `LLMListwiseRerank`, 10 documents",
            lambda llm: LLMListwiseRerank.from_llm(llm, top_n=3).compress_documents(DOCUMENTS[:10], QUESTION),
            list,
            [QUESTION],
            TEXTS[:10],
        ),
        Task(
            "structured: `with_structured_output`",
            lambda llm: llm.with_structured_output(Lighthouse).invoke(f"Describe the lighthouse.\n\n{TEXTS[0]}"),
            Lighthouse,
            ["Describe the lighthouse"],
            TEXTS[:1],
        ),
        Task(
            "agent without tools: `create_agent`",
            lambda llm: create_agent(llm, tools=[]).invoke({"messages": [HumanMessage(QUESTION)]}),
            dict,
            [QUESTION],
            (),
            lambda result: bool(result["messages"][-1].content.strip()),
        ),
        Task(
            "map: `load_qa_chain`, map_rerank, 4 documents",
            lambda llm: load_qa_chain(llm, "map_rerank").invoke(
                {"input_documents": DOCUMENTS[:4], "question": QUESTION}
            ),
            dict,
            [QUESTION, "score of how fully"],
            TEXTS[:4],
            lambda result: bool(result["output_text"].strip()),
        ),
        Task(
            "refine: `load_qa_chain`, refine, 5 documents",
            lambda llm: load_qa_chain(llm, "refine").invoke({"input_documents": DOCUMENTS[:5], "question": QUESTION}),
            dict,
            [QUESTION],
            TEXTS[:5],
            lambda result: bool(result["output_text"].strip()),
        ),
    ]


def outcome(task: Task, llm: Any, read: Read) -> dict[str, Any]:
    """What came of a task."""
    read.passes.clear()
    calls = CallsAndKept()
    llm.callbacks = [calls]
    started, error, result = time.process_time(), "", None
    try:
        result = task.run(llm)
    except Exception as raised:  # whatever it is, it goes into the table
        error = f"{type(raised).__name__}: {' '.join(str(raised).split()) or 'no message'}"[:SAID]
    kept = f", {calls.kept:,} of {calls.context:,} kept" if calls.kept < calls.context else ""
    return {
        "verdict": verdict(task, read, calls, result, error),
        "cost": f"{calls.made} {'call' if calls.made == 1 else 'calls'}, {read.tokens():,} tokens{kept}",
        "processor seconds": round(time.process_time() - started, 1),
        "result": str(result)[-300:],
    }


def verdict(task: Task, read: Read, calls: CallsAndKept, result: Any, error: str) -> str:
    """Works, or the caveats, or the error."""
    if error and not read.passes:
        return f"error before any call: {error}"
    text = read.text()
    unread = [passage for passage in task.texts if passage.strip()[:SHOWN] not in text]
    caveats = []
    if read.longest() > WINDOW:
        caveats.append(f"{read.longest():,} tokens went into the window of {WINDOW:,}, and no error")
    if unread:
        caveats.append(f"{len(unread)} of {len(task.texts)} texts never read")
    if lost := [words for words in task.asked if words not in text]:
        caveats.append(f"not read: {'; '.join(lost)}")
    if task.needs_all and calls.kept < calls.context:
        caveats.append("answered from what was kept")
    if error:
        return f"{'; '.join(caveats) or 'all is read'}; then error: {error}"
    if not isinstance(result, task.promised):
        caveats.append(f"a {type(result).__name__} comes back")
    elif not task.is_useful(result):
        caveats.append(task.lacking)
    return f"works, but {'; '.join(caveats)}" if caveats else "works"


def main() -> None:
    """Prints a line of JSON for each task and model, then the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="tasks whose name has this in it")
    parser.add_argument("--model", default="", help="classes of models whose name has this in it")
    only, kind = (chosen := parser.parse_args()).only, chosen.model
    tokenizer = AutoTokenizer.from_pretrained(str(embedded_folder()))
    flat = pipeline(return_full_text=False, max_new_tokens=NEW_TOKENS)
    finch = ChatFinch(model="embedded", dtype="float32", max_tokens=NEW_TOKENS)
    finch.engine.retrieval_heads()  # found once a model, and then stored
    # Its own pipeline object on the same weights, so that a call is counted once.
    chat = ChatHuggingFace(llm=flat.model_copy(), tokenizer=tokenizer)
    read = Read(flat.pipeline.model, tokenizer)
    every: list[tuple[Any, Read]] = [(finch, Read(finch.engine.model, tokenizer)), (chat, read), (flat, read)]
    llms = [(llm, counter) for llm, counter in every if kind in type(llm).__name__]
    names = " | ".join(f"`{type(llm).__name__}`" for llm, _ in llms)
    table = [f"| | {names} |", f"|{'---|' * (len(llms) + 1)}"]
    for task in tasks():
        if only not in task.name:
            continue
        cells = []
        for llm, counter in llms:
            row = outcome(task, llm, counter)
            sys.stdout.write(json.dumps({"task": task.name, "model": type(llm).__name__, **row}) + "\n")
            sys.stdout.flush()
            cells.append(f"{row['verdict']} ({row['cost']})".replace("|", "\\|"))
        table.append(f"| {task.name} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
