"""Orphans: a process that works for another asks to end with it, so that a killed tuner or compiler leaves none behind."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def die_with_parent() -> None:
    """Asks Linux to kill this process when the thread that started it ends, and ends now where it already has."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent or parent == 1:
        os._exit(1)
