"""vLLM 0.8.4: an engine core that fails does not take the caller's process with it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

from roll_vllm.patches.patch import Patch


def outlived(original: Callable[..., Any]) -> Callable[..., Any]:
    """``MPClient.__init__`` whose handler of SIGUSR1 kills nobody; the engine's own watch reports the failure."""

    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        module = sys.modules[original.__module__]
        kept = module.kill_process_tree
        # The core may fail before it is up; that, vLLM notices without the signal.
        module.kill_process_tree = lambda pid: None  # type: ignore[attr-defined]
        try:
            original(self, *args, **kwargs)
        finally:
            module.kill_process_tree = kept  # type: ignore[attr-defined]
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGUSR1, lambda number, frame: None)  # not SIG_IGN, which children inherit

    return __init__


PATCHES = (
    Patch(
        name="core-failure-outlived",
        target="vllm.v1.engine.core_client:MPClient.__init__",
        versions=">=0.8.4,<0.8.5",
        replacement=outlived,
        why="An engine core that fails sends SIGUSR1, and the handler kills the caller's process and all its children.",
        upstream="vllm/v1/engine/core_client.py: sigusr1_handler in 0.8.4",
        remove_when="0.8.4 is no longer supported",
    ),
)
