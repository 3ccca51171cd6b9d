"""SIGTERM ends a session as Ctrl-C does: fixtures are torn down, and what is known so far is reported."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

import pytest


def handle_termination(config: pytest.Config) -> None:
    """Take SIGTERM as Ctrl-C until the session ends, unless somebody else handles it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            signal.raise_signal(signal.SIGINT)
        else:  # a forked child, which is none of ours
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def restore() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, interrupt)
    config.add_cleanup(restore)
