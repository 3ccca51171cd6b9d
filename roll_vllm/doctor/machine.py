"""The machine and the Python environment as the doctor sees them; tests put others in their place."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from roll_vllm.devices import Probe

UNREADABLE = ""
"""The version of a distribution whose metadata is damaged."""


def _python() -> str:
    return ".".join(map(str, sys.version_info[:3]))


def _executable() -> str:
    """What to type for this Python: its name will do if that is what the shell finds."""
    return "python" if shutil.which("python") == sys.executable else sys.executable


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution) or UNREADABLE
    except metadata.PackageNotFoundError:
        return None
    except Exception:  # what damaged metadata raises differs between releases of Python
        return UNREADABLE


def _requires(distribution: str) -> Sequence[str]:
    try:
        return metadata.requires(distribution) or ()
    except Exception:  # as above
        return ()


def _plugins(group: str) -> Sequence[str]:
    return sorted({point.name for point in metadata.entry_points(group=group)})


def _package(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    # Without an origin it is a bare directory that happens to have the name.
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _free(directory: Path) -> int | None:
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return None


def _refusal(directory: Path) -> str:
    try:
        # Permission bits do not tell about read-only mounts and quotas; writing does.
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\0")
    except OSError as error:
        return error.strerror or str(error)
    return ""


@dataclass(frozen=True)
class Machine:
    """Everything that the doctor asks.

    Attributes:
        probe: Files, variables, commands, devices and the installed vLLM.
        python: The version of Python, without suffixes.
        executable: The command that starts this Python.
        pip: Whether this Python has pip.
        uv: Whether ``uv`` is on ``PATH``.
        prefix: Where this Python keeps its files.
        version: Returns the version of a distribution, ``None`` if it is not installed, or :data:`UNREADABLE`.
        requires: Returns the requirements in a distribution's metadata.
        plugins: Returns the names of the entry points in a group; may raise anything on damaged metadata.
        package: Returns the directory of a package that could be imported, without importing it.
        free: Returns the free bytes of a directory's file system, ``None`` if they cannot be had.
        refusal: Says why a directory cannot be written to; empty if it can.
    """

    probe: Probe = field(default_factory=Probe)
    python: str = field(default_factory=_python)
    executable: str = field(default_factory=_executable)
    pip: bool = field(default_factory=lambda: _package("pip") is not None)
    uv: bool = field(default_factory=lambda: shutil.which("uv") is not None)
    prefix: Path = field(default_factory=lambda: Path(os.path.realpath(sys.base_prefix)))
    version: Callable[[str], str | None] = _version
    requires: Callable[[str], Sequence[str]] = _requires
    plugins: Callable[[str], Sequence[str]] = _plugins
    package: Callable[[str], Path | None] = _package
    free: Callable[[Path], int | None] = _free
    refusal: Callable[[Path], str] = _refusal
