from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finch_rag.decode.detokenising import StopStrings, TextStream, strip_stream
from finch_rag.decode.generation import Decoder, Writer, choose_together
from finch_rag.decode.sampling import Sampling
from finch_rag.engine import Finch
from finch_rag.errors import InputError, NumericsError, SettingsError
from finch_rag.models.cache import CompressedCache
from finch_rag.prompts.builder import PromptBuilder
from finch_rag.settings import Settings

from .small import chat_tokenizer, small_finch, texts

BUILDER = PromptBuilder(chat_tokenizer())
EOS = frozenset({chat_tokenizer().eos_token_id})


class Speaker:
    """Stands in for a model: says the given tokens one after another."""

    def __init__(self, tokens: Sequence[int], logits: torch.Tensor | None = None) -> None:
        self.tokens: Iterator[int] = iter(tokens)
        self.logits = logits
        self.read: list[list[int]] = []

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.zeros(1, 1))

    def __call__(self, input_ids: torch.Tensor, **rest: Any) -> Any:
        self.read.append(input_ids[0].tolist())
        logits = torch.zeros(1, 1, 400) if self.logits is None else self.logits.clone()[None, None]
        if self.logits is None:
            logits[0, 0, next(self.tokens)] = 1.0
        return SimpleNamespace(logits=logits)


def decoder(tokens: Sequence[int], logits: torch.Tensor | None = None, **sampling: Any) -> Decoder:
    chosen = Sampling(**{"max_new_tokens": 200, **sampling})
    writer = Writer(chosen, EOS, BUILDER.decode)
    return Decoder(
        cast(Any, Speaker(tokens, logits)), CompressedCache(1, 8), [7, 8], writer, new_tokens=chosen.max_new_tokens
    )


def test_answers_that_choose_together_choose_as_each_alone() -> None:
    class Refuses(Writer):
        """As one whose form leaves no token."""

        def choose(self, logits: torch.Tensor) -> torch.Tensor:
            raise InputError("the form leaves no token")

    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}, {}, {"repetition_penalty": 1.5}, {}]
    logits = list(torch.randn(6, 1, 400, generator=torch.Generator().manual_seed(1)))
    logits[2][0, 7] = float("nan")

    def writers() -> list[Writer]:
        return [Writer(Sampling(**kind), EOS, BUILDER.decode) for kind in kinds]

    alone = [writer.choose(rows) for writer, rows in zip(writers(), logits[:5], strict=True)]
    refusing = Refuses(Sampling(temperature=1.0), EOS, BUILDER.decode)
    together = choose_together([*writers(), refusing], logits)
    assert [choice.tolist() for choice in together[:5]] == [choice.tolist() for choice in alone]  # type: ignore[union-attr]
    assert [int(choice[1]) for choice in alone] == [0, 0, 1, 0, 0]
    assert isinstance(together[5], InputError)


def ids(text: str) -> list[int]:
    return BUILDER.encode([text])[0]


def said(text: str, **sampling: Any) -> tuple[list[str], Decoder]:
    """The deltas of an answer in which the model says ``text`` and ends."""
    running = decoder([*ids(text), *EOS], **sampling)
    return list(running), running


SAMPLES = [
    "The bridge was built in 1874.",
    "naïve café — 日本語 и русский",
    "👩‍👩‍👧 family, 🇨🇭 flag, 🙂",
    "a\n\nb  c\td",
    "half � replaced",
]


@pytest.mark.parametrize("text", SAMPLES)
def test_deltas_join_to_the_text_and_never_show_half_a_character(text: str) -> None:
    deltas, running = said(text)
    assert "".join(deltas) == text
    assert "\ufffd" in text or all("\ufffd" not in delta for delta in deltas)
    assert running.writer.stop_reason == "eos"
    assert len(ids(text)) + 1 == len(running.writer.token_ids)


def test_an_emoji_takes_several_tokens_here() -> None:
    assert len(ids("🙂")) == 4  # or the tests above show nothing


def test_text_arrives_while_it_is_made() -> None:
    deltas, _ = said("The bridge was built in 1874.")
    assert len(deltas) > 5


@given(st.lists(st.integers(3, 399), max_size=25))
@settings(deadline=None)
def test_a_text_stream_of_any_tokens_joins_to_the_decoded_text(tokens: list[int]) -> None:
    stream = TextStream(BUILDER.decode)
    assert "".join([*map(stream.push, tokens), stream.flush()]) == BUILDER.decode(tokens)


def test_half_a_character_at_the_end_is_shown_as_it_decodes() -> None:
    tokens = ids("ok 🙂")[:-1]
    running = decoder(tokens, max_new_tokens=len(tokens))
    assert "".join(running) == BUILDER.decode(tokens)


@given(
    st.text("abc ", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), max_size=20),
)
def test_stop_strings_end_the_text_before_the_first_however_it_arrives(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    stops = [stop for stop in stops if not any(stop != other and other in stop for other in stops)]
    stopper, shown, rest = StopStrings(stops), "", text
    for cut in [*cuts, len(text) + 1]:
        if not stopper.stopped:
            shown += stopper.push(rest[:cut])
            rest = rest[cut:]
    if not stopper.stopped:
        shown += stopper.flush()
    places = [text.find(stop) for stop in stops if stop in text]
    assert stopper.stopped == bool(places)
    assert shown == (text[: min(places)] if places else text)


@pytest.mark.parametrize(
    ("stops", "shown"),
    [
        (("bridge",), "The"),
        (("ge was b",), "The brid"),  # over several tokens
        (("1874", "built"), "The bridge was"),
        (("The",), ""),
        (("T",), ""),
        (("bridges", "built ix"), "The bridge was built in 1874."),  # nearly, but never
        (("1874.",), "The bridge was built in"),
    ],
)
def test_a_stop_string_ends_the_answer_and_is_not_shown(stops: tuple[str, ...], shown: str) -> None:
    deltas, running = said("The bridge was built in 1874.", stop=stops)
    assert "".join(deltas) == shown
    assert running.writer.stop_reason == ("eos" if shown.endswith("1874.") else "stop")


def test_a_stop_token_ends_the_answer_as_an_end_token_does() -> None:
    tokens = ids("The bridge was built in 1874.")
    for place in (0, 3, len(tokens) - 1):
        running = decoder([*tokens, *EOS], stop_token_ids=(tokens[place], 399))
        first = tokens.index(tokens[place])
        assert "".join(running) == BUILDER.decode(tokens[:first]).strip()
        assert (running.writer.stop_reason, running.writer.token_ids) == ("eos", tokens[: first + 1])


def test_the_models_own_end_token_still_ends_the_answer_beside_a_stop_token() -> None:
    deltas, running = said("The bridge.", stop_token_ids=(399,))
    assert "".join(deltas) == "The bridge."
    assert (running.writer.stop_reason, running.writer.token_ids[-1]) == ("eos", *EOS)


def test_no_token_is_made_after_a_stop_string() -> None:
    _, running = said("The bridge was built in 1874.", stop=("The",))
    assert len(running.writer.token_ids) <= len(ids("The"))


def test_the_start_of_a_stop_string_is_held_back_and_shown_when_it_comes_to_nothing() -> None:
    stopper = StopStrings(["\nQ:"])
    assert [stopper.push("a\n"), stopper.push("Q"), stopper.push("b")] == ["a", "", "\nQb"]


@pytest.mark.parametrize(("text", "shown"), [("  a b \n", "a b"), ("\n\n", ""), ("a  \n b", "a  \n b"), ("", "")])
def test_white_space_around_the_answer_is_stripped(text: str, shown: str) -> None:
    deltas, _ = said(text)
    assert "".join(deltas) == shown
    assert "" not in deltas


@given(st.lists(st.text("a \n", max_size=3), max_size=10))
def test_a_stripped_stream_joins_to_the_stripped_text(pieces: list[str]) -> None:
    assert "".join(strip_stream(piece for piece in pieces)) == "".join(pieces).strip()


def test_the_answer_ends_at_the_length() -> None:
    running = decoder(ids("The bridge was built"), max_new_tokens=3)
    assert "".join(running) == BUILDER.decode(ids("The bridge was built")[:3]).strip()
    assert (running.writer.stop_reason, len(running.writer.token_ids)) == ("length", 3)


def test_each_token_is_read_once_and_the_last_is_not() -> None:
    tokens = ids("The bridge was built")
    running = decoder(tokens, max_new_tokens=3)
    list(running)
    assert cast(Any, running)._model.read == [[7, 8], [tokens[0]], [tokens[1]]]


def test_control_tokens_are_not_shown() -> None:
    running = decoder([0, *ids("yes"), 2, *ids(" or no"), *EOS])
    assert "".join(running) == "yes or no"


PROBABILITIES = torch.full((400,), 1e-6)
PROBABILITIES[[10, 11, 12, 13]] = torch.tensor([0.4, 0.3, 0.2, 0.1])


def drawn(count: int = 300, **sampling: Any) -> list[int]:
    running = decoder([], PROBABILITIES.log(), max_new_tokens=count, **{"temperature": 1.0, "seed": 0, **sampling})
    list(running)
    return running.writer.token_ids


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(drawn(5, temperature=0)) == {10}


def test_a_temperature_draws_by_probability() -> None:
    tokens = drawn(2000)
    for token, probability in zip((10, 11, 12, 13), (0.4, 0.3, 0.2, 0.1), strict=True):
        assert tokens.count(token) / 2000 == pytest.approx(probability, abs=0.05)


def test_a_low_temperature_is_sharper_and_a_high_one_flatter() -> None:
    assert drawn(temperature=0.2).count(10) > drawn().count(10) > drawn(temperature=5.0).count(10)


def test_top_k_draws_from_the_k_likeliest() -> None:
    assert set(drawn(top_k=2)) == {10, 11}
    assert set(drawn(top_k=1)) == {10}


def test_top_p_draws_from_the_likeliest_that_sum_to_p() -> None:
    assert set(drawn(top_p=0.6)) == {10, 11}
    assert set(drawn(top_p=0.3)) == {10}


def test_a_repetition_penalty_makes_what_was_said_less_likely() -> None:
    assert drawn(4, temperature=0, repetition_penalty=1000.0) == [10, 11, 12, 13]
    assert set(drawn(4, temperature=0, repetition_penalty=1.0)) == {10}
    assert set(drawn(4, temperature=0, repetition_penalty=1.01)) == {10}
    assert set(drawn(4, repetition_penalty=1000.0)) == {10, 11, 12, 13}


def test_a_seed_repeats_and_another_does_not() -> None:
    assert drawn(40, seed=3) == drawn(40, seed=3)
    assert drawn(40, seed=3) != drawn(40, seed=4)
    assert drawn(40, seed=None) != drawn(40, seed=None)


def test_sampling_leaves_torchs_own_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn(10)
    drawn(10, seed=None)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -5),
        ("temperature", -0.5),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", 0),
        ("stop", ("a", "")),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_it(setting: str, value: Any) -> None:
    with pytest.raises(InputError, match=setting.split("_")[0]) as caught:
        Settings().updated({setting: value})
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError):
        Settings().updated({setting: value}, SettingsError)


def test_values_at_their_limits_are_fine() -> None:
    limits = {"max_new_tokens": 1, "temperature": 0, "top_p": 1.0, "top_k": 1, "stop": ("x",)}
    assert Settings().updated(limits).sampling == Sampling(1, 0, 1.0, 1, stop=("x",))
    assert drawn(3, top_p=1.0, top_k=5000)


def test_nan_logits_are_an_error() -> None:
    with pytest.raises(NumericsError, match="NaN"):
        list(decoder([], torch.full((400,), float("nan"))))


@pytest.mark.parametrize("part", ["lm_head", "model.layers.1.mlp.down_proj", "model.norm"])
@pytest.mark.parametrize("selection", ["passage", "token"])
def test_nan_weights_are_an_error(part: str, selection: Any) -> None:
    broken = small_finch(selection=selection)
    with torch.no_grad():
        broken.model.get_parameter(f"{part}.weight").fill_(float("nan"))
    with pytest.raises(NumericsError, match="NaN") as caught:
        broken.ask("When?", texts(6))
    assert "\n" not in str(caught.value)


def test_nan_weights_do_not_rank(finch: Finch) -> None:
    broken = small_finch()
    with torch.no_grad():
        broken.model.get_parameter("model.layers.0.self_attn.q_proj.weight").fill_(float("nan"))
    with pytest.raises(NumericsError):
        broken.rank("When?", texts(6))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_the_prompt_is_launched_while_the_passages_are_still_read() -> None:
    finch = small_finch()
    torch.nn.Module.to(finch.model, "cuda")
    cache = finch.compress("When?", texts(8)).fork(8)
    passes = Decoder(finch.model, cache, [7, 8], finch.runtime.writer(Sampling(2)), new_tokens=2).logits()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = next(passes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits.isfinite().all()
