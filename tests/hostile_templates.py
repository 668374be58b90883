"""Chat templates that harm who renders them, each in its own way, and some that only look as if they did."""

from __future__ import annotations

from collections.abc import Mapping

_SHOWN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
_DOUBLED = "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
_MANY = "{% for i in range(99999) %}"
_SELF = "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}"

# They would take for ever, or all memory.
RUNAWAY = {
    "loops in loops": _MANY * 3 + "{% endfor %}" * 3 + _SHOWN,
    "loops in loops, and writes": _MANY * 3 + "x" + "{% endfor %}" * 3,
    "loops over a text": "{% for a in 'x' * 99999 %}{% for b in 'x' * 99999 %}{% endfor %}{% endfor %}" + _SHOWN,
    "loops behind the messages": _SHOWN + _MANY * 3 + "{% endfor %}" * 3,
    "loops for many turns": "{% if messages|length > 5 %}" + _MANY * 3 + "{% endfor %}" * 3 + "{% endif %}" + _SHOWN,
    "doubles a text": _DOUBLED + _SHOWN,
    "doubles a text and writes it": _DOUBLED + "{{ ns.s }}",
    "doubles a list": _DOUBLED.replace("'x'", "[0]").replace("~", "+") + _SHOWN,
    "repeats a text": "{{ 'x' * 10**11 }}" + _SHOWN,
    "repeats a list": "{% set x = [0] * 10**10 %}" + _SHOWN,
    "pads a text": "{{ 'x'|center(10**11) }}" + _SHOWN,
    "pads by a format": "{{ '%100000000000d' % 1 }}" + _SHOWN,
    "pads by another format": "{{ '{:>100000000000}'.format(1) }}" + _SHOWN,
    "indents": "{{ messages|tojson(indent=10**10) }}" + _SHOWN,
    "a power of powers": "{% set x = 9 ** (9 ** 9) %}" + _SHOWN,
    "squares a number": "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}"
    + _SHOWN,
    "writes lorem ipsum": "{{ lipsum(n=10**7) }}" + _SHOWN,
    "writes a million characters": "{% for i in range(99999) %}" + "x" * 99 + "{% endfor %}" + _SHOWN,
    "branches for ever": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}
# No trial knows so long a conversation: it has to be stopped where the prompt is made.
LATE = "{% if messages|length > 12 %}" + _MANY * 3 + "{% endfor %}" * 3 + "{% endif %}" + _SHOWN
# They fail, or make nothing that can be used.
USELESS: Mapping[str, object] = {
    "loops over a range of 10**9": "{% for i in range(10**9) %}{% endfor %}" + _SHOWN,
    "raises": "{{ raise_exception('no') }}",
    "raises in lines": "{{ raise_exception('no\nand no') }}",
    "calls itself": _SELF + _SHOWN,
    "includes another": "{% include 'x' %}",
    "is unsafe": "{{ ''.__class__.__mro__ }}" + _SHOWN,
    "changes a list": "{{ messages.append(1) }}" + _SHOWN,
    "divides by zero": "{{ 1 / 0 }}",
    "adds a text to a number": "{{ 1 + 'x' }}",
    "indexes nothing": "{{ messages[99].content }}",
    "calls nothing": "{{ nothing() }}",
    "is no template": "{% for %}",
    "is deep": "(" * 500 + "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "is deeper": "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "is empty space": " \n\t ",
    "makes empty space": "{% for m in messages %} \n{% endfor %}",
    "makes None": "{{ None }}",
    "drops the content": "{% for m in messages %}{{ m['role'] }}: \n{% endfor %}",
    "drops the question": "{% for m in messages[:-1] %}{{ m['content'] }}{% endfor %}",
    "shortens the content": "{% for m in messages %}{{ m['content'][:5] }}{% endfor %}",
    "writes the content in capitals": "{% for m in messages %}{{ m['content']|upper }}{% endfor %}",
    "turns the content round": "{% for m in messages %}{{ m['content']|reverse }}{% endfor %}",
    "a number": 7,
    "a list": ["x"],
    "bytes": b"x",
}
# They take a while, or much memory, and are no harm.
HARMLESS = {
    "a long text of its own": "{% set x = 'y' * 50000 %}{{ x }}\n" + _SHOWN,
    "some loops": "{% for i in range(200) %}{% for j in range(100) %}{% endfor %}{% endfor %}" + _SHOWN,
    "a date": "Today is {{ strftime_now('%d %B %Y') }}.\n" + _SHOWN,
    "the tag of generations": (
        "{% for m in messages %}{% generation %}{{ m['content'] }}\n{% endgeneration %}{% endfor %}"
    ),
    "a loop that breaks": (
        "{% for m in messages %}{{ m['content'] }} {% if loop.last %}{% break %}{% endif %}{% endfor %}"
    ),
}
