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
    from pytest_roll_vllm.targets import Target
    from roll_vllm.devices import Device
    from roll_vllm.versions import Installed, VersionRow

SUITE = "conformance"
RUN = "vllm_run"
"""Where an xdist worker finds the arguments of :meth:`Settings.of_worker`."""

DISTRIBUTION = "roll-vllm-distribution"
"""Name of the plugin that runs several versions, where there is one."""

DEFAULT = "default"
ALL = "all"

EXECUTORS = ("mp", "ray")
"""What can run the ranks of an engine: vLLM's processes on one host, or Ray's actors."""

WALK_STEPS = 500
"""Control calls of the random walk through an engine's states, unless the user wants more."""

_CHOICES = ("auto", *BACKENDS, "cpu-reference")
_DIRECTORIES = ("report", "cache_dir", "envs_dir")
_REPEATED = {"version": " ", "expectations": os.pathsep}  # what stands between several values
_HELP = {
    "version": (
        "X",
        "vLLM version to test, such as 0.12.0; may be given several times, or as 'all' (default: the installed one)",
    ),
    "backend": ("KIND", f"what to test on: {', '.join(_CHOICES)} (default: auto)"),
    "model": ("NAME_OR_PATH", "model to test with (default: counting)"),
    "target": (
        "NAME",
        "engine to test: an installed target such as roll_vllm or vllm, or module:attribute (default: roll_vllm)",
    ),
    "expectations": (
        "FILE",
        "TOML file of tests that must fail or be skipped, and why; may be given several times (default: none but ours)",
    ),
    "prove": ("", "prove the suite: run its contracts on targets that are broken on purpose"),
    "saboteurs": ("MODULE", "module of the broken targets (default: tests.saboteurs)"),
    "report": ("DIR", "directory to write report.json, .md and .html to (default: no report)"),
    "cache_dir": ("DIR", "directory for models and compiled code (default: pytest-roll-vllm in XDG cache)"),
    "provision": ("", "make an environment for each version that is asked for and not installed"),
    "envs_dir": ("DIR", "directory for such environments (default: pytest-roll-vllm/envs in XDG cache)"),
    "executors": (
        "NAMES",
        f"executors to test engines of several ranks on, separated by commas: {', '.join(EXECUTORS)}, or all that the "
        "vLLM version has; also runs the tests that take minutes (default: mp, without these)",
    ),
    "together": (
        "N",
        "how many engines to start at once where that is tested (default: one for each core, but 2 to 8)",
    ),
    "rounds": (
        "N",
        "how often to start engines together, and workers on one empty cache; also runs these tests (default: without)",
    ),
    "walk_steps": (
        "N",
        "how many control calls the random walk makes at least; given, another walk ends in a shutdown "
        f"(default: {WALK_STEPS})",
    ),
    "ray_address": ("HOST:PORT", "a Ray cluster to use, which is not stopped (default: start a small one)"),
}
SETTING_NAMES = tuple(_HELP)
_FLAGS = {"prove": "false", "provision": "false"}
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
        target: Name of the target, or where it is as ``module:attribute``.
        expectations: Absolute paths of expectations files, with ``os.pathsep`` between them.
        prove: Whether to prove the suite, as text.
        saboteurs: Module of the broken targets for that.
        report: Directory of ``report.json`` as an absolute path; empty if no report is wanted.
        cache_dir: Directory of the caches as an absolute path.
        provision: Whether to make an environment for a version that is not installed, as text.
        envs_dir: Directory of these environments as an absolute path.
        executors: The executors to test, separated by commas or spaces; empty for ``mp`` without what takes minutes.
        together: How many engines to start at once where that is tested, as text; empty for what the cores can bear.
        rounds: How often to start engines together, and workers on one empty cache, as text; empty for not at all.
        walk_steps: How many control calls the random walk makes, as text; empty for :data:`WALK_STEPS`.
        ray_address: Address of a Ray cluster; empty if the run is to start one.
        label: The name of this process's version and backend, in a worker of a run with environments.
        several: Whether that run has several of them.
        environ: Variables for such a worker, unless the user has set them.
    """

    version: Setting
    backend: Setting
    model: Setting
    target: Setting
    prove: Setting
    saboteurs: Setting
    expectations: Setting
    report: Setting
    cache_dir: Setting
    provision: Setting
    envs_dir: Setting
    executors: Setting
    together: Setting
    rounds: Setting
    walk_steps: Setting
    ray_address: Setting
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

    @cached_property
    def target_class(self) -> type[Target]:
        """The class of the engine to test.

        Raises:
            pytest.UsageError: If there is none of that name, or it makes no sense.
        """
        from pytest_roll_vllm import targets

        with usage_error(f"target {self.target}"):
            return targets.resolve(self.target.value)

    def missing(self, capability: str) -> str:
        """Why contracts that need a capability do not concern the target on what is installed; empty if they do."""
        from pytest_roll_vllm import targets

        if self.installed is None:
            return ""
        here = (self.installed.version, self.device.backend, self.engine or "")
        return targets.missing(self.target_class, capability, *here)

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
        wanted = self.versions
        return self._is_on("provision") and (
            len(wanted) > 1 or (len(wanted) == 1 and not self._is_installed(wanted[0]))
        )

    @property
    def proves(self) -> bool:
        """Whether this run proves the suite.

        Raises:
            pytest.UsageError: If the setting is malformed.
        """
        return self._is_on("prove")

    def _is_on(self, flag: str) -> bool:
        setting: Setting = getattr(self, flag)
        if setting.value.lower() not in _YES + _NO:
            raise pytest.UsageError(f"{option_of(flag)} is {setting}; choose true or false")
        return setting.value.lower() in _YES

    @property
    def wanted_executors(self) -> tuple[str, ...]:
        """The executors to test, in the order of :data:`EXECUTORS`.

        Raises:
            pytest.UsageError: If one is unknown.
        """
        from roll_vllm import versions

        wanted = re.split(r"[\s,]+", self.executors.value.strip(" ,"))
        if wanted == [""]:
            return EXECUTORS[:1]
        if wanted == [ALL]:
            row = versions.resolve(self.installed.version) if self.installed else None
            return EXECUTORS if row and row.ray else EXECUTORS[:1]
        unknown = [one for one in wanted if one not in EXECUTORS]
        if unknown:
            raise pytest.UsageError(
                f"{option_of('executors')} is {self.executors}: unknown {', '.join(unknown)}; choose from "
                f"{', '.join(EXECUTORS)}"
            )
        return tuple(one for one in EXECUTORS if one in wanted)

    @property
    def engines_together(self) -> int:
        """How many engines to start at once where that is tested.

        Raises:
            pytest.UsageError: If the setting is not a number, or fewer than two.
        """
        return self._number("together", 2, min(8, max(2, len(os.sched_getaffinity(0)))))

    @property
    def rounds_of_starts(self) -> int:
        """How often to start engines together, and workers on one empty cache.

        Raises:
            pytest.UsageError: If the setting is not a number, or zero.
        """
        return self._number("rounds", 1, 1)

    @property
    def calls_of_walk(self) -> int:
        """How many control calls the random walk makes.

        Raises:
            pytest.UsageError: If the setting is not a number, or zero.
        """
        return self._number("walk_steps", 1, WALK_STEPS)

    def _number(self, name: str, least: int, default: int) -> int:
        setting: Setting = getattr(self, name)
        if not setting.value:
            return default
        if not setting.value.isdecimal() or int(setting.value) < least:
            raise pytest.UsageError(f"{option_of(name)} is {setting}; give a number from {least} on")
        return int(setting.value)

    @property
    def expectation_files(self) -> tuple[Path, ...]:
        """The expectations files that the user gave."""
        return tuple(map(Path, filter(None, self.expectations.value.split(os.pathsep))))

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
        if self.target.given:
            _ = self.target_class  # raises if there is none of that name
        if self.executors.given:
            _ = self.wanted_executors  # raises if one is unknown
        _ = self.engines_together, self.rounds_of_starts, self.calls_of_walk
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
                f"the plugin make an environment for each: add {option_of('provision')}. Or make them yourself, and "
                f"run pytest in each: `tox run -e {','.join(f'vllm{one}-cpu' for one in self.versions)}`."
            )
        (wanted,) = self.versions
        if self._is_installed(wanted):
            return
        row = versions.resolve(wanted)
        found = self.installed
        what = f"{found.distribution} {found.version} is installed" if found else "no vLLM is installed"
        made = f", add {option_of('provision')}, or run the tox environment `vllm{row.release}-cpu`" if row else ""
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
        if name in _REPEATED:
            how["action"] = "append"
        group.addoption(option_of(name), dest=_full(name), help=help, **how)
        parser.addini(_full(name), f"as {option_of(name)}")
    group.addoption(
        "--vllm-contracts",
        action="store_true",
        help="list the contracts of the suite, or of the selected tests, and run nothing; with -q their ids only",
    )


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


def _full(name: str) -> str:
    return name if name.startswith("ray_") else f"vllm_{name}"


def option_of(name: str) -> str:
    """Return the command-line option of a setting."""
    return f"--{_full(name).replace('_', '-')}"


def _variable(name: str) -> str:
    return f"PYTEST_{_full(name).upper()}"


def _read(config: pytest.Config, name: str) -> Setting:
    here = config.invocation_params.dir
    option: str | list[str] | None = config.getoption(_full(name))
    candidates: tuple[tuple[str | None, str, Path], ...] = (
        (_REPEATED[name].join(option) if isinstance(option, list) else option, option_of(name), here),
        (os.environ.get(_variable(name)), _variable(name), here),
        (config.getini(_full(name)), f"ini option {_full(name)}", config.rootpath),
        (_default(name), DEFAULT, here),
    )
    # An empty value counts as not set: a CI job cannot always leave a variable out.
    for value, source, base in candidates:
        if value and name in (*_DIRECTORIES, "expectations"):
            paths = [value] if name in _DIRECTORIES else filter(None, value.split(os.pathsep))
            try:
                return Setting(os.pathsep.join(str(base / Path(path).expanduser()) for path in paths), source)
            except RuntimeError as error:
                raise pytest.UsageError(
                    f"{Setting(value, source)}: there is no home directory ({error}); "
                    "give an absolute path, or set HOME"
                ) from error
        if value:
            return Setting(value, source)
    return Setting("", DEFAULT)


def _default(name: str) -> str:
    if name in ("cache_dir", "envs_dir"):
        part = "envs" if name == "envs_dir" else ""
        try:
            home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        except RuntimeError:  # a user without a home, as in a container
            return str(Path(tempfile.gettempdir(), f"pytest-roll-vllm-{os.getuid()}", part))
        return str(Path(home, "pytest-roll-vllm", part))
    return {
        "backend": "auto",
        "model": "counting",
        "target": "roll_vllm",
        "saboteurs": "tests.saboteurs",
        **_FLAGS,
    }.get(name, "")


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
            f"another with {option_of(name)} or {_variable(name)}."
        ) from error


@contextmanager
def usage_error(what: str) -> Iterator[None]:
    """Make a usage error of a wrong configuration."""
    try:
        yield
    except ConfigurationError as error:
        raise pytest.UsageError(f"{what}: {error}") from error
