"""How long the tests of states run: a moment in the ordinary run, else as long as ``FINCH_FUZZ_SECONDS`` says.

FINCH_FUZZ_SECONDS=600 pytest tests/test_cache_states.py tests/test_store_states.py
"""

from __future__ import annotations

import os
import time
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

SECONDS = float(os.environ.get("FINCH_FUZZ_SECONDS", "0"))  # of each test; 0 for the ordinary run

_ROUND = 20  # examples that are tried before the clock is looked at


def run_machine(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    """Runs a machine: the same examples every time, or others for so many seconds.

    Args:
        machine: The machine.
        examples: How many in the ordinary run.
        steps: The most steps of one.
    """
    fixed: dict[str, Any] = {
        "stateful_step_count": steps,
        "deadline": None,
        "database": None,
        "report_multiple_bugs": False,
        "phases": (Phase.generate,),  # to make a row of calls shorter takes minutes
        "suppress_health_check": list(HealthCheck),
    }
    if not SECONDS:
        run_state_machine_as_test(machine, settings=settings(max_examples=examples, derandomize=True, **fixed))
        return
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        run_state_machine_as_test(machine, settings=settings(max_examples=_ROUND, derandomize=False, **fixed))
