"""All attacks, for as long as one likes, and the table of what came out of them.

    python -m tests.torture [--minutes 30] [--output docs/torture.md]

`make torture` calls it. The exit status is 1 where anything was wrong or raw.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

import torch

from finch_rag.terminal.output import note, say

from . import concurrency, forgery, interrupts, kills
from .tally import Tally

_HEAD = """| what was injected | how often | recovered | one clear line | wrong | raw | seconds |
|---|---|---|---|---|---|---|"""

# Each attack has a share of the time; it is repeated, with another seed, until that is over.
Attack = Callable[[Path, int], Iterable[Tally]]
ATTACKS: list[tuple[float, Attack]] = [
    (0.05, lambda folder, seed: [forgery.attack(20_000, seed)]),
    (0.25, lambda folder, seed: [interrupts.attack(folder, 50, seed)]),
    (0.25, lambda folder, seed: [kills.attack(folder, 40, seed)]),
    (0.45, lambda folder, seed: concurrency.attack(folder, seed=seed)),
]


def run(attack: Attack, seconds: float) -> list[Tally]:
    """What comes out of an attack that is repeated for so many seconds, once at the least.

    Args:
        attack: Takes a folder and a seed.
        seconds: After which no further one begins.
    """
    total: dict[str, Tally] = {}
    started, seed = time.monotonic(), 0
    while not seed or time.monotonic() - started < seconds:
        with tempfile.TemporaryDirectory() as folder:
            for tally in attack(Path(folder), seed):
                so_far = total.setdefault(tally.what, Tally(tally.what))
                so_far.counts.update(tally.counts)
                so_far.examples += tally.examples
        seed += 1
    return list(total.values())


def main() -> int:
    """Runs all, prints the table, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="in all; each attack runs once at the least")
    parser.add_argument("--output", type=Path, help="a file for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small matrices gain nothing from more, and a fork must be able to compute
    host = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}"
    lines = [
        f"`python -m tests.torture --minutes {arguments.minutes:g}`, {datetime.now(UTC):%Y-%m-%d}, {host}:",
        "",
        *_HEAD.splitlines(),
    ]
    for line in lines:
        say(line)
    bad = 0
    for share, attack in ATTACKS:
        started = time.monotonic()
        tallies = run(attack, share * 60 * arguments.minutes)
        seconds = (time.monotonic() - started) / len(tallies)
        for tally in tallies:
            lines.append(tally.row(f"{seconds:.0f}"))
            say(lines[-1])
            for example in tally.examples:
                note(example)
            bad += tally.bad
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
