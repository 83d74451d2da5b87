"""Outcomes of a trial: what a config was worth, or why it may not be chosen. Plain values that a study's storage can hold."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a config may not be chosen. The first five are found before anything runs."""

    LIMIT = "breaks a limit"
    COMPILE = "does not compile"
    SHARED = "over shared memory"
    SPILLS = "spills"
    SAME = "same machine code"
    WRONG = "wrong numbers"
    RACE = "does not repeat"
    CRASH = "crashed"
    HANG = "took too long"


STATIC = (Reason.LIMIT, Reason.COMPILE, Reason.SHARED, Reason.SPILLS, Reason.SAME)


@dataclass(frozen=True)
class Failed:
    """A config that may not be chosen. ``excess`` says by how much a static limit is broken, where that is a number."""

    reason: Reason
    detail: str = ""
    excess: float = 1.0
    code: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


@dataclass(frozen=True)
class Timed:
    """What a config was worth: ``ratio`` of its time to the defaults', ``rival`` to the incumbent's, both medians over pairs.

    ``noise`` is the least relative gain that means something, from timing the defaults against themselves in the same rounds (0 where
    modelled). ``time`` and ``default`` are microseconds. ``code`` names the machine code, so that its like is not tried again.
    """

    ratio: float
    rival: float
    noise: float
    time: float
    default: float
    code: str = ""
    note: str = ""

    @property
    def wins(self) -> bool:
        """Tells whether the config beats the incumbent by more than the noise."""
        return self.rival < 1.0 - self.noise


Outcome = Timed | Failed
