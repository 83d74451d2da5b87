"""Dumps what a stage made to the terminal, where the environment asks for it: LAGEN_DUMP=recurrence,plan, or all."""

from __future__ import annotations

import os
import sys

from lagen.ir.variant import Variant

STAGES = ("variant", "recurrence", "adjoint", "plan", "source")


def asked(stage: str) -> bool:
    """This function tells whether LAGEN_DUMP names a stage; raises KeyError for a stage that does not exist."""
    if stage not in STAGES:
        raise KeyError(f"no stage named {stage!r}; there are {', '.join(STAGES)}")
    wanted = {w.strip() for w in os.environ.get("LAGEN_DUMP", "").split(",")}
    return stage in wanted or "all" in wanted


def dump(stage: str, value: object) -> None:
    """This function prints ``value`` to stderr if its stage is asked for."""
    if asked(stage):
        print(f"---- {stage}\n{value.source if isinstance(value, Variant) else value}", file=sys.stderr)
