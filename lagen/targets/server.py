"""Servers: processes that answer one line for one, each started once and kept for the next question.

A process of its own, because what it does (a compiler, an interpreted kernel) may hang or crash: that costs one question. Importing torch
and Triton takes longer than most answers, so a server that answered waits for the next question of its kind, from any caller in this
process. It ends when it took too long, with this process, and after ANSWERS answers, for compilers do not give back all memory.
"""

from __future__ import annotations

import atexit
import functools
import os
import select
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

STARTING = 120.0
"""Seconds that a server may take to import what it needs, on a machine whose disk is cold and whose cores are busy."""

ANSWERS = 200
"""How many questions one server answers."""


class Stopped(Exception):
    """A server ended, or was ended, without an answer."""


class Server:
    """One serving process, with a scratch folder of its own. It says a line when it is ready, and one for each that it is asked."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], scratch: str) -> None:
        self.scratch = tempfile.TemporaryDirectory(prefix="lagen-server-")
        self.words = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            env={**env, **({scratch: self.scratch.name} if scratch else {})},
            start_new_session=True,  # so that the assemblers it started end with it
        )
        self.pending = b""
        self.answers = -1  # its first line says that it is ready

    def ask(self, request: str, timeout: float) -> str:
        """Sends a line and returns the answer; raises Stopped."""
        if self.answers < 0:
            self._read(STARTING)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(request.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise Stopped("the process ended before it was asked") from error
        return self._read(timeout)

    def _read(self, timeout: float) -> str:
        assert self.process.stdout is not None
        while b"\n" not in self.pending:
            ready, _, _ = select.select([self.process.stdout], [], [], timeout)
            if not ready:
                raise Stopped(f"took longer than {timeout:.0f} s")
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                self.words.seek(0)
                raise Stopped(f"the process ended ({self.process.wait()}): {self.words.read()[-800:].strip()}")
            self.pending += more
        line, _, self.pending = self.pending.partition(b"\n")
        self.answers += 1
        return line.decode()

    def close(self) -> None:
        """Ends the process and everything it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self.words.close()
        self.scratch.cleanup()


class _Kept:
    """The servers of this process that wait, by what they were started with."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waiting: dict[object, list[Server]] = {}
        # servers die with the thread that started them (orphan.die_with_parent): this one lives as long as the process
        self.starter = ThreadPoolExecutor(1)
        atexit.register(self.close)

    def close(self) -> None:
        with self.lock:
            for server in (s for waiting in self.waiting.values() for s in waiting):
                server.close()
            self.waiting.clear()


@functools.cache
def _kept(process: int) -> _Kept:
    return _Kept()


@contextmanager
def server(command: Sequence[str], env: Mapping[str, str], scratch: str = "") -> Iterator[Server]:
    """Lends a server of ``command`` under the environment ``env``, one that waits or a new one; ``scratch`` names its folder to it.

    It is kept for the next who asks, unless the block raises Stopped.
    """
    kept = _kept(os.getpid())  # a forked child has none of its parent's
    key = (tuple(command), tuple(sorted(env.items())), scratch)
    with kept.lock:
        waiting = kept.waiting.setdefault(key, [])
        lent = waiting.pop() if waiting else None
    if lent is None:
        lent = kept.starter.submit(Server, command, env, scratch).result()
    whole = False
    try:
        yield lent
        whole = lent.answers < ANSWERS
    finally:
        if whole:
            with kept.lock:
                kept.waiting.setdefault(key, []).append(lent)
        else:
            lent.close()
