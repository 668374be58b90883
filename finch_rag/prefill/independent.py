"""Independent reading: each passage is read alone, once for all questions of a call; each question looks at its own.

Nothing is moved or evicted. The head keys of one pass are looked at by every question and let go, so memory is that of
one pass, however many passages there are. `finch_rag.prefill.alone` says how passages are read and looked at,
`finch_rag.prefill.shortlists` reads the best of them again; a store is the same with the head keys kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from .alone import AloneReader, Asked, token_groups, tokens_per_pass
from .head_keys import KeyBlock, PassageRows, rows_on, summed
from .loop import StepProgress, no_progress
from .scan import Steps


@dataclass(frozen=True, slots=True)
class AloneQuestion:
    """A question with the passages that it looks at.

    Attributes:
        asked: The question as it is read.
        passages: Token ids of each; one without tokens gets nothing.
    """

    asked: Asked
    passages: Sequence[Sequence[int]]


@torch.inference_mode()
def rank_independently(
    reader: AloneReader,
    questions: Sequence[AloneQuestion],
    neutral: Asked,
    on_progress: StepProgress = no_progress,
) -> tuple[list[torch.Tensor], Steps]:
    """What questions pay to their passages; a passage that several of them have is read once.

    Args:
        reader: Reads passages and questions.
        questions: At least one, each with a passage that has tokens.
        neutral: See `finch_rag.prefill.alone.NEUTRAL`.
        on_progress: Called with the tokens of passages read so far, and in all; may raise to stop.

    Returns:
        For each question, on the CPU, float32, shape [its passages]; and the steps.

    Raises:
        DeviceMemoryError: If the device has no memory for a single passage.
    """
    distinct = dict.fromkeys(tuple(tokens) for question in questions for tokens in question.passages if tokens)
    texts = sorted(distinct, key=len)  # where a pass pads passages to the longest, little is padded
    number_of = {text: number for number, text in enumerate(texts)}
    own = [[number_of.get(tuple(tokens), -1) for tokens in question.passages] for question in questions]
    lengths = [len(tokens) for tokens in texts]
    longest = [max(map(len, question.passages)) for question in questions]
    looks = reader.look_together([question.asked for question in questions], neutral, longest)
    wanted = [sorted(set(numbers) - {-1}) for numbers in own]
    places = [dict(zip(numbers, range(len(numbers)), strict=True)) for numbers in wanted]
    rows: list[list[PassageRows]] = [[] for _ in questions]
    ends, steps = list(accumulate(lengths)), 0
    tokens = tokens_per_pass(reader.device.type)
    for group in token_groups(lengths, tokens):
        keys = reader.encode_in_parts(texts[group.start : group.stop])
        block = KeyBlock(keys[0] if len(keys) == 1 else torch.cat(keys, 1), None, lengths[group.start : group.stop])
        for question, look in enumerate(looks):
            here = [number - group.start for number in wanted[question] if number in group]
            if here:
                rows[question].append(rows_on(look, block if len(here) == len(group) else block.of(here)))
        steps += 1
        on_progress(ends[group.stop - 1], ends[-1])
    paid = [summed(look, found) for look, found in zip(looks, rows, strict=True)]
    attention = [
        torch.stack([found[place[number]] if number >= 0 else found.new_zeros(()) for number in numbers])
        for found, place, numbers in zip(paid, places, own, strict=True)
    ]
    return attention, Steps(steps, tokens, max(reader.heads) + 1)
