"""The proof's own sessions: contracts run against a target, broken or not, on engines that are started once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from pytest_roll_vllm.fixtures import POOL, RAY_CLUSTER
from pytest_roll_vllm.outcomes import GAP, NOT_APPLICABLE
from pytest_roll_vllm.proof import KINDS

if TYPE_CHECKING:
    from pytest_roll_vllm.engines import EnginePool
    from pytest_roll_vllm.options import Settings
    from pytest_roll_vllm.ray_cluster import RayCluster


class _EngineArguments:
    """Registered last, so that it sees the plugin's own fixture: engines get what saboteurs need."""

    def __init__(self, more: Mapping[str, Any]) -> None:
        self._more = more

    @pytest.fixture
    def vllm_engine_args(self, vllm_engine_args: dict[str, Any]) -> dict[str, Any]:
        return {**vllm_engine_args, **self._more}


class InnerSession:
    """A pytest plugin that lends the engines to an inner session and notes how each contract fared.

    Attributes:
        failed: messages of failed test calls by contract.
        other: outcomes of all other phases that were not a pass, by contract.
        passed: number of passed tests by contract.
        elsewhere: contracts with a test that does not concern what is installed, or fails there as declared.
    """

    def __init__(
        self, pool: EnginePool, cluster: RayCluster | None, engine_args: Mapping[str, Any], once: bool
    ) -> None:
        self.failed: dict[str, list[str]] = defaultdict(list)
        self.other: dict[str, list[str]] = defaultdict(list)
        self.passed: dict[str, int] = defaultdict(int)
        self.elsewhere: set[str] = set()
        self._pool = pool
        self._cluster = cluster
        self._engine_args = engine_args
        self._once = once

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[POOL] = self._pool
        if self._cluster is not None:
            config.stash[RAY_CLUSTER] = self._cluster
        config.pluginmanager.register(_EngineArguments(self._engine_args))

    @pytest.hookimpl(tryfirst=True)  # before anything is set up
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self._once and self.failed[_contract(item)]:
            pytest.skip("another test of the contract has failed, as it should")

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of the plugin's own, which knows declared failures
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        contract = _contract(item)
        known = dict(item.user_properties)
        if NOT_APPLICABLE in known or GAP in known:
            self.elsewhere.add(contract)
        elif report.when == "call" and report.failed:
            self.failed[contract].append(f"{item.name}: {call.excinfo.exconly() if call.excinfo else ''}")
        elif report.when == "call" and report.passed:
            self.passed[contract] += 1
        elif not report.passed:
            self.other[contract].append(f"{item.name}: {report.when} {report.outcome}: {report.longreprtext[-500:]}")
        return report

    def verdict(self, contract: str, wanted: str) -> str:
        """How a contract fared: ``failed``, ``passed``, ``n/a`` if it does not concern us here, or ``not run``.

        Args:
            contract: its id.
            wanted: what it should have done. A contract fails if one of its tests does; it passes if none gives
                another answer.
        """
        if self.failed[contract]:
            return "failed"
        if self.other[contract] and wanted == "passed":
            return "not run"
        if self.passed[contract]:
            return "passed"
        return "n/a" if contract in self.elsewhere and not self.other[contract] else "not run"


def _contract(item: pytest.Item) -> str:
    mark = item.get_closest_marker("vllm_contract")
    return mark.kwargs["id"] if mark else ""


def run(
    kind: str,
    contracts: Iterable[str],
    engine_args: Mapping[str, Any],
    pool: EnginePool,
    cluster: RayCluster | None,
    settings: Settings,
    *,
    once: bool,
) -> InnerSession:
    """Run contracts in a session of their own on the given engines.

    Args:
        once: leave the other tests of a contract out when one has failed: on a broken engine they may take long.
    """
    wanted = sorted(set(contracts))
    plugin = InnerSession(pool, cluster, engine_args, once)
    selection = " or ".join(f'vllm_contract(id="{contract}")' for contract in wanted)
    arguments = ["--pyargs", "conformance", "-m", selection, "-q", "-p", "no:cacheprovider", "--capture=no"]
    # Where a traceback shows a statement, ast.parse is not safe beside other threads before Python 3.11.8.
    arguments += ["--tb=native"]
    arguments += ["-k", KINDS[kind], "--vllm-target", settings.target.value]
    if kind != "shared":
        arguments += ["--vllm-executors", "ray" if kind == "ray" else "mp"]
    arguments += ["--vllm-cache-dir", settings.cache_dir.value]
    pytest.main(arguments, plugins=[plugin])
    return plugin
