import pytest

from finch_rag.corpus.metrics import contains_answer, normalise, share_of_answers, token_f1


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The  Cat, sat on\na MAT!", "cat sat on mat"),
        ("an anthem theatre", "anthem theatre"),  # articles are words, not prefixes
        ("92.8 MHz", "928 mhz"),
        ("Wilhelm Röntgen", "wilhelm röntgen"),
        ("the", ""),
    ],
)
def test_normalise(text: str, normalised: str) -> None:
    assert normalise(text) == normalised


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("It was Morag Tulloch.", ["Morag Tulloch"], True),
        ("It was Tulloch, Morag.", ["Morag Tulloch"], False),
        ("34 metres", ["34 meters", "34 Metres"], True),
        ("anything", ["The", "!"], False),  # answers that normalise to nothing are in every text
        ("", ["x"], False),
        ("x", [], False),
    ],
)
def test_contains_answer(text: str, answers: list[str], right: bool) -> None:
    assert contains_answer(text, answers) is right


@pytest.mark.parametrize(
    ("text", "answers", "f1"),
    [
        ("the cat", ["Cat!"], 1.0),
        ("black cat sat", ["black cat"], 0.8),  # precision 2/3, recall 1
        ("cat cat", ["cat"], 2 / 3),  # a repeated word counts once: precision 1/2, recall 1
        ("dog", ["cat", "the dog"], 1.0),  # the best answer counts
        ("dog", ["cat"], 0.0),
        ("", ["cat"], 0.0),
        ("the", ["a"], 1.0),  # both are empty, as in SQuAD's script
        ("x", [], 0.0),
    ],
)
def test_token_f1(text: str, answers: list[str], f1: float) -> None:
    assert token_f1(text, answers) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("text", "answers", "share"),
    [
        ("They are 17 and 4.", ["17", "4", "99", "5"], 0.5),
        ("the ZEBRA, the cat", ["Cat", "zebra"], 1.0),
        ("anything", ["the", "thing"], 1.0),  # what normalises to nothing is not asked for
        ("anything", ["the"], 0.0),
        ("", ["x"], 0.0),
        ("x", [], 0.0),
    ],
)
def test_share_of_answers(text: str, answers: list[str], share: float) -> None:
    assert share_of_answers(text, answers) == pytest.approx(share)
