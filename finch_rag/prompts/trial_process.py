"""Run by `finch_rag.prompts.trial` in a process of its own: renders a chat template as transformers would.

It stands alone, on jinja2 and the standard library, so that it starts fast. It reads JSON from its input, says "ready",
and then one line: empty where the template can be rendered, or fails as it will fail again; else what is wrong.
"""

from __future__ import annotations

import datetime
import json
import sys
from typing import Any


def main() -> None:
    """Reads what to render, renders it, and says what is wrong."""
    told = json.loads(sys.stdin.readline())
    sys.path[:] = told["path"]
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag that marks what an assistant has generated."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

        def parse(self, parser: Any) -> Any:
            """Its body, as it stands."""
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def fail(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None, **options: json.dumps(value, indent=indent)
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    _say("ready")
    _limit(told["most_bytes"], told["most_seconds"])
    try:
        template = environment.from_string(told["template"])
    except MemoryError:
        _say("it takes too much memory")
        return
    except Exception:
        _say("")
        return
    wrong = ""
    for messages in told["conversations"]:
        try:
            length = len(template.render(messages=messages, **told["variables"]))
            wrong = f"it makes {length:,} characters of a few words" if length > told["most_characters"] else ""
        except MemoryError:
            wrong = "it takes too much memory"
        except Exception:  # it will be told where the prompt is made
            continue
        if wrong:
            break
    _say(wrong)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _limit(most_bytes: int, most_seconds: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    for what, most in ((resource.RLIMIT_AS, most_bytes), (resource.RLIMIT_CPU, most_seconds)):
        _, hard = resource.getrlimit(what)
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(what, (soft, hard))
        except (OSError, ValueError):  # macOS knows no limit of memory
            continue


if __name__ == "__main__":
    main()
