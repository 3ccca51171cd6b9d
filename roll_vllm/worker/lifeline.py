"""A worker ends when the process that created its engine is gone, however that process died.

vLLM's engine core is not told when its parent is killed (vllm-project/vllm#55846), so each child watches.
"""

from __future__ import annotations

import os
import signal
import threading
import time

_INTERVAL_S = 0.5
_started = threading.Event()


def watch_parent() -> None:
    """Start watching, once a process. A daemon thread ends this process within a second of its parent."""
    if _started.is_set():
        return
    _started.set()
    parent = os.getppid()
    threading.Thread(target=_watch, args=(parent,), name="roll_vllm-lifeline", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_INTERVAL_S)
    # SIGKILL: the engine loop may be deep in a native call, and nobody is left to report to.
    os.kill(os.getpid(), signal.SIGKILL)
