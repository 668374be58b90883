"""Ten tasks of LlamaIndex, with FinchLLM and with HuggingFaceLLM: a table of the README.

Both run the embedded model on the CPU, through LlamaIndex's own components. What is looked at is the plumbing: whether
the model read the whole question and every text, whether its window was kept, and whether the framework got the object
that it promises. A model of 135M parameters is often wrong; that is not looked at. Beside what the rest of the
repository needs:

    pip install --no-deps llama-index-llms-huggingface==0.8.0
    python integrations/llama-index-llms-finch/benchmarks/li_ten_tasks.py
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llama_index.core import PromptTemplate, Settings, SummaryIndex, VectorStoreIndex
from llama_index.core.agent import ReActAgent
from llama_index.core.agent.workflow.workflow_events import AgentOutput
from llama_index.core.base.response.schema import Response
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.chat_engine.types import AgentChatResponse
from llama_index.core.evaluation import EvaluationResult, FaithfulnessEvaluator
from llama_index.core.extractors import KeywordExtractor, QuestionsAnsweredExtractor, SummaryExtractor, TitleExtractor
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMChatStartEvent,
    LLMCompletionEndEvent,
    LLMCompletionStartEvent,
)
from llama_index.core.llms import LLM, ChatMessage
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import LLMRerank
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import Document, NodeWithScore, TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.llms.finch import FinchLLM
from llama_index.llms.huggingface import HuggingFaceLLM
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from finch_rag.corpus import load_questions, read_corpus
from finch_rag.corpus.example import example_corpus
from finch_rag.corpus.retrieval import embedding_model_folder
from finch_rag.models.embedded import embedded_folder

WINDOW = 8192
NEW_TOKENS = 64
OVER_THE_WINDOW = 60  # passages of the corpus; about 10,000 tokens
SHOWN = 28  # characters of a passage by which it is found in what a model read
SAID = 110  # characters of an error in the table
PASSAGES = read_corpus(example_corpus()).passages
QUESTION = load_questions(example_corpus() / "questions.jsonl")[0].question
STATEMENT = "Morag Tulloch was the first keeper of the Skerry Holm light."
NODES = [TextNode(text=passage.text, id_=passage.id) for passage in PASSAGES]


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


class Calls(BaseEventHandler):
    """Counts the calls that LlamaIndex makes, and what Finch keeps; a chat that makes a completion is one call."""

    made: int = 0
    under_way: int = 0
    kept: int = 0
    context: int = 0

    def handle(self, event: Any, **_: Any) -> None:
        """Of chat and completion models."""
        if isinstance(event, LLMChatStartEvent | LLMCompletionStartEvent):
            self.made += self.under_way == 0
            self.under_way += 1
        if isinstance(event, LLMChatEndEvent | LLMCompletionEndEvent):
            self.under_way -= 1
            report = (getattr(event.response, "raw", None) or {}).get("report")
            if report:
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
        needs_all: The answer needs all texts, so that leaving some out is a caveat.
    """

    name: str
    run: Callable[[LLM], Any]
    promised: type
    asked: Sequence[str]
    texts: Sequence[str] = ()
    needs_all: bool = False


def index() -> VectorStoreIndex:
    """All of the example corpus."""
    return VectorStoreIndex(NODES, embed_model=HuggingFaceEmbedding(str(embedding_model_folder()), device="cpu"))


def answered(llm: LLM, mode: ResponseMode, count: int, question: str = QUESTION) -> Any:
    """What LlamaIndex answers from the first nodes."""
    return SummaryIndex(NODES[:count]).as_query_engine(llm=llm, response_mode=mode).query(question)


def conversation() -> list[ChatMessage]:
    """A history that does not fit into the window."""
    turns = []
    for passage in PASSAGES[:OVER_THE_WINDOW]:
        turns.append(ChatMessage(role="user", content=f"What do you know about {passage.title}?"))
        turns.append(ChatMessage(role="assistant", content=passage.text))
    return turns


def chunk() -> TextNode:
    """The first chunk of the corpus that LlamaIndex makes by default."""
    text = "\n\n".join(passage.text for passage in PASSAGES)
    found = SentenceSplitter().get_nodes_from_documents([Document(text=text)])[0]
    return TextNode(text=found.get_content())


def extracted(llm: LLM) -> dict[str, Any]:
    """What four extractors find in a chunk."""
    found: dict[str, Any] = {}
    for kind in (TitleExtractor, KeywordExtractor, SummaryExtractor, QuestionsAnsweredExtractor):
        found.update(kind(llm=llm, num_workers=1).extract([chunk()])[0])
    return found


def reranked(llm: LLM) -> list[NodeWithScore]:
    """Ten nodes, in the order that the model gives."""
    found = [NodeWithScore(node=node, score=1.0) for node in NODES[:10]]
    return LLMRerank(llm=llm, top_n=3).postprocess_nodes(found, query_str=QUESTION)


def evaluated(llm: LLM) -> EvaluationResult:
    """Whether twenty contexts say so."""
    contexts = [passage.text for passage in PASSAGES[:20]]
    return FaithfulnessEvaluator(llm=llm).evaluate(response=STATEMENT, contexts=contexts)


def agent(llm: LLM) -> Any:
    """What an agent without tools says."""

    async def run() -> Any:
        return await ReActAgent(tools=[], llm=llm, streaming=False).run(QUESTION, max_iterations=3)

    return asyncio.run(run())


def tasks() -> list[Task]:
    """Ten of them."""
    everything = [passage.text for passage in PASSAGES]
    long = everything[:OVER_THE_WINDOW]
    summary = "Which places and people are described? Summarize."
    structured = PromptTemplate("Describe the lighthouse of this text.\n\n{text}")
    return [
        Task(
            "RAG: `as_query_engine`, all 108 nodes",
            lambda llm: index().as_query_engine(llm=llm, similarity_top_k=len(NODES)).query(QUESTION),
            Response,
            [QUESTION],
            everything,
        ),
        Task(
            "chat over the window: `SimpleChatEngine`, 120 earlier messages",
            lambda llm: SimpleChatEngine.from_defaults(llm=llm, chat_history=conversation()).chat(QUESTION),
            AgentChatResponse,
            [QUESTION],
            long,
        ),
        Task(
            f"summarise: `tree_summarize`, {OVER_THE_WINDOW} nodes",
            lambda llm: answered(llm, ResponseMode.TREE_SUMMARIZE, OVER_THE_WINDOW, summary),
            Response,
            [summary],
            long,
            needs_all=True,
        ),
        Task(
            "extract: title, keywords, summary and questions of a chunk of 1,024 tokens",
            extracted,
            dict,
            ["Give a title", "unique keywords", "Summarize the key topics", "generate 5 questions"],
            chunk().get_content().split("\n\n")[:-1],
        ),
        Task(
            "evaluate: `FaithfulnessEvaluator`, 20 contexts", evaluated, EvaluationResult, [STATEMENT], everything[:20]
        ),
        Task("rerank: `LLMRerank`, 10 nodes", reranked, list, [QUESTION], everything[:10]),
        Task(
            "structured: `structured_predict`",
            lambda llm: llm.structured_predict(Lighthouse, structured, text=long[0]),
            Lighthouse,
            ["Describe the lighthouse", "height_in_metres"],
            long[:1],
        ),
        Task("agent without tools: `ReActAgent`", agent, AgentOutput, [QUESTION, "Below is the current conversation"]),
        Task(
            "map: `accumulate`, 4 nodes",
            lambda llm: answered(llm, ResponseMode.ACCUMULATE, 4),
            Response,
            [QUESTION],
            everything[:4],
        ),
        Task(
            "refine: `refine`, 5 nodes",
            lambda llm: answered(llm, ResponseMode.REFINE, 5),
            Response,
            [QUESTION],
            everything[:5],
        ),
    ]


def outcome(task: Task, llm: LLM, read: Read) -> dict[str, Any]:
    """What came of a task."""
    read.passes.clear()
    calls, dispatcher = Calls(), get_dispatcher()
    dispatcher.add_event_handler(calls)
    started, error, result = time.process_time(), "", None
    try:
        result = task.run(llm)
    except Exception as raised:  # whatever it is, it goes into the table
        error = f"{type(raised).__name__}: {' '.join(str(raised).split()) or 'no message'}"[:SAID]
    finally:
        dispatcher.event_handlers.remove(calls)
    kept = f", {calls.kept:,} of {calls.context:,} kept" if calls.kept < calls.context else ""
    return {
        "verdict": verdict(task, read, calls, result, error),
        "cost": f"{calls.made} {'call' if calls.made == 1 else 'calls'}, {read.tokens():,} tokens{kept}",
        "processor seconds": round(time.process_time() - started, 1),
        "result": str(result)[:300],
    }


def verdict(task: Task, read: Read, calls: Calls, result: Any, error: str) -> str:
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
        caveats.append(f"{type(result).__name__}, not {task.promised.__name__}")
    elif not result or not str(result).strip():
        caveats.append(f"an empty {task.promised.__name__}")
    return f"works, but {'; '.join(caveats)}" if caveats else "works"


def main() -> None:
    """Prints a line of JSON for each task and model, then the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="tasks whose name has this in it")
    parser.add_argument("--model", default="", help="classes of LLMs whose name has this in it")
    only, kind = (chosen := parser.parse_args()).only, chosen.model
    folder = str(embedded_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    Settings.tokenizer = tokenizer.encode
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    peer = HuggingFaceLLM(
        context_window=WINDOW,
        max_new_tokens=NEW_TOKENS,
        model=model,
        tokenizer=tokenizer,
        generate_kwargs={"do_sample": False},
        is_chat_model=True,
    )
    finch = FinchLLM("embedded", max_new_tokens=NEW_TOKENS, model_kwargs={"dtype": "float32"})
    finch.engine.retrieval_heads()  # found once a model, and then stored
    both: list[tuple[LLM, Read]] = [(finch, Read(finch.engine.model, tokenizer)), (peer, Read(model, tokenizer))]
    llms = [(llm, read) for llm, read in both if kind in type(llm).__name__]
    names = " | ".join(f"`{type(llm).__name__}`" for llm, _ in llms)
    table = [f"| | {names} |", f"|{'---|' * (len(llms) + 1)}"]
    for task in tasks():
        if only not in task.name:
            continue
        cells = []
        for llm, read in llms:
            row = outcome(task, llm, read)
            sys.stdout.write(json.dumps({"task": task.name, "model": type(llm).__name__, **row}) + "\n")
            sys.stdout.flush()
            cells.append(f"{row['verdict']} ({row['cost']})".replace("|", "\\|"))
        table.append(f"| {task.name} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
