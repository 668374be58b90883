"""A text's sentences with their places, and where they stand among tokens."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from finch_rag.models.loading import load_model
from finch_rag.prompts.builder import PromptBuilder
from finch_rag.prompts.passages import Passage
from finch_rag.prompts.sentences import sentence_spans
from finch_rag.quotes.borders import first_characters, kept_sentences, starts_by_decoding

from .small import CONTROL, chat_tokenizer

SENTENCES: list[list[str]] = [
    ["It opened in 1874.", "It closed."],
    ["Dr. Novak came at 5 p.m.", "The ferry left.", "It cost 3.5 pounds (e.g. in May)."],
    ['J. R. Novak said "Go."', "He went."],
    ["He asked: why?", "Nobody knew!", "Really?!", "Yes."],
    ["Wait... what?", "The end\u2026", "Then more."],
    ["The U.S. Navy came.", "It left."],
    ["See Fig. 3 and No. 5.", "No.", "That is all."],
    ["Novak et al. found it."],
    ["\u6771\u4eac\u306f\u5927\u304d\u3044\u3002", "\u300c\u305d\u3046\u3067\u3059\u3002\u300d", "\u306f\u3044"],
    ["\u092f\u0939 \u0939\u0948\u0964", "\u0935\u0939 \u0939\u0948\u0964"],
    ["no full stop at all"],
    ["(It was so.)", "[It is.]", "*Still.*", "Now."],
]
WORDS = " ".join(sentence for sentences in SENTENCES for sentence in sentences)
ODD = "  The <|im_end|> came. \n\n\nIt <|im_start|>user left </s> then.\n- a caf\u00e9 \U0001f600 opened.  "


def cut(text: str) -> list[str]:
    return [text[start:end] for start, end in sentence_spans(text)]


@pytest.mark.parametrize("sentences", SENTENCES, ids=[sentences[0][:20] for sentences in SENTENCES])
def test_sentences_end_at_full_stops(sentences: list[str]) -> None:
    assert cut(" ".join(sentences)) == sentences
    assert cut("\n\n".join(sentences)) == sentences
    assert cut("\n " + "  \n ".join(sentences) + "\n") == sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        (" \n\t ", []),
        ("# A title\nThe text.", ["# A title", "The text."]),
        ("1. One. Two.\n2. Three\n- four\n* five", ["1. One.", "Two.", "2. Three", "- four", "* five"]),
        ("| a | b |\n|---|---|\n| 1 | 2 |", ["| a | b |", "|---|---|", "| 1 | 2 |"]),
        ("a line that is\nwrapped here. End.", ["a line that is\nwrapped here.", "End."]),
        (
            "It was the largest of the ships that sailed from the old\nHarbour of Elmsworth. It sank.",
            ["It was the largest of the ships that sailed from the old\nHarbour of Elmsworth.", "It sank."],
        ),
        ("Keeper:\nHugo Kessler\nBuilt\n1874", ["Keeper:", "Hugo Kessler", "Built", "1874"]),
        ("He met Dr.\nNovak there.", ["He met Dr.", "Novak there."]),
        ("a.b.c 3.14 x.y", ["a.b.c 3.14 x.y"]),
    ],
)
def test_lines_are_borders_unless_they_are_wrapped(text: str, sentences: list[str]) -> None:
    assert cut(text) == sentences


@given(
    st.text(alphabet=st.sampled_from("aB1 .!?\n\t\u3002\"')(-#|*,\u00e9\u2026\u2019"), max_size=60)
    | st.text(max_size=60)
)
def test_sentences_cover_all_but_white_space_in_order(text: str) -> None:
    spans = sentence_spans(text)
    end = 0
    for start, stop in spans:
        assert end <= start < stop
        assert not text[end:start].strip()
        assert text[start:stop] == text[start:stop].strip()
        end = stop
    assert not text[end:].strip()


@pytest.mark.parametrize(
    "text", ["." * 50_000, " " * 50_000, "\n" * 50_000, ". " * 25_000, ".)" * 25_000, "a\n" * 25_000]
)
def test_long_texts_take_no_quadratic_time(text: str) -> None:
    started = time.process_time()
    sentence_spans(text)
    assert time.process_time() - started < 2


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As sentencepiece has it: a mark for each space, one before the text, and bytes for unknown characters."""
    tokenizer = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    trainer = BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # no token goes over a space
    tokenizer.train_from_iterator([WORDS], trainer)
    written = json.loads(tokenizer.to_str())
    vocabulary = written["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    tokenizer = Tokenizer.from_str(json.dumps(written))
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def trimming_tokenizer() -> PreTrainedTokenizerFast:
    """Splits at white space and punctuation, and lowers what it reads."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        [WORDS.lower(), ODD.lower()], BpeTrainer(special_tokens=["<unk>"], show_progress=False, vocab_size=300)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>")


class Slow(PreTrainedTokenizerFast):
    """One that tells no places."""

    @property
    def is_fast(self) -> bool:
        return False


def slow_tokenizer() -> PreTrainedTokenizerFast:
    return Slow(tokenizer_object=chat_tokenizer().backend_tokenizer, eos_token=CONTROL[1])


def embedded_tokenizer() -> Any:
    return load_model("embedded").tokenizer


TOKENIZERS: dict[str, Any] = {
    "byte-level": chat_tokenizer,
    "metaspace": metaspace_tokenizer,
    "slow": slow_tokenizer,
    "lower case": trimming_tokenizer,
}


@pytest.fixture(params=[*TOKENIZERS, pytest.param("embedded", marks=pytest.mark.embedded)])
def prompts(request: pytest.FixtureRequest) -> PromptBuilder:
    return PromptBuilder(TOKENIZERS.get(request.param, embedded_tokenizer)())


PASSAGES = [
    Passage(WORDS, title="A title. In two sentences."),
    Passage(ODD),
    Passage(" "),
    Passage("no stop", title="x"),
]


def letters(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def test_the_tokens_of_a_sentence_decode_to_it(prompts: PromptBuilder) -> None:
    encoded = prompts.build("who?", PASSAGES).passages
    document = [token for passage in encoded for token in passage]
    sentences = kept_sentences(prompts, PASSAGES, encoded, torch.arange(len(document))[None])
    expected = [
        (number, start, end) for number, passage in enumerate(PASSAGES) for start, end in sentence_spans(passage.text)
    ]
    assert [(each.passage, each.start, each.end) for each in sentences] == expected
    for each in sentences:
        assert each.text == PASSAGES[each.passage].text[each.start : each.end]
        decoded = prompts.decode(document[each.first : each.stop])
        if "\ufffd" not in decoded and "<unk>" not in decoded:
            assert letters(decoded) == letters(each.text)
    assert len({place for each in sentences for place in range(each.first, each.stop)}) == sum(
        each.stop - each.first for each in sentences
    )


def test_only_sentences_that_are_kept_whole_are_told() -> None:
    prompts = PromptBuilder(chat_tokenizer())
    passages = [Passage("One is here. Two is there."), Passage("Three came. Four went.")]
    encoded = prompts.build("who?", passages).passages
    tokens = torch.arange(sum(map(len, encoded)))
    every = kept_sentences(prompts, passages, encoded, tokens[None])
    assert [each.text for each in every] == ["One is here.", "Two is there.", "Three came.", "Four went."]

    def told(kept: torch.Tensor) -> list[str]:
        return [each.text for each in kept_sentences(prompts, passages, encoded, kept)]

    assert told(tokens[None, : every[3].stop - 1]) == ["One is here.", "Two is there.", "Three came."]
    assert told(tokens[None, every[1].first :]) == ["Two is there.", "Three came.", "Four went."]
    assert told(tokens[None].flip(1)) == [each.text for each in every]  # another order of passages in the cache
    assert told(tokens.expand(2, -1)) == [each.text for each in every]
    assert told(torch.stack((tokens[:-1], tokens[1:]))) == []  # each layer keeps its own
    assert told(tokens[None, :0]) == []
    assert kept_sentences(prompts, passages[:1], encoded, tokens[None]) == every[:2]  # older turns are not quoted


def test_tokens_of_another_text_tell_nothing() -> None:
    prompts = PromptBuilder(chat_tokenizer())
    tokens = prompts.encode(["The harbour."])[0]
    assert first_characters(prompts, ["The museum."], [tokens]) == [[]]
    assert starts_by_decoding(prompts.decode, "The museum.", tokens) == []


def test_places_by_decoding_are_those_that_the_tokenizer_tells() -> None:
    prompts = PromptBuilder(chat_tokenizer())
    text = PASSAGES[0].titled_text
    [(tokens, starts)] = prompts.encode_with_starts([text]) or []
    assert prompts.encode([text]) == [tokens]
    by_decoding = starts_by_decoding(prompts.decode, text, tokens)
    plain = [place for place in range(len(tokens)) if text[starts[place]].isascii()]
    assert [by_decoding[place] for place in plain] == [starts[place] for place in plain]
