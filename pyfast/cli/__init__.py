# SPDX-License-Identifier: Apache-2.0
"""The command line: `pyfast finetune | generate | merge | quantize | convert | info`."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after the program's name; by default the process's.

    Returns:
        The exit status: 0, 2 after an error of the user's that is told in one sentence, 130 after
        Ctrl-C. Errors of the program itself are raised, and after SIGTERM SystemExit with status 143.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    try:
        with _unwinding_on_sigterm():
            # Importing what the commands need takes long enough to be interrupted.
            from pyfast.cli.program import run

            return run(given)
    except KeyboardInterrupt:
        if "--debug" in given:
            raise
        sys.stderr.write("Interrupted.\n")
        return 130


@contextlib.contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end a command as an error does, so that it takes its temporary files with it."""
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only there can signals be handled
        yield
        return
    former = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # another one would break into the cleaning up
    raise SystemExit(128 + number)
