"""The settings: each from its option, else its environment variable, else the ini file, else a default.

Nothing is checked, looked up or created for a setting that was not given, so that a project that has the
plugin installed without using it notices nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_roll_vllm.contracts import BACKENDS
from roll_vllm.errors import ConfigurationError

if TYPE_CHECKING:
    from roll_vllm.devices import Device
    from roll_vllm.versions import Installed

SUITE = "conformance"
DEFAULT = "default"

_DIRECTORIES = ("report", "cache_dir")
_HELP = {
    "version": ("X", "vLLM version that must be installed, such as 0.12.0 (default: the installed one)"),
    "backend": ("KIND", f"kind of device to test on: auto, {', '.join(BACKENDS)} (default: auto)"),
    "model": ("NAME_OR_PATH", "model to test with (default: counting)"),
    "report": ("DIR", "directory to write report.json to (default: no report)"),
    "cache_dir": ("DIR", "directory for models and compiled code (default: pytest-roll-vllm in XDG cache)"),
}


@dataclass(frozen=True)
class Setting:
    """One value, and where it came from; an empty value means "not set"."""

    value: str
    source: str

    @property
    def given(self) -> bool:
        """Whether the user set it."""
        return self.source != DEFAULT

    def __str__(self) -> str:
        return f"{self.value} ({'' if self.source == DEFAULT else 'from '}{self.source})"


@dataclass(frozen=True)
class Settings:
    """All settings of a run, and what was found on the machine, looked up when first asked for.

    Attributes:
        version: The vLLM version that must be installed; empty if any will do.
        backend: ``auto`` or the kind of device to test on.
        model: Name or path of the model.
        report: Directory of ``report.json`` as an absolute path; empty if no report is wanted.
        cache_dir: Directory of the caches as an absolute path.
    """

    version: Setting
    backend: Setting
    model: Setting
    report: Setting
    cache_dir: Setting

    @property
    def given(self) -> bool:
        """Whether the user set anything at all."""
        return any(setting.given for setting in self.all().values())

    def all(self) -> dict[str, Setting]:
        """Return the settings by name."""
        return {name: getattr(self, name) for name in _HELP}

    @cached_property
    def installed(self) -> Installed | None:
        """The installed vLLM, or ``None``."""
        from roll_vllm import versions

        return versions.installed()

    @cached_property
    def device(self) -> Device:
        """The devices to test on.

        Raises:
            pytest.UsageError: If there is no device of the wanted kind.
        """
        from roll_vllm import devices

        with _usage_error(f"backend {self.backend}"):
            return devices.detect(self.backend.value)

    @property
    def report_dir(self) -> Path | None:
        """Directory of ``report.json``, or ``None`` if no report is wanted."""
        return Path(self.report.value) if self.report.value else None

    def make_cache_dir(self, part: str = "") -> Path:
        """Make the cache directory, or a directory in it, and return its path.

        Raises:
            pytest.UsageError: If it cannot be written.
        """
        return _make_directory("cache_dir", self.cache_dir, part)

    def check(self) -> None:
        """Check the settings that the user gave.

        Raises:
            pytest.UsageError: If one cannot work; the message says how to put it right.
        """
        if self.version.given:
            self._check_version()
        if self.backend.value not in ("auto", *BACKENDS):
            raise pytest.UsageError(f"unknown backend {self.backend}; choose one of: auto, {', '.join(BACKENDS)}")
        if self.backend.value != "auto":
            _ = self.device  # raises if there is none of this kind
        for name in _DIRECTORIES:
            setting = getattr(self, name)
            if setting.given:
                _make_directory(name, setting)

    def _check_version(self) -> None:
        from roll_vllm import versions

        wanted, source = self.version.value, self.version.source
        with _usage_error(f"vLLM version from {source}"):
            row = versions.resolve(wanted)
        found = self.installed
        if found and versions.same_release(found.version, wanted):
            return
        what = f"{found.distribution} {found.version} is installed" if found else "no vLLM is installed"
        tox = f", or run the tox environment `vllm{row.release}-cpu`" if row else ""
        fix = f"change it to {versions.base(found.version)} or drop it" if found else "drop it"
        raise pytest.UsageError(
            f"vLLM {wanted} is wanted (from {source}), but {what}. Either install the one wanted: "
            f"`pip install vllm=={row.release if row else wanted}`{tox}. "
            f"Or, to test what is there, {fix}."
        )


SETTINGS = pytest.StashKey[Settings]()


def is_worker(config: pytest.Config) -> bool:
    """Whether this process is a worker of pytest-xdist."""
    return hasattr(config, "workerinput")


def runs_suite(config: pytest.Config) -> bool:
    """Whether the command line asks for the conformance suite by its package name."""
    return bool(config.getoption("pyargs", False)) and any(
        arg.partition("::")[0].partition(".")[0] == SUITE for arg in config.args
    )


def add_options(parser: pytest.Parser) -> None:
    """Add the options and ini values."""
    group = parser.getgroup("vllm", "vLLM rollout engines")
    for name, (metavar, text) in _HELP.items():
        help = f"{text}; environment: {_variable(name)}"
        group.addoption(_option(name), dest=f"vllm_{name}", metavar=metavar, help=help)
        parser.addini(f"vllm_{name}", f"as {_option(name)}")


def read(config: pytest.Config) -> Settings:
    """Read the settings, without checking them."""
    return Settings(**{name: _read(config, name) for name in _HELP})


def check_suite(config: pytest.Config) -> None:
    """Check that ``--pyargs conformance`` means our suite.

    Raises:
        pytest.UsageError: If another package of that name, such as the one on PyPI, is in the way.
    """
    spec = find_spec(SUITE) if runs_suite(config) else None
    if spec is None:  # pytest has a good message of its own for a package that is missing
        return
    found = Path(next(iter(spec.submodule_search_locations or [str(spec.origin)])))
    ours = Path(__file__).parents[1] / SUITE
    if not ours.exists() or not found.samefile(ours):
        raise pytest.UsageError(
            f"`--pyargs {SUITE}` finds {found}, which is not the suite of pytest-roll-vllm ({ours}). Remove "
            f"what is in the way: `pip uninstall {SUITE}`, or run from another directory if it is a folder "
            f"of yours; then reinstall pytest-roll-vllm."
        )


def _option(name: str) -> str:
    return f"--vllm-{name.replace('_', '-')}"


def _variable(name: str) -> str:
    return f"PYTEST_VLLM_{name.upper()}"


def _read(config: pytest.Config, name: str) -> Setting:
    here = config.invocation_params.dir
    candidates: tuple[tuple[str | None, str, Path], ...] = (
        (config.getoption(f"vllm_{name}"), _option(name), here),
        (os.environ.get(_variable(name)), _variable(name), here),
        (config.getini(f"vllm_{name}"), f"ini option vllm_{name}", config.rootpath),
        (_default(name), DEFAULT, here),
    )
    # An empty value counts as not set: a CI job cannot always leave a variable out.
    for value, source, base in candidates:
        if value:
            return Setting(str(base / Path(value).expanduser()) if name in _DIRECTORIES else value, source)
    return Setting("", DEFAULT)


def _default(name: str) -> str:
    if name == "cache_dir":
        return str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "pytest-roll-vllm"))
    return {"backend": "auto", "model": "counting"}.get(name, "")


def _make_directory(name: str, setting: Setting, part: str = "") -> Path:
    path = Path(setting.value, part)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell: root passes them, and a read-only mount does not show in them.
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise pytest.UsageError(
            f"cannot write to the directory {setting}: {error.strerror}. Make it writable, or choose "
            f"another with {_option(name)} or {_variable(name)}."
        ) from error


@contextmanager
def _usage_error(what: str) -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        raise pytest.UsageError(f"{what}: {error}") from error
