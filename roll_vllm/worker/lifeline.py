"""A process of an engine ends when the one that created it is gone, however that one died.

vLLM's engine core is not told when its parent is killed (vllm-project/vllm#55846), so each process watches the one that
made it: the engine core the frontend, and the workers of several ranks the engine core.
"""

from __future__ import annotations

import multiprocessing
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
    maker = multiprocessing.parent_process()  # which may be gone already
    parent = os.getppid() if maker is None else maker.pid
    threading.Thread(target=_watch, args=(parent,), name="roll_vllm-lifeline", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_INTERVAL_S)
    # SIGKILL: the engine loop may be deep in a native call, and nobody is left to report to.
    os.kill(os.getpid(), signal.SIGKILL)
