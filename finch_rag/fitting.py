"""What fits into a model's window: a prompt that was found in messages, and the turns of a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .errors import WindowError
from .prefill.planning import FixedTokens, default_budget
from .prompts.builder import Prompt, PromptBuilder, PromptSettings
from .prompts.chat_template import ASSISTANT, USER, Message, check_messages
from .prompts.parsing import ParsedPrompt
from .prompts.passages import Passage
from .runtime import Runtime
from .settings import Settings

OLDER_TURN = "Earlier in this conversation"  # title of an older turn that is read as a passage

_CHUNK = 1024  # tokens of a step that older turns leave room for


class WindowRoom:
    """What a model reads in one call, see `finch_rag.prompts.parsing.Room`.

    Args:
        runtime: The model.
        settings: Of the call.
    """

    def __init__(self, runtime: Runtime, settings: Settings) -> None:
        self._prompts = runtime.prompts
        self._settings = settings
        self.window = runtime.window

    def tokens(self, text: str) -> int:
        """Counts the tokens of a text.

        Args:
            text: Any text.
        """
        return len(self._prompts.encode([text])[0])

    def holds(self, parsed: ParsedPrompt) -> bool:
        """Whether a prompt fits, answer included, with nothing evicted but older turns.

        Args:
            parsed: The prompt.
        """
        if not parsed.question.strip():
            return True
        settings = self._settings
        own = replace(own_settings(settings, parsed), history=())
        prompt = _build(self._prompts, parsed.question, parsed.passages, own)
        document = sum(map(len, prompt.passages))
        step = min(document, _CHUNK)  # is in the cache twice while it is scanned
        return fixed_tokens(prompt, settings).total + document + step <= self.window


def own_settings(settings: Settings, parsed: ParsedPrompt) -> PromptSettings:
    """What a parsed prompt says beside passages and question.

    Args:
        settings: Of the call.
        parsed: The prompt.
    """
    prompt = settings.prompt
    return replace(
        prompt,
        instructions=prompt.instructions if parsed.instructions is None else parsed.instructions,
        system_prompt=prompt.system_prompt if parsed.system_prompt is None else parsed.system_prompt,
        history=parsed.history or prompt.history,
        in_own_words=parsed.in_own_words,
        following=parsed.following,
    )


def fixed_tokens(prompt: Prompt, settings: Settings) -> FixedTokens:
    """Tokens of a call that are never compressed.

    Args:
        prompt: Its prompt.
        settings: Of the call.
    """
    return FixedTokens(
        prefix=len(prompt.prefix),
        question=len(prompt.question),
        tail=len(prompt.tail),
        new=settings.sampling.max_new_tokens,
    )


@dataclass(frozen=True, slots=True)
class Fitted:
    """A prompt whose earlier turns fit.

    Attributes:
        prompt: Token ids.
        passages: The caller's, then one for each older turn that did not fit.
        turns: Older turns among them.
        notes: What was done, for the report.
    """

    prompt: Prompt
    passages: list[Passage]
    turns: int = 0
    notes: tuple[str, ...] = ()


def build_fitting(
    runtime: Runtime, question: str, passages: Sequence[Passage], settings: Settings, encoded: list[list[int]] | None
) -> Fitted:
    """Builds a prompt; the oldest turns of a conversation that outgrows the window are read as passages.

    Where question and instructions alone leave no room for passages, the oldest turns are left out.

    Args:
        runtime: The model.
        question: The question.
        passages: Checked passages.
        settings: Of the call.
        encoded: Token ids of the passages, where an earlier prompt has them.

    Raises:
        InputError: If the question or the history cannot be used.
        WindowError: If what is no history does not fit by itself.
    """
    prompts, window, own = runtime.prompts, runtime.window, settings.prompt
    whole = Fitted(_build(prompts, question, passages, own, encoded), list(passages))
    if not own.history:
        return whole
    taken = fixed_tokens(whole.prompt, settings).total
    budget = settings.reading.budget or min(default_budget(window), window // 4)
    with_passages = window - budget - min(_CHUNK, window // 4)
    if taken <= (with_passages if any(whole.prompt.passages) else window):
        return whole
    turns = list(_turns(check_messages(own.history, (USER, ASSISTANT), "history message")))
    lengths = [sum(map(len, prompts.encode([message["content"] for message in turn]))) for turn in turns]
    bare = _build(prompts, question, passages, replace(own, history=()), whole.prompt.passages)
    alone = fixed_tokens(bare, settings).total
    if alone > window:
        raise WindowError(
            f"instructions, question and answer take {alone} tokens, more than the model's window of {window}, even "
            f"without the {len(turns)} earlier turns of the history: shorten them or lower max_new_tokens; a shorter "
            "memory= does not help"
        )
    around = -(-(taken - alone - sum(lengths)) // len(turns))  # what the chat template puts around a turn
    as_passages = alone <= with_passages
    room = with_passages if as_passages else window
    moved = 0
    while moved < len(turns) and taken > room:
        taken -= lengths[moved] + around
        moved += 1
    kept = [message for turn in turns[moved:] for message in turn]
    older = [Passage(_text(turn), title=OLDER_TURN) for turn in turns[:moved]] if as_passages else []
    all_passages = [*passages, *older]
    encoded = whole.prompt.passages
    if older:
        encoded = [*encoded, *prompts.build(question, older).passages]
    what = "read as passages" if as_passages else "left out"
    return Fitted(
        _build(prompts, question, all_passages, replace(own, history=kept), encoded),
        all_passages,
        turns=len(older),
        notes=(f"{moved} older turns of the conversation did not fit: {what}",),
    )


def _build(
    prompts: PromptBuilder,
    question: str,
    passages: Sequence[Passage],
    own: PromptSettings,
    encoded: list[list[int]] | None = None,
) -> Prompt:
    return prompts.build(
        question,
        passages,
        own.instructions,
        own.system_prompt,
        own.history,
        own.render,
        encoded,
        own.in_own_words,
        own.following,
    )


def _turns(history: Sequence[Message]) -> Iterator[list[Message]]:
    """What the user said and what was answered, together."""
    turn: list[Message] = []
    for message in history:
        if turn and message["role"] == USER:
            yield turn
            turn = []
        turn.append(message)
    if turn:
        yield turn


def _text(turn: Sequence[Message]) -> str:
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in turn)
