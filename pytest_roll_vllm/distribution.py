"""Several vLLM versions in one session: an environment for each, made or found, and a process in each.

Imported only where ``--vllm-provision`` has something to do. The running pytest collects and runs nothing itself,
and needs no vLLM; ``scheduling.py`` has the part that depends on pytest-xdist.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest

import pytest_roll_vllm
from pytest_roll_vllm import provision
from pytest_roll_vllm.options import RUN, SETTINGS, Settings, usage_error
from pytest_roll_vllm.progress import Progress
from pytest_roll_vllm.provision import Environment, ProvisionError
from pytest_roll_vllm.report import RECORDER
from pytest_roll_vllm.terminal import expectations
from pytest_roll_vllm.waiting import clear, waiting
from roll_vllm import backends, devices, environment
from roll_vllm.devices import Device
from roll_vllm.errors import ConfigurationError
from roll_vllm.versions import Route, VersionRow

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController  # type: ignore[import-untyped]

_ENVIRON = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
_RANKS = 8  # more than any test asks for
_SIDE_BY_SIDE = 2  # versions at a time on a CPU, unless -n says otherwise
_PLUGINS = ("pytest", "pytest-xdist", "pytest-asyncio")  # what an environment gets if the running pytest has it


@dataclass(frozen=True)
class Column:
    """One version on one backend.

    Attributes:
        row: The release.
        route: How it is installed.
        engine: The engine generation: ``V0`` or ``V1``.
    """

    row: VersionRow
    route: Route
    engine: str

    @property
    def label(self) -> str:
        """Its name: ``0.12.0-cpu``, with the engine generation unless it is the release's usual one."""
        usual = self.engine == self.row.engines[-1]
        return f"{self.row.release}-{self.route.backend}" + ("" if usual else f"-{self.engine}")

    @property
    def about(self) -> dict[str, Any]:
        """What is known of it before it describes itself, see ``report.about``."""
        return {"backend": self.route.backend, "engine": self.engine}


class Distribution:
    """Provides the environments, and lets xdist run the tests in them; a plugin of the controller.

    Attributes:
        columns: What is going to run.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._settings: Settings = config.stash[SETTINGS]
        self._environments: dict[str, Environment] = {}
        self._interrupted = False
        self._require_xdist()
        self._device = self._detect()
        self.columns, self._problems = self._plan()
        limit, self._own = self._take_over_xdist()
        self._limit = min(limit, len(self.columns) + len(self._own))
        together = min(self._limit, len(self.columns))
        cpu = self._device.kind == "cpu"
        self._threads = max(1, devices.Probe().cores() // together) if cpu and together > 1 else None

    def header(self) -> list[str]:
        """Describe what is going to run."""
        names = ", ".join(self._device.names)
        own = f", and {', '.join(self._own)}" if self._own else ""
        threads = f", {self._threads} {'thread' if self._threads == 1 else 'threads'} each" if self._threads else ""
        return [
            f"roll-vllm: {pytest_roll_vllm.__version__}",
            f"vllm: {', '.join(column.label for column in self.columns)}{own}; {self._limit} at a time{threads}; "
            f"wanted: {self._settings.version}",
            f"backend: {self._device.count} {self._device.kind} [{names}]; wanted: {self._settings.backend}",
            f"model: {self._settings.model}",
            f"vllm cache: {self._settings.cache_dir}",
            f"environments: {self._settings.envs_dir}",
            *expectations(self._settings),
        ]

    # -- before the run -------------------------------------------------------------------------------------

    def _require_xdist(self) -> None:
        if not self._config.pluginmanager.hasplugin("xdist"):
            raise pytest.UsageError(
                "the environments of --vllm-provision run through pytest-xdist, which is not there: "
                "`pip install 'pytest-xdist>=3.8,<4'` (or let pytest load it: `-p xdist`)"
            )

    def _detect(self) -> Device:
        # What is installed here does not matter: an environment gets what fits the machine.
        machine = devices.Probe(installed=lambda: None)
        with usage_error(f"backend {self._settings.backend}"):
            return devices.detect(self._settings.backend.value, machine)

    def _plan(self) -> tuple[list[Column], dict[str, str]]:
        """Return what is to run, and why some of it cannot."""
        columns, problems = [], {}
        for row in map(self._settings.row, self._settings.versions):
            with usage_error(f"backend {self._settings.backend}"):
                route = row.route(self._device.backend)
            try:
                engine = environment.engine_generation(row.release, route.backend, os.environ)
            except ConfigurationError as error:
                columns.append(Column(row, route, f"V{os.environ['VLLM_USE_V1'].strip()}"))
                problems[columns[-1].label] = str(error)
            else:
                columns.append(Column(row, route, engine))
        return columns, problems

    def _take_over_xdist(self) -> tuple[int, list[str]]:
        """Keep xdist from starting by itself, and return what it was told: how many at a time, nodes of the user's."""
        option = self._config.option
        number: int | None = option.numprocesses
        if option.dist not in ("no", "each") and not number:
            raise pytest.UsageError(
                f"--dist {option.dist} spreads the tests of one version; with --vllm-provision every version runs all "
                "of them in one process. Drop it."
            )
        if option.usepdb or number == 0:
            raise pytest.UsageError(
                "with --vllm-provision the tests run in other processes, so --pdb and -n0 cannot work. Drop them, or "
                "run pytest in the environment of one version; its path is shown at the start."
            )
        own = [] if number else [str(spec) for spec in option.tx]
        option.dist, option.tx = "no", []
        return number or (_SIDE_BY_SIDE if self._device.kind == "cpu" else 1), own

    # -- providing ------------------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionstart(self, session: pytest.Session) -> Generator[None, object, object]:
        """Provide the environments, and start xdist on those that are there."""
        result = yield  # the header
        self._start(session)
        return result

    def _start(self, session: pytest.Session) -> None:
        recorder = self._config.stash[RECORDER]
        several = len(self.columns) + len(self._own) > 1
        for column in self.columns:
            recorder.expect(column.label, column.about)
        try:
            self._provide()
        except KeyboardInterrupt:
            # Raised again where pytest finishes a session properly.
            self._interrupted = True
            for column in self.columns:
                if column.label not in self._environments:
                    self._problems.setdefault(column.label, "interrupted while its environment was made")
        for label, problem in self._problems.items():
            recorder.lose(label, problem)
        if self._interrupted or not (self._environments or self._own):
            return  # the tests are collected here, so that it is known what could not run
        from pytest_roll_vllm.scheduling import VersionsSession

        self._config.option.dist = "each"
        xdist = VersionsSession(
            self._config,
            {label: str(one.python) for label, one in self._environments.items()},
            self._own,
            limit=self._limit,
            on_node=self._prepare,
            on_lost=self._lose,
        )
        self._config.pluginmanager.register(xdist, "dsession")
        reporter = self._config.pluginmanager.getplugin("terminalreporter")
        if reporter:
            reporter.showfspath = False
            if several and self._config.get_verbosity() == 0:
                self._config.pluginmanager.register(Progress(reporter), "roll-vllm-progress")
        xdist.pytest_sessionstart(session)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        """Raise an interrupt that came too early."""
        if self._interrupted:
            raise KeyboardInterrupt("while an environment was made")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> bool | None:
        """Run nothing in this process, where there is no vLLM."""
        return None if self._config.pluginmanager.hasplugin("dsession") else True

    def _provide(self) -> None:
        directory = self._settings.make_envs_dir()
        try:
            uv = provision.find_uv()
        except ProvisionError as error:
            self._problems.update({column.label: str(error) for column in self.columns})
            self._say("", str(error))
            return
        plugins = {name: metadata.version(name) for name in _PLUGINS if self._is_loaded(name)}
        for column in self.columns:
            label = column.label
            if label in self._problems:
                continue
            smollm2 = self._settings.model.value == "smollm2"
            try:
                recipe = provision.recipe(column.row, column.route, uv, directory, smollm2=smollm2, plugins=plugins)
                with waiting(f"provisioning {label}"):
                    found = provision.provide(recipe, uv, directory, partial(self._say, label))
            except (ProvisionError, OSError) as error:
                self._problems[label] = f"its environment could not be made: {error}"
                self._say(label, self._problems[label])
            else:
                self._environments[label] = found
                self._say(label, str(found))

    def _is_loaded(self, name: str) -> bool:
        loaded = {dist.project_name for _, dist in self._config.pluginmanager.list_plugin_distinfo()}
        modules = {"pytest-asyncio": "pytest_asyncio.plugin"}
        return name in ("pytest", "pytest-xdist", *loaded) or self._config.pluginmanager.hasplugin(modules[name])

    # -- while it runs --------------------------------------------------------------------------------------

    def _prepare(self, node: WorkerController, label: str) -> None:
        column = next((column for column in self.columns if column.label == label), None)
        several = len(self.columns) + len(self._own) > 1
        run = {"label": label, "several": several, "version": None, "backend": None, "environ": _ENVIRON}
        if column:
            run.update(version=column.row.release, backend=column.route.backend, environ=self._environ(column))
        node.workerinput[RUN] = run
        self._config.stash[RECORDER].expect(label)

    def _environ(self, column: Column) -> dict[str, str]:
        """The variables for a version: on a CPU its share of the cores, for which its threads must not be bound.

        Threads of several engines that wait for each other on the same cores take several times as long, and so
        does everything beside ranks that wait for work at full speed.
        """
        if self._threads is None:
            return _ENVIRON
        unbound = backends.get(column.route.backend).worker_environment(column.row.release, os.environ, _RANKS)
        return {**_ENVIRON, **unbound, "OMP_NUM_THREADS": str(self._threads), "VLLM_SLEEP_WHEN_IDLE": "1"}

    def _lose(self, label: str, why: str) -> None:
        self._config.stash[RECORDER].lose(label, why)
        self._say(label, why)

    def _say(self, label: str, text: str) -> None:
        reporter = self._config.pluginmanager.getplugin("terminalreporter")
        if reporter:
            clear()
            reporter.ensure_newline()
            reporter.write_line(f"{label}: {text}" if label else text)
