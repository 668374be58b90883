"""Ways to answer a question from many passages, all with the same model, prompt and decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..answer import Answer
from ..engine import Finch
from ..errors import InputError
from ..prefill.shortlists import shortlist_tokens
from ..prompts.builder import INSTRUCTIONS, refine_instructions
from ..prompts.passages import Passage
from ..store.store import PassageStore
from .cases import QualityCase
from .sentences import Quote


class DoesNotFitError(Exception):
    """A case is too long for the method; the message says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a method made of a case.

    Attributes:
        prediction: The answer.
        kept_ids: Passages of which something was in the cache when the answer was made.
        kv_tokens: Document tokens in the cache then; the most of any call where there were several.
        prefill_seconds: Reading.
        decode_seconds: Question and answer.
        calls: Calls of the model.
        peak_mib: Peak of memory beyond what was in use before, of the accelerator or else of the process; 0 where
            nobody measured it.
        support: How well the passages support the answer, from 0 to 1; None where the method does not say.
        log_probability: Mean of the answer's tokens, at most 0; of ways of answering that tell it.
        quotes: Sentences that the answer rests on, each behind its passage's id; likewise.
    """

    prediction: str
    kept_ids: list[str | None]
    kv_tokens: int
    prefill_seconds: float
    decode_seconds: float
    calls: int = 1
    peak_mib: float = 0.0
    support: float | None = None
    log_probability: float | None = None
    quotes: list[Quote] | None = None


@dataclass(frozen=True, slots=True)
class Contestant:
    """Answers cases.

    Attributes:
        finch: The engine, for all methods.
        budget: Document tokens in the cache.
        max_new_tokens: The most tokens of an answer.
        corpus: A store that has read all passages of the data, for the methods `OF_CORPUS`.
        judges: Whether answers are judged, see ``support`` of `finch_rag.Finch`: where questions have no answer.
    """

    finch: Finch
    budget: int
    max_new_tokens: int
    corpus: PassageStore | None = None
    judges: bool = False

    def ask(self, case: QualityCase, passages: Sequence[Passage], **options: Any) -> Outcome:
        """One call of the engine."""
        chosen = {"budget": self.budget, "max_new_tokens": self.max_new_tokens, **_instructed(case), **options}
        chosen["support"] = self.judges
        return _outcome([self.finch.ask(case.question.question, passages, **chosen)])

    def ask_plain(self, case: QualityCase, passages: Sequence[Passage]) -> Outcome:
        """One call that evicts nothing: the plain model."""
        tokens = sum(self.lengths(passages))
        if (room := self.room(case)) < tokens:
            raise DoesNotFitError(f"{tokens} tokens of passages, and the window has room for {room}")
        return self.ask(case, passages, budget=max(tokens, 1), reread=False)

    def lengths(self, passages: Sequence[Passage]) -> list[int]:
        """Tokens of each passage as Finch reads it."""
        return [len(tokens) for tokens in self.finch.prompts.build("?", passages).passages] if passages else []

    def room(self, case: QualityCase) -> int:
        """Tokens of passages that the window holds beside the rest of the prompt and the answer."""
        prompt = self.finch.prompts.build(case.question.question, case.passages[:1], case.instructions)
        fixed = len(prompt.prefix) + 2 * len(prompt.question) + len(prompt.tail) + self.max_new_tokens
        return self.finch.window - fixed - 1

    def first_that_fit(self, passages: Sequence[Passage], tokens: int) -> list[Passage]:
        """The first passages that fit whole into so many tokens; at least one."""
        ends = accumulate(self.lengths(passages))
        return list(passages[: max(1, sum(end <= tokens for end in ends))])

    def packs(self, passages: Sequence[Passage], tokens: int) -> list[list[Passage]]:
        """Passages in packs of at most so many tokens, each with one passage at least."""
        packs: list[list[Passage]] = []
        filled = 0
        for passage, length in zip(passages, self.lengths(passages), strict=True):
            if not packs or filled + length > tokens:
                packs.append([])
                filled = 0
            packs[-1].append(passage)
            filled += length
        return packs


Method = Callable[[Contestant, QualityCase], Outcome]


def finch(contestant: Contestant, case: QualityCase) -> Outcome:
    """Finch as it is."""
    return contestant.ask(case, case.passages)


def finch_loop(contestant: Contestant, case: QualityCase) -> Outcome:
    """Finch by the loop of the paper, with whole passages."""
    return contestant.ask(case, case.passages, strategy="loop")


def finch_shortlist(contestant: Contestant, case: QualityCase) -> Outcome:
    """Each passage alone, and then the loop over the best of them."""
    most = shortlist_tokens(contestant.budget)
    return contestant.ask(case, case.passages, strategy="independent", shortlist_tokens=most)


def finch_scan(contestant: Contestant, case: QualityCase) -> Outcome:
    """Finch by the loop without the re-prefill."""
    return contestant.ask(case, case.passages, reread=False)


def finch_paper(contestant: Contestant, case: QualityCase) -> Outcome:
    """Tokens by the sum of all heads, layer by layer, as in the paper."""
    return contestant.ask(case, case.passages, selection="token")


def finch_store(contestant: Contestant, case: QualityCase) -> Outcome:
    """The same as `finch` by a store, which reads each passage once for all cases."""
    return contestant.ask(case, case.passages, store=True)


def finch_corpus(contestant: Contestant, case: QualityCase) -> Outcome:
    """The store of all passages, without a retriever, and the loop over its best."""
    return contestant.ask(case, (), store=contestant.corpus, shortlist_tokens=shortlist_tokens(contestant.budget))


def finch_corpus_best(contestant: Contestant, case: QualityCase) -> Outcome:
    """The same without the loop."""
    return contestant.ask(case, (), store=contestant.corpus, shortlist_tokens=0)


def finch_fused(contestant: Contestant, case: QualityCase) -> Outcome:
    """Finch over the best passages of the store of all and of the retriever, by reciprocal rank fusion."""
    if contestant.corpus is None:
        raise InputError("the method finch-fused needs a store of all passages")
    ids = [passage.id for passage in case.ranked if passage.id is not None]
    found = contestant.corpus.retrieve(case.question.question, _FUSED, fuse=[ids])
    most = shortlist_tokens(contestant.budget)
    passages = contestant.first_that_fit([each.passage for each in found], most)
    return contestant.ask(case, passages, strategy="loop")


def full(contestant: Contestant, case: QualityCase) -> Outcome:
    """Everything, no compression."""
    return contestant.ask_plain(case, case.passages)


def truncate(contestant: Contestant, case: QualityCase) -> Outcome:
    """What fits into the window, in the order given."""
    return contestant.ask_plain(case, contestant.first_that_fit(case.passages, contestant.room(case)))


def top_k(contestant: Contestant, case: QualityCase) -> Outcome:
    """The retriever's best passages that fit into the budget."""
    return contestant.ask_plain(case, contestant.first_that_fit(case.ranked, contestant.budget))


def gold(contestant: Contestant, case: QualityCase) -> Outcome:
    """The passages that hold the answer, alone: what the reader can do."""
    passages = [passage for passage in case.passages if passage.id in case.question.gold_ids]
    if not passages:
        raise DoesNotFitError("the answer's passage was not retrieved")
    return contestant.ask_plain(case, passages)


def refine(contestant: Contestant, case: QualityCase) -> Outcome:
    """An answer from the first pack of passages, refined with each further one, as LlamaIndex does it."""
    answers: list[Answer] = []
    for pack in contestant.packs(case.passages, contestant.budget):
        instructions = case.instructions
        if answers:
            instructions = refine_instructions(case.instructions or INSTRUCTIONS, answers[-1].text)
        answers.append(_small_call(contestant, case, pack, instructions))
    return _outcome(answers)


def map_reduce(contestant: Contestant, case: QualityCase) -> Outcome:
    """An answer from each pack of passages, then one from the answers, as LlamaIndex's tree_summarize does it."""
    answers: list[Answer] = []
    level = list(case.passages)
    packs = contestant.packs(level, contestant.budget)
    while True:
        made = [_small_call(contestant, case, pack, case.instructions) for pack in packs]
        answers += made
        if len(made) == 1:
            return _outcome(answers)
        level = [Passage(answer.text or "no answer") for answer in made]
        packs = contestant.packs(level, contestant.budget)
        if len(packs) == len(level):  # no two fit: two at a time, so that every level is smaller than the last
            packs = [level[start : start + 2] for start in range(0, len(level), 2)]


def _small_call(contestant: Contestant, case: QualityCase, pack: list[Passage], instructions: str | None) -> Answer:
    options: dict[str, Any] = {} if instructions is None else {"instructions": instructions}
    budget = max(contestant.budget, sum(contestant.lengths(pack)))
    return contestant.finch.ask(
        case.question.question,
        pack,
        budget=budget,
        reread=False,
        max_new_tokens=contestant.max_new_tokens,
        **options,
    )


METHODS: dict[str, Method] = {
    "finch": finch,
    "finch-loop": finch_loop,
    "finch-shortlist": finch_shortlist,
    "finch-scan": finch_scan,
    "finch-paper": finch_paper,
    "finch-store": finch_store,
    "finch-corpus": finch_corpus,
    "finch-corpus-best": finch_corpus_best,
    "finch-fused": finch_fused,
    "full": full,
    "truncate": truncate,
    "top-k": top_k,
    "refine": refine,
    "map-reduce": map_reduce,
    "gold": gold,
}
OF_CORPUS = ("finch-corpus", "finch-corpus-best", "finch-fused")  # they need a store of all passages
_FUSED = 200  # passages, of which the first that fit into a shortlist are read
WITHOUT_BUDGET = ("full", "truncate", "gold")  # the budget makes no difference to them


def run(method: str, contestant: Contestant, case: QualityCase) -> Outcome:
    """Answers one case by one method.

    Args:
        method: Of `METHODS`.
        contestant: The model with its budget.
        case: The case.

    Raises:
        DoesNotFitError: If the case is too long for the method.
        InputError: If there is no such method.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown: use {', '.join(METHODS)}")
    return METHODS[method](contestant, case)


def _instructed(case: QualityCase) -> dict[str, Any]:
    return {} if case.instructions is None else {"instructions": case.instructions}


def _quotes(answer: Answer) -> list[Quote] | None:
    """The sentences that an answer quotes; None where it was not looked at for quotes."""
    if not answer.statements:
        return None
    return [(cited.passage_id, quote.text) for cited in answer.citations for quote in cited.quotes]


def _outcome(answers: Sequence[Answer]) -> Outcome:
    reports = [answer.report for answer in answers]
    last = answers[-1]
    return Outcome(
        prediction=last.text,
        kept_ids=[citation.passage_id for citation in last.citations],
        kv_tokens=max(report.kept_tokens for report in reports),
        prefill_seconds=sum(report.prefill_seconds for report in reports),
        decode_seconds=sum(report.decode_seconds for report in reports),
        calls=len(answers),
        support=last.support,
        quotes=_quotes(last),
    )
