"""Answers as OpenAI's newer responses: an item with a part, whose annotations come one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..answer import Answer
from ..prompts.passages import Passage
from .citations import Cited
from .replies import Reply, usage_of

_CUT_OFF = "max_output_tokens"


class ResponseReply(Reply):
    """A message as the one item of a response.

    Args:
        model: The model's name.
        passages: That the request brought.
        report: Whether the usage has the report.
    """

    prefix = "resp_"
    last_event = ""

    def __init__(self, model: str, passages: Sequence[Passage], report: bool) -> None:
        super().__init__(model, passages, report)
        self._item_id = self._id.replace(self.prefix, "msg_", 1)
        self._events = 0

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer in one piece.

        Args:
            answer: The answer.
        """
        cited = self._cited(answer)
        status = "incomplete" if answer.report.stop_reason == "length" else "completed"
        item = self._item(status, [_part(answer.text, _annotations(cited))])
        return self._response(status, [item], _usage(usage_of(answer, cited, self._report)))

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the text."""
        return [
            self._event("response.created", response=self._response("in_progress", [], None)),
            self._event("response.in_progress", response=self._response("in_progress", [], None)),
            self._event("response.output_item.added", output_index=0, item=self._item("in_progress", [])),
            self._of_part("response.content_part.added", part=_part("", [])),
        ]

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk of the text.

        Args:
            text: The piece.
        """
        return self._of_part("response.output_text.delta", delta=text, logprobs=[])

    def ending(self, answer: Answer, include_usage: bool) -> list[dict[str, Any]]:
        """The chunks behind the text; the last one has the whole response, tokens included.

        Args:
            answer: The whole answer.
            include_usage: Makes no difference here.
        """
        whole = self.whole(answer)
        (item,) = whole["output"]
        (part,) = item["content"]
        annotated = [
            self._of_part("response.output_text.annotation.added", annotation=annotation, annotation_index=place)
            for place, annotation in enumerate(part["annotations"])
        ]
        return [
            *annotated,
            self._of_part("response.output_text.done", text=answer.text, logprobs=[]),
            self._of_part("response.content_part.done", part=part),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(f"response.{whole['status']}", response=whole),
        ]

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        """The chunk that says what went wrong on the way.

        Args:
            error: The body of the error.
        """
        return self._event("error", **{**error["error"], "type": "error"}, **error)

    def _event(self, kind: str, **values: Any) -> dict[str, Any]:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **values}

    def _of_part(self, kind: str, **values: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **values)

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _response(self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": _CUT_OFF} if status == "incomplete" else None,
            "instructions": None,
            "metadata": {},
            "model": self._model,
            "output": output,
            "parallel_tool_calls": False,
            "temperature": None,
            "tool_choice": "none",
            "tools": [],
            "top_p": None,
            "usage": usage,
        }


def _part(text: str, annotations: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": annotations, "logprobs": []}


def _annotations(cited: Cited) -> list[dict[str, Any]]:
    """The annotations of a message, flat."""
    return [
        {"type": found["type"], **found["url_citation"], "document": found["document"]} for found in cited.annotations()
    ]


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
        "finch": usage["finch"],
    }
