"""Says on the terminal what is being waited for, and for how long, where that takes more than a few seconds.

``with waiting("starting engine"):`` is silent until then, with ``-q``, and outside of a pytest session. A thread of its
own writes past pytest's capture, to a duplicate of the terminal's file descriptor. On an interactive terminal the words
stand behind what is there, and vanish afterwards; elsewhere, as in the log of a CI job, they are lines that stay.

The processes of pytest-xdist have no terminal: they leave what they wait for in a file that the controller looks at. It
does not see those of other machines.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from pytest_roll_vllm.options import RUN, is_worker

_PATIENCE = 5.0  # seconds before anything is shown
_INTERVAL = 30.0  # seconds before, and at least between, lines that stay
_TICK = 1.0
_FILE = "vllm_waiting"


@dataclass(frozen=True)
class Wait:
    """One thing that is waited for.

    Attributes:
        what: What it is: ``starting engine``.
        since: When that began, in seconds since the epoch.
    """

    what: str
    since: float

    def __str__(self) -> str:
        return f"waiting: {self.what} ({self.seconds:.0f} s)"

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.time() - self.since


class _Channel(Protocol):
    def begin(self, wait: Wait) -> None: ...

    def end(self, wait: Wait) -> None: ...

    def clear(self) -> None: ...


_channels: list[_Channel] = []  # the last one counts: a test of a plugin runs pytest inside of pytest


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is being waited for while the body runs, if it takes long; in any thread.

    Args:
        what: What it is, as in "waiting: ...".
    """
    channel = _channels[-1] if _channels else None
    if channel is None:
        yield
        return
    wait = Wait(what, time.time())
    channel.begin(wait)
    try:
        yield
    finally:
        channel.end(wait)


def clear() -> None:
    """Make place for a line on the terminal while something is waited for."""
    for channel in _channels[-1:]:
        channel.clear()


def start(config: pytest.Config) -> None:
    """Begin to listen, until the end of the run."""
    if config.get_verbosity() < 0:
        return
    channel: _Channel
    if is_worker(config):
        path = config.workerinput.get(_FILE)  # type: ignore[attr-defined]
        if not path:
            return
        channel = _Relay(Path(path))
    elif config.pluginmanager.hasplugin("terminalreporter"):
        channel = Display(config)
        config.pluginmanager.register(channel, "roll-vllm-waiting")
        config.add_cleanup(channel.close)
    else:
        return
    _channels.append(channel)
    config.add_cleanup(lambda: _channels.remove(channel))


class _Relay:
    """Leaves what an xdist worker waits for in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waits: list[Wait] = []

    def begin(self, wait: Wait) -> None:
        self._waits.append(wait)
        self._write()

    def end(self, wait: Wait) -> None:
        self._waits.remove(wait)
        self._write()

    def clear(self) -> None:
        pass

    def _write(self) -> None:
        part = self._path.with_suffix(".part")
        with suppress(OSError):  # there may be no such directory on another machine
            if self._waits:
                part.write_text(json.dumps(asdict(self._waits[-1])), encoding="utf-8")
                part.replace(self._path)
            else:
                self._path.unlink(missing_ok=True)


class Display:
    """Shows what is waited for in this process, and in those of pytest-xdist; a plugin."""

    def __init__(self, config: pytest.Config) -> None:
        self._writer = config.get_terminal_writer()
        self._file = sys.stdout  # pytest captures nothing now
        try:
            self._descriptor: int | None = os.dup(self._file.fileno())
        except (OSError, ValueError):  # it is none, as where pytest runs inside of pytest
            self._descriptor = None
        self._live = self._file.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._waits: list[Wait] = []
        self._nodes: list[tuple[Any, Path]] = []
        self._shown = False
        self._last_line = 0.0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, wait: Wait) -> None:
        """Take something that is waited for."""
        self._waits.append(wait)
        self._watch()

    def end(self, wait: Wait) -> None:
        """Take away what is not waited for any more."""
        self._waits.remove(wait)
        self.clear()

    def clear(self) -> None:
        """Take away the words behind what is on the terminal."""
        with self._lock:
            if self._shown:
                self._write("\x1b[K")
                self._shown = False

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread:
            self._thread.join()
        if self._descriptor is not None:
            os.close(self._descriptor)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell an xdist worker where to leave what it waits for."""
        name = f"pytest-roll-vllm-{node.workerinput['testrunuid']}-{node.workerinput['workerid']}.waiting"
        path = Path(tempfile.gettempdir(), name)
        node.workerinput[_FILE] = str(path)
        self._nodes.append((node, path))
        self._watch()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Forget a worker that has ended, however it did."""
        for one in [one for one in self._nodes if one[0] is node]:
            self._nodes.remove(one)
            one[1].unlink(missing_ok=True)

    def _watch(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="vllm-waiting", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._closed.wait(_TICK):
            with self._lock:
                own = [wait for wait in self._waits[-1:] if wait.seconds >= _PATIENCE]
                if self._live and own:
                    self._show(own[0])
                self._show_lines(([] if self._live else [("", wait) for wait in own]) + self._of_nodes())

    def _of_nodes(self) -> list[tuple[str, Wait]]:
        found = []
        for node, path in list(self._nodes):
            with suppress(OSError, ValueError):  # there is none now
                label = node.workerinput.get(RUN, {}).get("label") or node.workerinput["workerid"]
                found.append((f"{label}: ", Wait(**json.loads(path.read_text(encoding="utf-8")))))
        return found

    def _show(self, wait: Wait) -> None:
        room = max(0, self._writer.fullwidth - self._writer.width_of_current_line - 2)
        end = f" ({wait.seconds:.0f} s)"[:room]
        # The cursor goes back, so that pytest goes on where it was.
        self._write(f"\x1b7\x1b[K {f'waiting: {wait.what}'[: room - len(end)]}{end}\x1b8")
        self._shown = True

    def _show_lines(self, waits: list[tuple[str, Wait]]) -> None:
        now = time.monotonic()
        if any(wait.seconds >= _INTERVAL for _, wait in waits) and now - self._last_line >= _INTERVAL:
            self._last_line = now
            begun = getattr(self._writer, "_current_line", "")
            lines = [f"{who}{wait}" for who, wait in waits if wait.seconds >= _PATIENCE]
            # A line of letters that is not full is begun anew.
            self._write("\n".join([*([""] if begun else []), *lines, begun]))

    def _write(self, text: str) -> None:
        if self._descriptor is None:
            self._file.write(text)
            self._file.flush()
            return
        with suppress(OSError):  # the terminal is gone
            os.write(self._descriptor, text.encode(self._file.encoding or "utf-8", "replace"))
