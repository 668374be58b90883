"""Questions over made text, after RULER (Hsieh et al., 2024, arXiv 2404.06654). Everything is drawn from word lists.

    multi-key        many things have a code, one of them is asked for
    multi-value-N    one thing has N codes, each in a passage of its own; all are asked for
    multi-query      four things are asked for at once
    variables        chains of assignments; asked for all variables that have a value
    common-words     ten words stand there thirty times each, others three times; asked for the ten

The first four hide needles in a haystack, at most one a passage. The passages are read in their order; their ranks are
BM25's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..corpus.reading import Question
from ..errors import InputError
from ..prompts.passages import Passage
from .cases import QualityCase, search_by

Lengths = Callable[[Sequence[Passage]], list[int]]  # tokens of each passage
Room = Callable[[str], int]  # a question -> tokens of passages that may stand before it

INSTRUCTIONS = (
    "Answer the question from the passages below. Give all that it asks for, with commas between, and no more."
)
_PASSAGE = 120  # tokens of a passage, about
_COMMON, _OFTEN, _SELDOM = 10, 30, 3  # common words, how often each stands there, and how often any other

_COLOURS = (
    "amber azure beige bronze copper coral cream crimson emerald golden green grey indigo ivory jade lilac olive "
    "orange pink purple ruby scarlet silver white"
).split()
_ANIMALS = (
    "badger beaver bison buffalo camel cheetah cobra crane dolphin eagle falcon ferret gazelle goose heron hyena "
    "jackal jaguar lemur leopard lizard lobster lynx magpie marten moose otter panther parrot pelican puffin rabbit "
    "raven salmon seal sparrow spider swan tiger turtle walrus weasel wolf zebra"
).split()
_PEOPLE = "baker carpenter doctor farmer gardener librarian mayor miller painter sailor teacher weaver".split()
_PLACES = "bridge canal church factory garden harbour inn library market mill orchard school station theatre".split()
_THINGS = "barrels blankets books candles chairs clocks coats lamps letters maps ropes tools wheels".split()
_TIMES = "in spring|in the evening|after the storm|before noon|every week|last winter|on a quiet day|at dawn".split("|")
_SENTENCES = (
    "The {person} carried {number} {things} from the {place} to the {place2} {time}.",
    "{Time} the {person} and the {person2} met at the {place}.",
    "Nobody at the {place} had counted the {things} {time}.",
    "The {place} stands {number} steps from the {place2}, and the {person} likes it there.",
    "The {person} of the {place} sold {things} to the {person2} {time}.",
    "{Time} people bring {things} to the {place}, where the {person} repairs them.",
    "There were {number} {things} in the {place} when the {person} came back {time}.",
    "The {person} asked the {person2} about the way from the {place} to the {place2}.",
)


@dataclass(frozen=True, slots=True)
class Needles:
    """What is hidden in a haystack, and asked for.

    Attributes:
        question: The question.
        answers: All are needed.
        asked: Sentences that hold them, in the order in which they stand in the text.
        others: Sentences of the same kind that do not.
    """

    question: str
    answers: tuple[str, ...]
    asked: Sequence[str]
    others: Sequence[str] = ()


def multi_key(rng: random.Random, passages: int) -> Needles:
    """One of many codes; every fourth passage has one, and at least four have.

    Args:
        rng: Draws.
        passages: About how many there are.
    """
    things = _draw_things(rng, min(max(4, passages // 4), len(_COLOURS) * len(_ANIMALS)))
    code, *others = _draw_codes(rng, len(things))
    told = [f"The code of the {thing} is {other}." for thing, other in zip(things[1:], others, strict=True)]
    question = f"What is the code of the {things[0]}?"
    return Needles(question, (code,), [f"The code of the {things[0]} is {code}."], told)


def multi_value(values: int) -> Callable[[random.Random, int], Needles]:
    """All codes of one thing.

    Args:
        values: How many it has.
    """

    def needles(rng: random.Random, passages: int) -> Needles:
        (thing,), codes = _draw_things(rng, 1), _draw_codes(rng, values)
        question = f"What are the {values} codes of the {thing}?"
        return Needles(question, tuple(codes), [f"A code of the {thing} is {code}." for code in codes])

    return needles


def multi_query(rng: random.Random, passages: int) -> Needles:
    """The codes of four things.

    Args:
        rng: Draws.
        passages: Makes no difference.
    """
    things, codes = _draw_things(rng, 4), _draw_codes(rng, 4)
    told = [f"The code of the {thing} is {code}." for thing, code in zip(things, codes, strict=True)]
    asked = rng.sample(things, 4)  # not in the order of the text
    question = f"What are the codes of the {asked[0]}, the {asked[1]}, the {asked[2]} and the {asked[3]}?"
    return Needles(question, tuple(codes), told)


def variables(rng: random.Random, passages: int) -> Needles:
    """The five variables of a chain, beside a chain of another value.

    Args:
        rng: Draws.
        passages: Makes no difference.
    """
    names = _distinct(10, lambda: "".join(rng.choices("BCDFGHJKLMNPQRSTVWXZ", k=5)))
    value, other = _distinct(2, lambda: str(rng.randint(10_000, 99_999)))
    chains = [
        [f"{name} = {before}." for name, before in zip(own, [first, *own], strict=False)]
        for own, first in ((names[:5], value), (names[5:], other))
    ]
    question = f"Some variables get their value from another one. Which five variables have the value {value}?"
    return Needles(question, tuple(names[:5]), *chains)


HAYSTACKS: dict[str, Callable[[random.Random, int], Needles]] = {
    "multi-key": multi_key,
    "multi-value-4": multi_value(4),
    "multi-value-8": multi_value(8),
    "multi-value-16": multi_value(16),
    "multi-query": multi_query,
    "variables": variables,
}
COMMON_WORDS = "common-words"
TASKS = (*HAYSTACKS, COMMON_WORDS)


def make_case(task: str, number: int, room: Room, lengths: Lengths, seed: int) -> QualityCase:
    """One question of a task.

    Args:
        task: Of `TASKS`.
        number: Of the question; others have others.
        room: How long the passages may be.
        lengths: Measures them.
        seed: Of all draws.

    Raises:
        InputError: If the task needs more room.
    """
    rng = random.Random(f"{seed} {task} {number}")
    if task == COMMON_WORDS:
        question, answers, texts, golds = _common_words(rng, room, lengths)
    else:
        question, answers, texts, golds = _haystack(task, rng, room, lengths)
    passages = [Passage(text, id=f"p{place:05}") for place, text in enumerate(texts)]
    gold_ids = tuple(str(passages[place].id) for place in sorted(golds))
    ranks = [0] * len(passages)
    for rank, place in enumerate(search_by("bm25", passages)(question, len(passages))):
        ranks[place] = rank
    asked = Question(f"{task}-{number}", question, answers, gold_ids, needs_all=True)
    return QualityCase(asked, passages, ranks, INSTRUCTIONS)


_Made = tuple[str, tuple[str, ...], list[str], set[int]]  # question, answers, texts, places of gold ones


def _haystack(task: str, rng: random.Random, room: Room, lengths: Lengths) -> _Made:
    sample = _tokens([_sentence(rng) for _ in range(50)], lengths)
    each = max(2, round(_PASSAGE * len(sample) / sum(sample)))  # sentences
    needles = HAYSTACKS[task](rng, room("?") // _PASSAGE)
    free = room(needles.question)
    hidden = [*needles.asked, *needles.others]
    stack: list[list[str]] = []
    left = free - sum(_tokens(hidden, lengths))
    while left > 0:
        more = [[_sentence(rng) for _ in range(each)] for _ in range(left // _PASSAGE + 1)]
        for sentences, length in zip(more, _tokens([" ".join(own) for own in more], lengths), strict=True):
            left -= length
            if left >= 0:
                stack.append(sentences)
    if len(stack) < len(hidden):
        raise _too_short(task, free, len(hidden) * _PASSAGE + sum(_tokens(hidden, lengths)))
    places = rng.sample(range(len(stack)), len(hidden))
    golds, rest = sorted(places[: len(needles.asked)]), sorted(places[len(needles.asked) :])
    for place, needle in zip([*golds, *rest], hidden, strict=True):
        stack[place].insert(rng.randint(0, each), needle)
    return needles.question, needles.answers, [" ".join(sentences) for sentences in stack], set(golds)


def _common_words(rng: random.Random, room: Room, lengths: Lengths) -> _Made:
    question = f"Which {_COMMON} words stand in the passages most often?"
    free = room(question)
    words = _distinct(
        _COMMON + max(50, free // 3),
        lambda: "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)),
    )
    a_word = sum(_tokens([" ".join(words[:50])], lengths)) / 50
    common, others = words[:_COMMON], int(free / a_word - _COMMON * _OFTEN) // _SELDOM
    each = max(2, round(_PASSAGE / a_word))
    while others >= _COMMON:
        bag = [*common * _OFTEN, *words[_COMMON : _COMMON + others] * _SELDOM]
        rng.shuffle(bag)
        parts = [bag[start : start + each] for start in range(0, len(bag), each)]
        texts = [" ".join(part) for part in parts]
        if sum(_tokens(texts, lengths)) <= free:
            return (
                question,
                tuple(common),
                texts,
                {n for n, part in enumerate(parts) if not set(part).isdisjoint(common)},
            )
        others = others * 99 // 100 - 1
    raise _too_short(COMMON_WORDS, free, int(a_word * (_COMMON * _OFTEN + 2 * _COMMON * _SELDOM)))


def _too_short(task: str, free: int, needed: int) -> InputError:
    return InputError(
        f"{task} needs some {needed:,} tokens of passages, and there is room for {free:,}: raise --tokens by "
        f"{needed - free + _PASSAGE:,}"
    )


def _tokens(texts: Sequence[str], lengths: Lengths) -> list[int]:
    return lengths([Passage(text) for text in texts])


def _sentence(rng: random.Random) -> str:
    (person, person2), (place, place2) = rng.sample(_PEOPLE, 2), rng.sample(_PLACES, 2)
    time, things, number = rng.choice(_TIMES), rng.choice(_THINGS), rng.randint(2, 90)
    words = {"person": person, "person2": person2, "place": place, "place2": place2, "things": things, "number": number}
    return rng.choice(_SENTENCES).format(time=time, Time=time.capitalize(), **words)


def _draw_things(rng: random.Random, count: int) -> list[str]:
    return rng.sample([f"{colour} {animal}" for colour in _COLOURS for animal in _ANIMALS], count)


def _draw_codes(rng: random.Random, count: int) -> list[str]:
    return _distinct(count, lambda: str(rng.randint(1_000_000, 9_999_999)))


def _distinct(count: int, draw: Callable[[], str]) -> list[str]:
    """So many different texts; all have the same length, so that none is a part of another."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)
