"""What is common to all ways of generating an answer: what comes before its first token, and after its last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .answer import Answer, Citation, citations, report
from .decode.generation import Writer
from .models.kept_cache import KeptCache
from .request import Request


@dataclass(frozen=True, slots=True)
class Written:
    """An answer that is decoded.

    Attributes:
        answer: Without quotes.
        request: What was asked.
        cache: It was decoded on; it is cropped.
        before: Tokens of the cache before the answer's first.
        token_ids: Of the answer.
    """

    answer: Answer
    request: Request
    cache: KeptCache
    before: int
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Begun:
    """An answer whose passages are read.

    Attributes:
        request: What is asked.
        cache: To decode on; it has room for question and answer.
        cited: The passages that it holds.
        before: Tokens of the cache before the answer's first.
    """

    request: Request
    cache: KeptCache
    cited: list[Citation]
    before: int

    @classmethod
    def of(cls, request: Request, cache: KeptCache) -> Begun:
        """Begins an answer on a copy of a cache, so that the cache can be asked again.

        Args:
            request: What is asked.
            cache: Holds the passages. Let go of it afterwards: it has the room that reading needed.
        """
        prompt = request.answer_prompt
        own = cache.fork(request.room)
        before = own.length + own.unread_tokens + len(prompt)
        return cls(request, own, citations(cache, kept_only=True), before)

    def written(self, text: str, writer: Writer, seconds: float) -> Written:
        """The answer that was generated, without what it rests on.

        Args:
            text: The answer.
            writer: Has made it.
            seconds: That question and answer took.
        """
        told = replace(
            report(self.cache, len(self.request.answer_prompt)),  # now that all of it is read
            parse_mode=self.request.parse_mode,
            notes=self.request.notes,
            decode_seconds=seconds,
            new_tokens=len(writer.token_ids),
            stop_reason=writer.stop_reason,
        )
        answer = Answer(text, self.cited, told)
        return Written(answer, self.request, self.cache, self.before, writer.token_ids)
