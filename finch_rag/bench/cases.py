"""What a quality benchmark asks: questions, each with its retrieved passages in a given order."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from typing_extensions import Unpack

from ..corpus.contents import MAX_CORPUS_BYTES, MAX_FILE_BYTES, Contents, UnreadableError
from ..corpus.reading import CorpusOptions, Question, load_questions, read_corpus
from ..corpus.retrieval import Retriever
from ..errors import CorpusError, InputError, MissingExtraError
from ..jsonl import json_objects
from ..paths import replaced_lines, told_where
from ..prompts.passages import Passage
from ..terminal.output import note

RetrieverName = Literal["bm25", "dense"]
Search = Callable[[str, int], list[int]]  # question, how many -> places of passages, best first

LONG_INSTRUCTIONS = "Answer the question in two or three sentences, using the passages below."
WITHOUT_GOLD = "/without-gold"  # ends the id of a question that is asked again without its gold passages
_LONG = 15  # words of an answer, on average, from which on answers are sentences


@dataclass(frozen=True, slots=True)
class QualityCase:
    """A question with what was retrieved for it.

    Attributes:
        question: The question.
        passages: In the order to read them.
        ranks: Rank of each of them by the retriever, from 0, whatever their order.
        instructions: Read before the passages; Finch's own when None.
    """

    question: Question
    passages: list[Passage]
    ranks: list[int]
    instructions: str | None = None

    @property
    def has_gold(self) -> bool:
        """Whether a passage that holds the answer was retrieved."""
        return any(passage.id in self.question.gold_ids for passage in self.passages)

    @property
    def has_all_gold(self) -> bool:
        """Whether all passages were retrieved that the answer needs."""
        return set(self.question.gold_ids) <= {passage.id for passage in self.passages}

    @property
    def ranked(self) -> list[Passage]:
        """The passages, best first."""
        return [passage for _, passage in sorted(zip(self.ranks, self.passages, strict=True), key=lambda pair: pair[0])]


@dataclass(frozen=True, slots=True)
class DataSet:
    """Passages and questions about them.

    Attributes:
        name: The folder's.
        passages: All of them.
        questions: In the file's order.
    """

    name: str
    passages: list[Passage]
    questions: list[Question]

    @classmethod
    def read(cls, folder: str | Path, **options: Unpack[CorpusOptions]) -> DataSet:
        """Reads ``questions*.jsonl`` and everything else that is a corpus, plain or ``.gz``; notes go to stderr.

        Args:
            folder: Where they are.
            options: See `finch_rag.corpus.reading.CorpusOptions`.

        Raises:
            CorpusError: If one of them is missing or cannot be read, or a gold passage is not in the corpus.
        """
        root = Path(folder)
        files = sorted([*root.glob("questions*.jsonl"), *root.glob("questions*.jsonl.gz")])
        if len(files) != 1:
            raise CorpusError(f"{root} has {len(files)} files questions*.jsonl(.gz): it needs one")
        read = read_corpus(root, **options)
        for warning in read.warnings:
            note(warning)
        most = options.get("max_file_bytes", MAX_FILE_BYTES)
        passages, questions = read.passages, load_questions(files[0], max_file_bytes=most)
        known = {passage.id for passage in passages}
        missing = next((q for q in questions if q.answerable and not known & set(q.gold_ids)), None)
        if missing is not None:
            raise CorpusError(f"no gold passage of question {missing.id} is among the {len(passages)} passages")
        for question in questions:
            if several := read.shared_ids & set(question.gold_ids):
                raise CorpusError(
                    f"the gold passage {min(several)!r} of question {question.id} is one of several with this id: give "
                    "each its own"
                )
        return cls(root.resolve().name, passages, questions)

    def with_answers(self) -> DataSet:
        """The same without the questions that cannot be answered.

        Raises:
            CorpusError: If nothing is left.
        """
        questions = [question for question in self.questions if question.answerable]
        if not questions:
            raise CorpusError(
                f"none of the {len(self.questions)} questions of {self.name} has an answer: use another set"
            )
        return replace(self, questions=questions)


def are_long(questions: Iterable[Question]) -> bool:
    """Whether the answers are sentences, so that words shared in their order say more than an exact answer.

    Args:
        questions: With their known answers.
    """
    words = [len(answer.split()) for question in questions if not question.needs_all for answer in question.answers]
    return bool(words) and fmean(words) >= _LONG


def search_by(name: RetrieverName, passages: Sequence[Passage]) -> Search:
    """An index of passages.

    Args:
        name: "bm25", or "dense" for MiniLM embeddings.
        passages: What to search.

    Raises:
        MissingExtraError: If the index's package is not installed.
    """
    if name == "dense":
        index = Retriever.build(passages)
        return lambda question, top_k: [place for place, _ in index.search(question, top_k)]
    # Where JAX is installed, bm25s tries it as it is imported, and JAX takes most of an accelerator's memory at once.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        import bm25s
    except ImportError as error:
        raise MissingExtraError.of("bm25s", "bench") from error

    bm25 = bm25s.BM25()
    texts = [passage.titled_text for passage in passages]
    words = bm25s.tokenize(texts, show_progress=False)
    if not any(words.ids):
        raise CorpusError(f"none of the {len(texts)} passages has a word that BM25 looks for: use other passages")
    bm25.index(words, show_progress=False)

    def search(question: str, top_k: int) -> list[int]:
        tokens = bm25s.tokenize([question], show_progress=False)
        places, _ = bm25.retrieve(tokens, k=top_k, show_progress=False, backend_selection="numpy")
        return [int(place) for place in places[0]]

    return search


def make_cases(
    data: DataSet,
    retriever: RetrieverName,
    top_k: int,
    order: str = "rank",
    limit: int | None = None,
    seed: int = 0,
    instructions: str | None = None,
    unanswerable: bool = False,
) -> list[QualityCase]:
    """Draws questions and retrieves their passages.

    Args:
        data: Passages and questions.
        retriever: What ranks the passages.
        top_k: How many passages a question gets; all where there are fewer.
        order: "rank" (best first), "random", or "gold-at:I": the answer's passage at place I, the others, which are
            the best ranked that are not gold, in rank order. Its rank stays the retriever's, the last where it was not
            retrieved. Questions without an answer are left out then.
        limit: How many questions; all when None.
        seed: Of the draw, and of the random order.
        instructions: Read before the passages. When None, Finch's own, or `LONG_INSTRUCTIONS` where answers are long.
        unanswerable: Whether each question that has an answer is asked a second time without its gold passages. The
            best ranked others take their places. Its id ends in `WITHOUT_GOLD`.

    Raises:
        InputError: If an argument cannot work.
    """
    gold_at = _places(order, min(top_k, len(data.passages)))
    if gold_at is not None and unanswerable:
        raise InputError(f"order is {order}, and without its gold passages a question has none: use rank or random")
    if instructions is None and are_long(data.questions):
        instructions = LONG_INSTRUCTIONS
    rng = random.Random(seed)
    questions = draw((data if gold_at is None else data.with_answers()).questions, limit, rng)
    search = search_by(retriever, data.passages)

    def case(question: Question, ranked: list[int], ranks: list[int]) -> QualityCase:
        return QualityCase(question, [data.passages[ranked[rank]] for rank in ranks], ranks, instructions)

    cases = []
    for question in questions:
        if gold_at is None:
            ranked = search(question.question, min(top_k, len(data.passages)))
        else:
            ranked = _with_one_gold(search, data.passages, question, top_k)
        ranks = list(range(len(ranked)))
        if gold_at is not None:
            gold = next(rank for rank in ranks if data.passages[ranked[rank]].id in question.gold_ids)
            ranks.remove(gold)
            ranks.insert(gold_at, gold)
        elif order == "random":
            rng.shuffle(ranks)
        cases.append(case(question, ranked, ranks))
        if unanswerable and question.answerable:
            ranked = _without_gold(search, data.passages, question, top_k)
            ranks = list(range(len(ranked)))
            if order == "random":
                random.Random(f"{seed} {question.id}").shuffle(ranks)  # so that the other cases stay as they are
            cases.append(case(replace(question, id=question.id + WITHOUT_GOLD, answerable=False), ranked, ranks))
    return cases


def draw(questions: Sequence[Question], limit: int | None, rng: random.Random) -> list[Question]:
    """Questions in random order.

    Args:
        questions: All of them.
        limit: How many; all when None.
        rng: Decides.
    """
    drawn = list(questions)
    rng.shuffle(drawn)
    return drawn[:limit]


def _places(order: str, top_k: int) -> int | None:
    """The place of the gold passage in "gold-at:I", None for other orders."""
    if order in ("rank", "random"):
        return None
    name, _, place = order.partition(":")
    if name != "gold-at" or not place.isdecimal() or int(place) >= top_k:
        raise InputError(f"order is {order!r}: use rank, random, or gold-at:I with I from 0 to {top_k - 1}")
    return int(place)


def _with_one_gold(search: Search, passages: Sequence[Passage], question: Question, top_k: int) -> list[int]:
    """So many passages, best first, one of them gold: where the retriever ranks it, or else last."""
    golds = [index for index, passage in enumerate(passages) if passage.id in question.gold_ids]
    gold, *further = golds
    ranked = search(question.question, min(top_k + len(further), len(passages)))  # the further ones are left out
    one_gold = [index for index in ranked if index not in further][:top_k]
    return one_gold if gold in one_gold else [*one_gold[: top_k - 1], gold]


def _without_gold(search: Search, passages: Sequence[Passage], question: Question, top_k: int) -> list[int]:
    """So many passages, best first, none of them gold; fewer where there are no more."""
    most = min(top_k + len(question.gold_ids), len(passages))
    return [place for place in search(question.question, most) if passages[place].id not in question.gold_ids][:top_k]


def write_cases(cases: Iterable[QualityCase], file: Path) -> None:
    """Stores cases, for a later run or for a peer in an environment of its own.

    Args:
        cases: What to store.
        file: Gzipped JSON lines; its folder is made.

    Raises:
        InputError: If it cannot be written.
    """
    with told_where("the cases", file, InputError), replaced_lines(file) as lines:  # shards look for all cases at once
        for case in cases:
            passages = [{"id": p.id, "title": p.title, "text": p.text} for p in case.passages]
            record = {
                **asdict(case.question),
                "ranks": case.ranks,
                "passages": passages,
                "instructions": case.instructions,
            }
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_cases(file: Path) -> Iterator[QualityCase]:
    """Reads what `write_cases` stored.

    Args:
        file: Gzipped JSON lines.
    """
    for number, record in json_objects(file.name, stored_text(file), InputError):
        try:
            yield _case(record)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file.name}, line {number} is not what a benchmark stores: {error!r}") from error


def stored_text(file: Path) -> str:
    """What a benchmark stored; whoever reads it says what to do where that fails.

    Args:
        file: Text, compressed if its name ends in ``.gz``.

    Raises:
        InputError: If it is damaged.
    """
    try:
        return Contents(MAX_CORPUS_BYTES).text(file)
    except UnreadableError as reason:
        raise InputError(f"{file.name} {reason}") from reason


def _case(record: Mapping[str, Any]) -> QualityCase:
    question = Question(
        record["id"],
        record["question"],
        tuple(record["answers"]),
        tuple(record["gold_ids"]),
        record.get("answerable", True),  # older folders have none of these
        tuple(map(tuple, record.get("sentences", ()))),
        record.get("needs_all", False),
    )
    passages = [Passage(p["text"], id=p["id"], title=p["title"]) for p in record["passages"]]
    ranks = record["ranks"]
    if sorted(ranks) != list(range(len(passages))):
        raise ValueError(f"{len(ranks)} ranks of {len(passages)} passages")
    return QualityCase(question, passages, ranks, record.get("instructions"))
