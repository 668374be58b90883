"""Examples for `finch_rag.heads.search`: passages that look alike, and a question that one of them answers.

A retrieval head is found by what it does, so the examples that are made here only need to be like retrieval: every
passage of an example tells the same kinds of facts about another thing, in other words, and only the right passage
holds the answer. A user's own can be read from a file.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..jsonl import json_objects

_CURE = 'each line is {"question": text, "passages": [text, text, ...], "gold": index of the right one, from 0}'


@dataclass(frozen=True, slots=True)
class HeadExample:
    """A question over passages.

    Attributes:
        question: The question.
        passages: Passages in the order in which they are read, at least 2.
        gold: Index of the passage that holds the answer.

    Raises:
        InputError: If one of them cannot be.
    """

    question: str
    passages: tuple[str, ...]
    gold: int

    def __post_init__(self) -> None:
        """Checks what a user may have written."""
        if not isinstance(self.question, str) or not self.question.strip():
            raise InputError("the question is empty: ask one")
        if len(self.passages) < 2:
            raise InputError(f"there are {len(self.passages)} passages: heads are told apart by 2 or more")
        for number, passage in enumerate(self.passages):
            if not isinstance(passage, str) or not passage.strip():
                raise InputError(f"passage {number} has no text: leave it out, or give it some")
        if isinstance(self.gold, bool) or not isinstance(self.gold, int) or not 0 <= self.gold < len(self.passages):
            raise InputError(f"gold is {self.gold!r}: name one of the passages 0 to {len(self.passages) - 1}")


def read_examples(path: str | Path) -> list[HeadExample]:
    """Reads examples, one JSON object a line with ``question``, ``passages`` (texts) and ``gold`` (index, from 0).

    Args:
        path: The file; empty lines are passed over.

    Raises:
        InputError: If it is missing or unreadable, has no examples, or a line is none.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"the examples {file} do not exist: pass a file of JSON lines, {_CURE}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 (byte {error.start}): pass a file of JSON lines") from error
    lines = json_objects(file.name, text, InputError, _CURE)
    examples = [_example(f"{file.name}, line {number}", fields) for number, fields in lines]
    if not examples:
        raise InputError(f"{file} has no examples: {_CURE}")
    return examples


def _example(where: str, fields: dict[str, Any]) -> HeadExample:
    if not isinstance(fields.get("passages"), list):
        raise InputError(f"{where} is no example: {_CURE}")
    question: Any = fields.get("question")
    gold: Any = fields.get("gold")
    try:
        return HeadExample(question, tuple(fields["passages"]), gold)  # which checks them
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


_FIRST = (
    "Agnes Anton Beatrice Bruno Clara Conrad Daphne Dorian Edith Emil Flora Felix Greta Gideon Helga Hugo Ingrid Ivo "
    "Josephine Jasper Katrin Klaus Lavinia Leopold Matilda Magnus Nadia Nicolas Odette Oscar Petra Philip Ramona "
    "Rufus Selma Stefan Tabitha Tobias Ursula Viktor Wilma Walter Yvonne Yannick Zelda Zachary"
).split()
_LAST = (
    "Abernathy Ashdown Bellweather Brandt Calloway Castellan Dunmore Eklund Fairbanks Fontaine Galloway Grimaldi "
    "Hathaway Holloway Inverness Jankowski Kessler Kingsley Lindqvist Lockhart Marchetti Merriweather Novak "
    "Nightingale Okafor Ostrander Pemberton Petrov Quillfeather Ravenscroft Rosenthal Sandoval Strickland Thornbury "
    "Tremaine Underhill Vandermeer Villanueva Wainwright Whitcombe Yarborough Zimmerman"
).split()
_TOWN = (
    "Alderbrook Ashcombe Barrowmere Blackford Castleton Cinderford Dunhaven Eastmarsh Elmsworth Fallowfield Glenrock "
    "Greywater Harrowgate Hillcrest Ironbridge Juniper Kingsport Larkspur Linwood Maplewood Millbrook Northgate "
    "Oakhurst Pinecrest Quarryton Redcliff Riverton Saltmarsh Silverlake Stonehaven Thornfield Umberton Valewood "
    "Westbridge Willowdale Yellowstone"
).split()
_THING = (
    "Amber Beacon Cobalt Compass Coral Crescent Crimson Diamond Ember Falcon Garnet Golden Granite Harbour Heron "
    "Indigo Ivory Jade Juniper Lantern Marble Meridian Onyx Opal Orchid Pearl Phoenix Quartz Raven Ruby Sapphire "
    "Scarlet Silver Sterling Summit Sycamore Topaz Velvet Violet Willow"
).split()
_GOODS = (
    "copper wire|wool blankets|clay pipes|leather saddles|glass bottles|paper kites|brass bells|linen sails|"
    "oak barrels|silk ribbons|tin toys|wax candles|steel springs|straw hats|stone jars|rope ladders"
).split("|")
_CAUSE = (
    "a fire in the east wing|a long drought|the death of its owner|a dispute over the lease|a flood in the valley|"
    "a change in the law|the loss of its main customer|a strike of the workers|a collapse of the roof|a rise in rents"
).split("|")


class _Source:
    """Draws values; no value is drawn twice for one example, so every fact belongs to one passage."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def draw(self, make: Callable[[random.Random], str]) -> str:
        value = make(self._rng)
        while value in self._used:
            value = make(self._rng)
        self._used.add(value)
        return value

    def person(self) -> str:
        return self.draw(lambda rng: f"{rng.choice(_FIRST)} {rng.choice(_LAST)}")

    def town(self) -> str:
        return self.draw(lambda rng: rng.choice(_TOWN))

    def name(self) -> str:
        return self.draw(lambda rng: rng.choice(_THING))

    def year(self, first: int = 1750, last: int = 1995) -> str:
        return self.draw(lambda rng: str(rng.randint(first, last)))

    def number(self, first: int, last: int) -> str:
        return self.draw(lambda rng: str(rng.randint(first, last)))

    def goods(self) -> str:
        return self.draw(lambda rng: rng.choice(_GOODS))

    def cause(self) -> str:
        return self.draw(lambda rng: rng.choice(_CAUSE))


_Story = tuple[str, list[str]]  # a passage and questions that it answers


def _museum(s: _Source) -> _Story:
    name, town, founder, year, rooms, keeper = s.name(), s.town(), s.person(), s.year(), s.number(12, 90), s.person()
    return (
        f"The {name} Museum in {town} opened to the public in {year}. It was founded by {founder}, who left the city a "
        f"large collection of maps and instruments. Visitors can walk through {rooms} rooms on three floors, and the "
        f"garden behind the house is free to enter. The present director, {keeper}, has added a library and a small "
        "theatre, and school classes come from the whole region during the winter months.",
        [
            f"Who founded the {name} Museum?",
            f"In which year did the {name} Museum open?",
            f"How many rooms does the {name} Museum have?",
            f"Who is the director of the {name} Museum?",
        ],
    )


def _ship(s: _Source) -> _Story:
    name, yard, captain, year, crew, cargo = s.name(), s.town(), s.person(), s.year(), s.number(14, 240), s.goods()
    return (
        f"Built in the yards of {yard}, the steamer {name} was launched in {year} after two years of work. On her "
        f"first voyage she was commanded by Captain {captain} and sailed with a crew of {crew}. For most of her life "
        f"she carried {cargo} between the northern ports, calling twice a month. She was known for her tall funnel and "
        "her uneven engines, and she was broken up when newer ships took over the trade.",
        [
            f"Who was the captain of the steamer {name} on her first voyage?",
            f"Where was the steamer {name} built?",
            f"What did the steamer {name} carry?",
            f"When was the steamer {name} launched?",
        ],
    )


def _scientist(s: _Source) -> _Story:
    person, town, year, teacher, prize = s.person(), s.town(), s.year(1760, 1960), s.person(), s.name()
    return (
        f"{person} was a botanist who was born in {town} in {year}. The youngest of five children, she studied under "
        f"{teacher} and later travelled through the mountains for eleven years to draw and collect mosses. Her "
        f"notebooks are kept in the university library. For her work on alpine plants she received the {prize} Medal, "
        "and a street and a small planet bear her name today.",
        [
            f"Where was the botanist {person} born?",
            f"Who was the teacher of {person}?",
            f"Which medal did {person} receive?",
        ],
    )


def _factory(s: _Source) -> _Story:
    name, town, goods, workers, owner, cause = s.name(), s.town(), s.goods(), s.number(40, 900), s.person(), s.cause()
    return (
        f"For half a century the {name} Works of {town} made {goods} for customers all over the country. At its height "
        f"the company employed {workers} people, many of whom lived in houses that it had built for them. Its last "
        f"owner was {owner}, who modernised the machines and paid for a clinic. The works closed because of {cause}, "
        "and the buildings are now used as studios and flats.",
        [
            f"What did the {name} Works make?",
            f"Why did the {name} Works close?",
            f"How many people did the {name} Works employ?",
            f"Who was the last owner of the {name} Works?",
        ],
    )


def _bridge(s: _Source) -> _Story:
    name, river, engineer, length, year = s.name(), s.town(), s.person(), s.number(90, 990), s.year()
    return (
        f"The {name} Bridge crosses the river near {river} on seven stone arches. It was designed by {engineer}, an "
        f"engineer who had before then built only railway stations, and it was completed in {year}. With a length of "
        f"{length} metres it was for some time the longest in the province. Cars were banned from it when a new road "
        "was opened further north, and it is now used by walkers and cyclists.",
        [
            f"Who designed the {name} Bridge?",
            f"How long is the {name} Bridge?",
            f"When was the {name} Bridge completed?",
        ],
    )


def _festival(s: _Source) -> _Story:
    name, town, founder, guests, prize = s.name(), s.town(), s.person(), s.number(1200, 98000), s.goods()
    return (
        f"Every autumn the {name} Festival fills the streets of {town} with music. The idea came from {founder}, a "
        f"teacher who wanted to give young players a stage. Last year {guests} guests came over four days, more than "
        f"the town has inhabitants. The winner of the song contest is traditionally given {prize}, and the final "
        "evening ends with a walk along the canal and a bonfire on the meadow.",
        [
            f"Who had the idea for the {name} Festival?",
            f"Where does the {name} Festival take place?",
            f"How many guests came to the {name} Festival last year?",
        ],
    )


_STORIES = (_museum, _ship, _scientist, _factory, _bridge, _festival)


def make_examples(count: int, passages: int, seed: int = 0) -> list[HeadExample]:
    """Examples with the right passage at every depth in turn.

    Half of the wrong passages tell the same kind of story as the right one, about another thing.

    Args:
        count: Number of examples.
        passages: Passages of each, at least 2.
        seed: Of the random draws; the same seed gives the same examples.
    """
    rng = random.Random(seed)
    examples = []
    for number in range(count):
        source = _Source(rng)
        story = _STORIES[number % len(_STORIES)]
        text, questions = story(source)
        others = [(story if n % 2 else rng.choice(_STORIES))(source)[0] for n in range(passages - 1)]
        gold = round(number * (passages - 1) / max(count - 1, 1))
        examples.append(HeadExample(rng.choice(questions), (*others[:gold], text, *others[gold:]), gold))
    rng.shuffle(examples)
    return examples
