"""The settings: each from its option, else its environment variable, else the ini file, else a default.

Nothing is checked, looked up or created for a setting that was not given, so that a project that has the
plugin installed without using it notices nothing.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_roll_vllm.contracts import BACKENDS
from roll_vllm.errors import ConfigurationError

if TYPE_CHECKING:
    from roll_vllm.devices import Device
    from roll_vllm.versions import Installed, VersionRow

SUITE = "conformance"
RUN = "vllm_run"
"""Where an xdist worker finds the arguments of :meth:`Settings.of_worker`."""

DISTRIBUTION = "roll-vllm-distribution"
"""Name of the plugin that runs several versions, where there is one."""

DEFAULT = "default"
ALL = "all"

_CHOICES = ("auto", *BACKENDS, "cpu-reference")
_DIRECTORIES = ("report", "cache_dir", "envs_dir")
_HELP = {
    "version": (
        "X",
        "vLLM version to test, such as 0.12.0; may be given several times, or as 'all' (default: the installed one)",
    ),
    "backend": ("KIND", f"what to test on: {', '.join(_CHOICES)} (default: auto)"),
    "model": ("NAME_OR_PATH", "model to test with (default: counting)"),
    "report": ("DIR", "directory to write report.json to (default: no report)"),
    "cache_dir": ("DIR", "directory for models and compiled code (default: pytest-roll-vllm in XDG cache)"),
    "provision": ("", "make an environment for each version that is asked for and not installed"),
    "envs_dir": ("DIR", "directory for such environments (default: pytest-roll-vllm/envs in XDG cache)"),
}
_YES = ("true", "1", "yes", "on")
_NO = ("", "false", "0", "no", "off")


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
        version: The vLLM versions to test, separated by spaces; empty if the installed one will do.
        backend: ``auto``, a kind of device to test on, or ``cpu-reference``.
        model: Name or path of the model.
        report: Directory of ``report.json`` as an absolute path; empty if no report is wanted.
        cache_dir: Directory of the caches as an absolute path.
        provision: Whether to make an environment for a version that is not installed, as text.
        envs_dir: Directory of these environments as an absolute path.
        label: The name of this process's version and backend, in a worker of a run with environments.
        several: Whether that run has several of them.
        environ: Variables for such a worker, unless the user has set them.
    """

    version: Setting
    backend: Setting
    model: Setting
    report: Setting
    cache_dir: Setting
    provision: Setting
    envs_dir: Setting
    label: str = ""
    several: bool = False
    environ: Mapping[str, str] = field(default_factory=dict)

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

        with usage_error(f"backend {self.backend}"):
            return devices.detect(self.backend.value)

    @cached_property
    def engine(self) -> str | None:
        """The engine generation that will be started, ``V0`` or ``V1``, or ``None`` without a vLLM.

        Raises:
            pytest.UsageError: If the environment asks for one that the installed vLLM does not have.
        """
        from roll_vllm import environment

        if self.installed is None:
            return None
        with usage_error("engine"):
            return environment.engine_generation(self.installed.version, self.device.backend, os.environ)

    @property
    def versions(self) -> tuple[str, ...]:
        """The versions to test, in the order given and each once; ``all`` stands for the tested ones.

        Raises:
            pytest.UsageError: If there are several, and one is malformed or not among the tested ones.
        """
        from roll_vllm import versions

        wanted = re.split(r"[\s,]+", self.version.value.strip(" ,"))
        if wanted == [ALL]:
            return tuple(row.release for row in versions.TESTED)
        if len(wanted) == 1:
            return (wanted[0],) if wanted[0] else ()
        if ALL in wanted:
            raise pytest.UsageError(f"vLLM versions {self.version}: give either {ALL!r} or single versions")
        return tuple(dict.fromkeys(self.row(one).release for one in wanted))  # 0.12.0.post2 is 0.12.0

    def row(self, version: str) -> VersionRow:
        """Return the tested release of a wanted version.

        Raises:
            pytest.UsageError: If there is none.
        """
        from roll_vllm import versions

        with usage_error(f"vLLM version from {self.version.source}"):
            row = versions.resolve(version)
        if row is None:
            tested = ", ".join(row.release for row in versions.TESTED)
            raise pytest.UsageError(
                f"vLLM {version} (from {self.version.source}) is not among the tested versions, so nobody knows how "
                f"to make an environment for it. Choose from {tested}, or install it and give it alone."
            )
        return row

    @property
    def provisions(self) -> bool:
        """Whether this run makes environments, each with a process of its own.

        Raises:
            pytest.UsageError: If a setting is malformed.
        """
        if self.provision.value.lower() not in _YES + _NO:
            raise pytest.UsageError(f"{_option('provision')} is {self.provision}; choose true or false")
        wanted = self.versions
        return self.provision.value.lower() in _YES and (
            len(wanted) > 1 or (len(wanted) == 1 and not self._is_installed(wanted[0]))
        )

    @property
    def report_dir(self) -> Path | None:
        """Directory of ``report.json``, or ``None`` if no report is wanted."""
        return Path(self.report.value) if self.report.value else None

    def of_worker(
        self, *, label: str, several: bool, version: str | None, backend: str | None, environ: Mapping[str, str]
    ) -> Settings:
        """Return the settings of an xdist worker that tests one of the versions.

        Args:
            label: Its name.
            several: Whether there are others.
            version: The version of its environment, or ``None`` if the user started it (``--tx``): then it tests
                what it finds.
            backend: The backend of its environment, or ``None`` likewise.
            environ: Variables to set, unless the user has.
        """
        if version is None:
            found = self.installed
            version = next((one for one in self.versions if self._is_installed(one)), None)
            if version is None:
                here = f"{found.distribution} {found.version}" if found else "no vLLM"
                raise pytest.UsageError(
                    f"{label}: {here} is installed there, and {', '.join(self.versions)} are wanted "
                    f"({self.version.source}). Install one of them there, or take the node away."
                )
        return replace(
            self,
            version=replace(self.version, value=version),
            backend=replace(self.backend, value=backend) if backend else self.backend,
            provision=Setting(_NO[1], self.provision.source),
            label=label,
            several=several,
            environ=environ,
        )

    def make_cache_dir(self, part: str = "") -> Path:
        """Make the cache directory, or a directory in it, and return its path.

        Raises:
            pytest.UsageError: If it cannot be written.
        """
        return _make_directory("cache_dir", self.cache_dir, part)

    def make_envs_dir(self) -> Path:
        """Make the directory of environments, and return its path.

        Raises:
            pytest.UsageError: If it cannot be written.
        """
        return _make_directory("envs_dir", self.envs_dir)

    def check(self) -> None:
        """Check the settings that the user gave.

        Raises:
            pytest.UsageError: If one cannot work; the message says how to put it right.
        """
        if self.backend.value not in _CHOICES:
            raise pytest.UsageError(f"unknown backend {self.backend}; choose one of: {', '.join(_CHOICES)}")
        if not self.provisions:
            if self.version.given:
                self._check_version()
            if self.backend.value != "auto":
                _ = self.device  # raises if there is none of this kind
        for name in _DIRECTORIES:
            setting = getattr(self, name)
            if setting.given:
                _make_directory(name, setting)

    def _is_installed(self, version: str) -> bool:
        from roll_vllm import versions

        with usage_error(f"vLLM version from {self.version.source}"):
            release = versions.base(version)
        return self.installed is not None and versions.base(self.installed.version) == release

    def _check_version(self) -> None:
        from roll_vllm import versions

        source = self.version.source
        if len(self.versions) > 1:
            raise pytest.UsageError(
                f"several vLLM versions are wanted ({self.version}), and one environment holds one. Either let "
                f"the plugin make an environment for each: add {_option('provision')}. Or make them yourself, and "
                f"run pytest in each: `tox run -e {','.join(f'vllm{one}-cpu' for one in self.versions)}`."
            )
        (wanted,) = self.versions
        if self._is_installed(wanted):
            return
        row = versions.resolve(wanted)
        found = self.installed
        what = f"{found.distribution} {found.version} is installed" if found else "no vLLM is installed"
        made = f", add {_option('provision')}, or run the tox environment `vllm{row.release}-cpu`" if row else ""
        fix = f"change it to {versions.base(found.version)} or drop it" if found else "drop it"
        raise pytest.UsageError(
            f"vLLM {wanted} is wanted (from {source}), but {what}. Either install the one wanted: "
            f"`pip install vllm=={row.release if row else wanted}`{made}. "
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
        how: dict[str, Any] = {"metavar": metavar} if metavar else {"action": "store_const", "const": _YES[0]}
        if name == "version":
            how["action"] = "append"
        group.addoption(_option(name), dest=f"vllm_{name}", help=help, **how)
        parser.addini(f"vllm_{name}", f"as {_option(name)}")


def read(config: pytest.Config) -> Settings:
    """Read the settings, without checking them."""
    values: dict[str, Any] = {name: _read(config, name) for name in _HELP}
    settings = Settings(**values)
    run: dict[str, Any] | None = getattr(config, "workerinput", {}).get(RUN)
    return settings.of_worker(**run) if run else settings


def apply(config: pytest.Config, settings: Settings) -> None:
    """Set the variables that follow from the settings, until the end of the run."""
    environ: dict[str, str | None] = {name: value for name, value in settings.environ.items() if name not in os.environ}
    if settings.backend.value == "cpu-reference" or (settings.label and settings.backend.value == "cpu"):
        from roll_vllm import reference

        # The session may have asked for the platform, and this worker have a build that needs none.
        environ[reference.VARIABLE] = "1" if settings.backend.value == "cpu-reference" else None
    for name, value in environ.items():
        config.add_cleanup(partial(_set, name, os.environ.get(name)))
        _set(name, value)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


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
    option: str | list[str] | None = config.getoption(f"vllm_{name}")
    candidates: tuple[tuple[str | None, str, Path], ...] = (
        (" ".join(option) if isinstance(option, list) else option, _option(name), here),
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
    if name in ("cache_dir", "envs_dir"):
        part = "envs" if name == "envs_dir" else ""
        return str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "pytest-roll-vllm", part))
    return {"backend": "auto", "model": "counting", "provision": "false"}.get(name, "")


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
def usage_error(what: str) -> Iterator[None]:
    """Make a usage error of a wrong configuration."""
    try:
        yield
    except ConfigurationError as error:
        raise pytest.UsageError(f"{what}: {error}") from error
