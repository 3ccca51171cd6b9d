"""``--vllm-contracts``: lists what there is, and runs nothing, whatever is installed."""

from __future__ import annotations

import pytest
from plugin_harness import Inner

SOURCE = '''
    """What it is about,
    in one paragraph.

    And more."""
    import pytest
    from pytest_roll_vllm.contracts import contract

    one = contract("a-one", "It does this.", versions=">=0.11,<0.13", backends=("cpu", "cuda"), references=["up#1"])

    class TestIt:
        @one
        @pytest.mark.parametrize("how", [1, 2])
        def test_both(self, how): raise AssertionError("was run")

    def test_none(): pass

    @contract("b-two", "It does that.", needs=("update", "sleep"))
    @pytest.mark.vllm_on_request("executors")
    def test_two(vllm_engine): pass

    @one
    @pytest.mark.vllm_on_request("executors")
    def test_more(): pass
'''


def test_everything_about_them(inner: Inner) -> None:
    inner.no_vllm()
    inner.pytester.makepyfile(test_it=SOURCE)
    result = inner.run("--vllm-contracts", "test_it.py")
    assert result.ret == 0
    assert result.outlines == [
        "test_it: What it is about, in one paragraph.",
        "",
        "  a-one",
        "      It does this.",
        "      vLLM >=0.11,<0.13 on cpu, cuda; 3 tests, 1 on request only: --vllm-executors",
        "      see: up#1",
        "  b-two",
        "      It does that.",
        "      vLLM >=0.8.4,<0.13 on cpu, cuda, rocm, npu; 1 test, all on request only: --vllm-executors",
        "      needs: update, sleep",
        "",
        "2 contracts, 4 tests",
    ]


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        (["test_it.py"], ["a-one", "b-two"]),
        (["test_it.py", "-k", "b-two"], ["b-two"]),
        (["test_it.py", "-m", 'vllm_contract(id="a-one")'], ["a-one"]),
        (["test_it.py::test_two"], ["b-two"]),
    ],
)
def test_ids_of_the_selection(inner: Inner, arguments: list[str], ids: list[str]) -> None:
    inner.pytester.makepyfile(test_it=SOURCE)
    result = inner.run("--vllm-contracts", "-q", *arguments)
    assert (result.ret, result.outlines) == (0, ids)


@pytest.mark.parametrize("arguments", [[], ["--pyargs", "conformance"], ["-pxdist", "-n2"]])
def test_the_suite_is_meant_unless_something_else_is_said(inner: Inner, arguments: list[str]) -> None:
    inner.pytester.makepyfile(test_it=SOURCE)
    inner.pytester.makeini("[pytest]\ntestpaths = .\n")
    result = inner.run("--vllm-contracts", "-q", *arguments)
    assert result.ret == 0
    assert {"wu-a-b-a", "sl-memory-freed"} < {*result.outlines}
    assert len(result.outlines) == len({*result.outlines}) > 30
    assert "a-one" not in result.outlines


def test_settings_that_cannot_work_do_not_matter(inner: Inner) -> None:
    for name, value in {"VERSION": "0.11.0 0.12.0", "PROVISION": "true", "BACKEND": "tpu", "REPORT": "out"}.items():
        inner.monkeypatch.setenv(f"PYTEST_VLLM_{name}", value)
    inner.pytester.makepyfile(test_it=SOURCE)
    assert inner.run("--vllm-contracts", "-q", "test_it.py").outlines == ["a-one", "b-two"]
    assert [path.name for path in inner.pytester.path.iterdir() if not path.name.startswith((".", "_"))] == [
        "test_it.py"
    ]


def test_no_contract_is_no_success(inner: Inner) -> None:
    result = inner.run("--vllm-contracts", ".", source="def test(): pass")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    assert result.outlines == ["no selected test has a contract"]


def test_a_module_that_cannot_be_collected(inner: Inner) -> None:
    result = inner.run("--vllm-contracts", ".", source="import nothing_of_that_name")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["E   ModuleNotFoundError: *nothing_of_that_name*"])


def test_another_package_in_the_way_of_the_suite(inner: Inner) -> None:
    inner.pytester.makepyfile(**{"conformance/__init__": "", "conformance/test_it": SOURCE})
    inner.pytester.syspathinsert()
    result = inner.run("--vllm-contracts")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*`--pyargs conformance` finds *which is not the suite of pytest-roll-vllm*"])
