"""The executors of a run, and the Ray cluster where there is none to be had."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from plugin_harness import Inner

from pytest_roll_vllm.engines import EngineConfig, plain
from pytest_roll_vllm.ray_cluster import RayCluster
from roll_vllm.errors import ConfigurationError

ON_EACH = """
    def test_it(vllm_executor):
        print("runs on", vllm_executor)
"""

ON_RAY = """
    import pytest
    from pytest_roll_vllm.contracts import contract

    @contract("on-ray", "It runs on Ray.")
    @pytest.mark.parametrize("vllm_executor", ["ray"], indirect=True)
    def test_it(vllm_executor):
        print("runs on", vllm_executor)
"""


@pytest.fixture
def without_ray(installed: Inner) -> Inner:
    """An installed vLLM beside which Ray cannot be imported."""
    installed.monkeypatch.setitem(sys.modules, "ray", None)
    return installed


def test_mp_by_default(installed: Inner) -> None:
    result = installed.run("-rs", source=ON_EACH)
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*not applicable: needs the executor ray; this run tests mp"])


def test_every_executor_of_the_release(installed: Inner) -> None:
    result = installed.run("-v", "--vllm-executors=all", source=ON_EACH)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines_random(["*::test_it[[]mp[]] PASSED*", "*::test_it[[]ray[]] PASSED*"])


def test_a_release_that_nobody_tested_has_no_ray(inner: Inner) -> None:
    inner.install("0.99.0")
    result = inner.run("-rs", "--vllm-executors=all", source=ON_EACH)
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*not applicable: needs the executor ray; this run tests mp"])


@pytest.mark.parametrize(
    ("option", "variable", "ini", "wanted"),
    [("mp", "ray", "ray", "mp"), ("", "ray", "mp", "ray"), ("", "", "ray, mp", "mp, ray")],
)
def test_executors_from_all_sources(installed: Inner, option: str, variable: str, ini: str, wanted: str) -> None:
    installed.pytester.makeini(f"[pytest]\nvllm_executors = {ini}\n")
    installed.monkeypatch.setenv("PYTEST_VLLM_EXECUTORS", variable)
    result = installed.run("-s", *([f"--vllm-executors={option}"] if option else []), source=ON_EACH)
    result.stdout.fnmatch_lines([f"executors: {wanted} (from *)", *(f"*runs on {one}" for one in wanted.split(", "))])


def test_on_request_only(installed: Inner) -> None:
    source = "import pytest\n\n@pytest.mark.vllm_on_request('executors')\ndef test_it(): pass"
    result = installed.run("-rs", source=source)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*not applicable: runs on request only, * give --vllm-executors"])
    installed.run("--vllm-executors=mp", source=source).assert_outcomes(passed=1)


def test_on_request_of_what_is_no_setting(installed: Inner) -> None:
    result = installed.run(source="import pytest\n\n@pytest.mark.vllm_on_request('tea')\ndef test_it(): pass")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*there is no setting 'tea'*"])


def test_unknown_executor(installed: Inner) -> None:
    result = installed.run("--vllm-executors=mp,rya", source=ON_EACH)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--vllm-executors is mp,rya *: unknown rya; choose from mp, ray"])


def test_executor_that_was_left_out_is_not_applicable(installed: Inner) -> None:
    found = installed.report("--vllm-executors=mp", source=ON_RAY)
    assert found["contracts"]["on-ray"]["outcome"] == "not applicable"
    assert "this run tests mp" in found["contracts"]["on-ray"]["reason"]


@pytest.mark.parametrize("source", ["option", "variable", "ini"])
def test_address_of_a_cluster(installed: Inner, source: str) -> None:
    installed.pytester.makeini(f"[pytest]\nray_address = {'host:1' if source == 'ini' else ''}\n")
    installed.monkeypatch.setenv("PYTEST_RAY_ADDRESS", "host:1" if source == "variable" else "")
    arguments = ["--ray-address=host:1"] if source == "option" else []
    result = installed.run("-s", *arguments, source="def test_it(vllm_settings): print(vllm_settings.ray_address)")
    result.stdout.fnmatch_lines(["*host:1 (from *"])


def test_no_ray_is_an_error_and_no_skip(without_ray: Inner) -> None:
    result = without_ray.run("--vllm-backend=cpu", source="def test_it(ray_cluster): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*Ray cannot be imported here*`pip install ray`*--vllm-executors mp*"])


def test_no_ray_leaves_contracts_without_an_answer(without_ray: Inner) -> None:
    source = ON_RAY.replace("def test_it(vllm_executor)", "def test_it(vllm_executor, ray_cluster)")
    found = without_ray.report("--vllm-backend=cpu", "--vllm-executors=all", source=source)
    assert found["contracts"]["on-ray"]["outcome"] == "could not run"
    assert "pip install ray" in found["contracts"]["on-ray"]["reason"]


def test_no_ray_is_no_trouble_where_it_is_not_used(without_ray: Inner) -> None:
    assert without_ray.run(source=ON_EACH).ret == 0


def test_a_cluster_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match="pip install ray"):
        RayCluster()


def test_arguments_are_told_apart_by_the_ids_of_placement_groups() -> None:
    def entries(identity: str) -> dict[str, object]:
        group = SimpleNamespace(id=SimpleNamespace(hex=lambda: identity))  # what Ray's groups have
        return {"resource_placement_groups": [(group, 1), (group, 0)]}

    assert plain(entries("a1"))["resource_placement_groups"] == [["SimpleNamespace a1", 1], ["SimpleNamespace a1", 0]]
    assert EngineConfig.of("m", entries("a1")) == EngineConfig.of("m", entries("a1"))
    assert EngineConfig.of("m", entries("a1")) != EngineConfig.of("m", entries("b2"))
