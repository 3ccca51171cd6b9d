"""The proof's own sessions: contracts run against saboteurs, on engines that are started once."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest

from pytest_roll_vllm.fixtures import POOL
from tests.saboteurs.worker import QUALNAME

if TYPE_CHECKING:
    from pytest_roll_vllm.engines import EnginePool


class _SabotagedEngines:
    """Registered last, so that it sees the plugin's own fixture: engines get the switchable extension."""

    @pytest.fixture
    def vllm_engine_args(self, vllm_engine_args: dict[str, Any]) -> dict[str, Any]:
        return {**vllm_engine_args, "worker_extension_cls": QUALNAME}


class InnerSession:
    """A pytest plugin that lends the engines to an inner session and notes how each contract fared.

    Attributes:
        failed: messages of failed test calls by contract.
        other: outcomes of all other phases that were not a pass, by contract.
        passed: number of passed tests by contract.
    """

    def __init__(self, pool: EnginePool) -> None:
        self.failed: dict[str, list[str]] = defaultdict(list)
        self.other: dict[str, list[str]] = defaultdict(list)
        self.passed: dict[str, int] = defaultdict(int)
        self._pool = pool

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[POOL] = self._pool
        config.pluginmanager.register(_SabotagedEngines())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        mark = item.get_closest_marker("vllm_contract")
        contract = mark.kwargs["id"] if mark else ""
        if report.when == "call" and report.failed:
            self.failed[contract].append(f"{item.name}: {call.excinfo.exconly() if call.excinfo else ''}")
        elif report.when == "call" and report.passed:
            self.passed[contract] += 1
        elif not report.passed:
            self.other[contract].append(f"{item.name}: {report.when} {report.outcome}: {report.longreprtext[-500:]}")
        return report


@pytest.fixture
def inner_session(vllm_engine_pool: EnginePool, vllm_settings: Any) -> Any:
    """Runs the contracts of the given ids in a session of their own, on this session's engines."""

    def run(contracts: tuple[str, ...]) -> InnerSession:
        plugin = InnerSession(vllm_engine_pool)
        selection = " or ".join(f'vllm_contract(id="{contract}")' for contract in contracts)
        arguments = ["--pyargs", "conformance", "-m", selection, "-q", "-p", "no:cacheprovider", "--capture=no"]
        arguments += ["--vllm-cache-dir", str(vllm_settings.cache_dir.value)]
        pytest.main(arguments, plugins=[plugin])
        return plugin

    return run


@pytest.fixture
def vllm_engine_args(vllm_engine_args: dict[str, Any]) -> dict[str, Any]:
    return {**vllm_engine_args, "worker_extension_cls": QUALNAME}
