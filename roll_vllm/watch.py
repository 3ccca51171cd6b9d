"""Notices at once when a process of an engine is gone, and says whose it was.

vLLM's own watching differs by release and executor: some notice the engine core only, some nothing at all, and none
says which rank died.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from roll_vllm import failure
from roll_vllm.errors import EngineDiedError

_POLL_S = 0.25


class Watch:
    """Watches processes of this machine, and for a failure that an executor leaves.

    Args:
        processes: what each process is, by pid. The first of several that end together is named.
        directory: where a failure would be left.
        report: called once, on the watching thread, with the error.
    """

    def __init__(
        self, processes: Mapping[int, str], directory: Path | None, report: Callable[[EngineDiedError], None]
    ) -> None:
        self._processes = dict(processes)
        self._directory = directory
        self._report = report
        self._ended = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._gone: list[int] = []
        for pid in self._processes:
            try:
                self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
            except ProcessLookupError:
                self._gone.append(pid)
        self._thread = threading.Thread(target=self._run, name="roll_vllm-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching; what ends from now on ends as it should."""
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            error = None
            while error is None and not self._ended.is_set():
                error = self._look()
            if error is not None and not self._ended.is_set():
                self._report(error)
        finally:
            for key in list(self._selector.get_map().values()):
                with contextlib.suppress(OSError):
                    os.close(key.fd)
            self._selector.close()

    def _look(self) -> EngineDiedError | None:
        gone = {*self._gone, *(key.data for key, _ in self._selector.select(_POLL_S))}
        left = failure.read(self._directory)
        if left is not None:
            return left if isinstance(left, EngineDiedError) else EngineDiedError(str(left))
        for pid, description in self._processes.items():
            if pid in gone:
                return EngineDiedError(
                    f"{description} (pid {pid}) died; what it wrote last is in its log, and if it wrote nothing, look "
                    "for the kernel's out-of-memory killer (dmesg). Shut this engine down and create a new one"
                )
        return None
