"""Processes that end with the one that started them, whatever ends that one."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from condense_core.cli.terminal import EXIT_BAD_INPUT

_LAUNCH = """
import ctypes, os, signal, sys
signal.pthread_sigmask(signal.SIG_SETMASK, [])
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
except (OSError, AttributeError):
    pass
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Runs the command behind the first argument, which is the parent's process id.

On Linux the kernel kills it when the thread that started it ends (PR_SET_PDEATHSIG is 1, and outlives ``exec``);
elsewhere a parent that is killed leaves it behind.
"""
_TAIL = 12
_ERROR = "error: "
_LOOK = 0.05
_PATIENCE = 15.0


class ChildFailed(ValueError):
    """A process ended that should not have, or did not get ready. ``tail`` has the last lines of its log."""

    def __init__(self, message: str, tail: Sequence[str]) -> None:
        super().__init__(message)
        self.tail = tuple(tail)


class Child:
    """One process with its log.

    Args:
        name: for people, and of the log's file. command: a function, since a process that is started again may be told
            something else. ready: what it writes once it can be used. environment: beside the parent's.
        seconds: in which it must get ready.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        *,
        folder: Path,
        ready: str,
        environment: Mapping[str, str] | None = None,
        seconds: float = 180.0,
    ) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        self._command, self._ready, self._seconds = command, re.compile(ready), seconds
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **(environment or {})}
        self._environment.pop("CONDENSE_API_KEY", None)  # it is for a server elsewhere
        self._process: subprocess.Popen[bytes] | None = None
        self._from = 0

    def start(self) -> None:
        """Start it; to be called in the thread that lives longest."""
        self._from = self.log.stat().st_size if self.log.exists() else 0
        command = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *self._command()]
        # A signal that comes while the process is made waits, so that none is there that nobody knows.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment,
                    process_group=0,  # Ctrl-C is for the parent, which ends its children in order
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def wait_ready(self, tick: Callable[[], None] = lambda: None) -> re.Match[str]:
        """What it said when it was ready; ``tick`` is called again and again meanwhile.

        Raises:
            ChildFailed: it ended before that, or took too long.
        """
        end = time.monotonic() + self._seconds
        while (found := self._ready.search(self._said())) is None:
            if not self.is_running:
                raise self.failed()
            if time.monotonic() > end:
                raise ChildFailed(f"{self.name}: not ready within {self._seconds:g} s", self.tail())
            tick()
            time.sleep(_LOOK)
        return found

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs, or before."""
        return None if self._process is None else self._process.poll()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal, where it runs."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        """As ``kill -9`` does, and wait for its end."""
        self.send(signal.SIGKILL)
        self.wait(_PATIENCE)

    def wait(self, seconds: float) -> bool:
        """Wait for its end; False where it has not come."""
        try:
            if self._process is not None:
                self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
        return True

    def failed(self) -> ChildFailed:
        """That it has ended, as an error: what it said itself, where it was told something wrong."""
        code, tail = self.code, self.tail()
        if code == EXIT_BAD_INPUT and tail and tail[-1].startswith(_ERROR):
            return ChildFailed(f"{self.name}: {tail[-1].removeprefix(_ERROR)}", ())
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return ChildFailed(f"{self.name}: ended with {how}, expected it to run", tail)

    def tail(self) -> list[str]:
        """The last lines of its log."""
        with contextlib.suppress(OSError):
            return self.log.read_text(errors="replace").splitlines()[-_TAIL:]
        return []

    def _said(self) -> str:
        """What it has written since its last start."""
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            log.seek(self._from)
            return log.read().decode(errors="replace")
        return ""


class Children:
    """All processes. At the end of ``with`` none of them runs."""

    def __init__(self) -> None:
        self.all: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, child: Child) -> Child:
        """Start a process."""
        self.all.append(child)
        child.start()
        return child

    def check(self, *, ends: Sequence[Child] = ()) -> None:
        """Raise ``ChildFailed`` where one has ended; ``ends``: those that may, with the exit code 0."""
        for child in self.all:
            if child.code is not None and not (child in ends and child.code == 0):
                raise child.failed()

    def close(self) -> None:
        """End all, those first that were started last; who does not follow a SIGTERM is killed.

        Signals that come meanwhile change nothing.
        """
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for child in reversed(self.all):
                child.send(signal.SIGTERM)
            end = time.monotonic() + _PATIENCE
            for child in reversed(self.all):
                if not child.wait(end - time.monotonic()):
                    child.kill()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
