"""The patches of this process, and the record that says what became of them.

vLLM runs :func:`load` in the process that makes the engine, in the engine core (from 0.10.2 on), in every worker
and in its model inspection. Without :data:`VARIABLE` in the environment it does nothing, so that other engines
of the same environment stay as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_vllm import versions
from roll_vllm.errors import ConfigurationError, RollVllmError
from roll_vllm.patches.apply import Application, Outcome
from roll_vllm.patches.patch import PatchError
from roll_vllm.worker.lifeline import watch_parent

logger = logging.getLogger(__name__)

#: A directory in which every process of a rollout engine leaves its record.
VARIABLE = "ROLL_VLLM_RECORDS"

#: The plugin's name, as in ``VLLM_PLUGINS``.
PLUGIN = "roll_vllm"


@dataclass(frozen=True)
class Record:
    """What became of the patches in one process.

    Attributes:
        pid: The process.
        ppid: The process that started it.
        role: What it is: ``parent``, ``worker``, or the name that multiprocessing gave it.
        argv: Its command line, as Python sees it.
        version: The version of vLLM.
        patches: The outcome of every patch of the registry, by name.
        error: Why nothing was applied; empty if all is well.
        late: Whether vLLM had loaded its plugins without ours, so that what it did before, it did unpatched.
    """

    pid: int
    ppid: int
    role: str
    argv: tuple[str, ...]
    version: str
    patches: Mapping[str, Outcome]
    error: str = ""
    late: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The record in JSON's types."""
        return {**dataclasses.asdict(self), "argv": list(self.argv)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """Undo :meth:`as_dict`."""
        patches = {name: Outcome(**outcome) for name, outcome in data["patches"].items()}
        return cls(**{**data, "argv": tuple(data["argv"]), "patches": patches})


class _State:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.application: Application | None = None
        self.version = ""
        self.role = ""
        self.late = False
        self.error: Exception | None = None


_state = _State()
_watches_forks = False


def load() -> None:
    """vLLM's general plugin. Never raises: :func:`require` does, in a place where vLLM passes it on."""
    if os.environ.get(VARIABLE):
        # From here on, and not only once the engine is up: its start may take minutes, and be killed. The process that
        # makes the engine has its patches already.
        if _state.application is None and multiprocessing.parent_process() is not None:
            watch_parent()
        try:
            apply_here(multiprocessing.current_process().name)
        except Exception as error:
            logger.error("the patches of roll_vllm were not applied in process %d: %s", os.getpid(), error)


def apply_here(role: str) -> Record:
    """Apply all patches for the installed vLLM in this process, once, and leave the record.

    Args:
        role: what this process is; replaces what an earlier call said.

    Raises:
        PatchError: nothing was applied. Raised again by every later call.
    """
    with _state.lock:
        _state.role = role
        if _state.application is None and _state.error is None:
            _apply()
        _write()
        if (error := _error()) is not None:
            raise error
        return _record()


def require(role: str) -> Record:
    """What a worker calls before it does anything: the patches are applied here, or this raises why not.

    Raises:
        PatchError: as :func:`apply_here`; also what :func:`load` met and could only record.
        ConfigurationError: ``VLLM_PLUGINS`` keeps our plugin out, which comes before the worker.
    """
    allowed = os.environ.get("VLLM_PLUGINS")
    with _state.lock:
        if _state.application is None and _state.error is None:
            if allowed is not None and PLUGIN not in allowed.split(","):
                raise ConfigurationError(
                    f"VLLM_PLUGINS={allowed!r} keeps the patches of roll_vllm out of vLLM's processes; add {PLUGIN!r}"
                )
            _state.late = True
            logger.warning(
                "the plugin of roll_vllm did not run in process %d, so its patches come after vLLM has started there; "
                "install the package, a path to its source is not enough",
                os.getpid(),
            )
        return apply_here(role)


def undo_here() -> None:
    """Take the patches of this process back, and its record.

    Raises:
        ForeignChangeError: somebody else changed one of the attributes meanwhile; the others are undone.
    """
    with _state.lock:
        application, _state.application, _state.error = _state.application, None, None
        _state.late = False
        if os.environ.get(VARIABLE):
            _path().unlink(missing_ok=True)
        if application is not None:
            application.undo()


def record() -> dict[str, Any]:
    """This process's record, in JSON's types. It has no patches if none were asked for."""
    with _state.lock:
        return _record().as_dict()


def read_records(directory: str | os.PathLike[str]) -> list[Record]:
    """The records that processes have left in a directory, by pid.

    Raises:
        ConfigurationError: a file there is not a record.
    """
    records = []
    for path in Path(directory).glob("*.json"):
        try:
            records.append(Record.from_dict(json.loads(path.read_text(encoding="utf-8"))))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"{path} is not a record of applied patches ({error}); use a directory of its own for {VARIABLE}"
            ) from error
    return sorted(records, key=lambda record: record.pid)


def _apply() -> None:
    from roll_vllm.patches.registry import PATCHES

    global _watches_forks
    if not _watches_forks:
        os.register_at_fork(after_in_child=_after_fork)
        _watches_forks = True
    try:
        installed = versions.installed()
        if installed is None:
            raise ConfigurationError("vLLM is not installed here; install one of the tested versions")
        _state.version = installed.version
        _state.application = Application(PATCHES, installed.version, changed=_write)
        _state.application.apply()
    except Exception as error:
        _state.error = error if isinstance(error, RollVllmError) else _unexpected(error)


def _error() -> Exception | None:
    """What went wrong, now or when a module was imported later."""
    return _state.error or (_state.application and _state.application.error) or None


def _unexpected(error: Exception) -> PatchError:
    wrapped = PatchError("(all)", "vllm", "patches that can be applied", f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def _after_fork() -> None:
    """The patches came along; the lock may be held by a thread that did not."""
    _state.lock = threading.RLock()
    _state.role = f"fork of {_state.role}"
    with contextlib.suppress(OSError):
        _write()


def _record() -> Record:
    outcomes = dict(_state.application.outcomes) if _state.application else {}
    return Record(
        pid=os.getpid(),
        ppid=os.getppid(),
        role=_state.role,
        argv=tuple(getattr(sys, "argv", ())),
        version=_state.version,
        patches=outcomes,
        error=str(_error() or ""),
        late=_state.late,
    )


def _path() -> Path:
    return Path(os.environ[VARIABLE]) / f"{os.getpid()}.json"


def _write() -> None:
    if not os.environ.get(VARIABLE) or (_state.application is None and _state.error is None):
        return
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{threading.get_ident()}.tmp")
    draft.write_text(json.dumps(_record().as_dict(), indent=1), encoding="utf-8")
    os.replace(draft, path)
