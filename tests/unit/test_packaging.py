"""What the distribution says about itself, and whether the places that say how to install vLLM agree."""

from __future__ import annotations

import configparser
import hashlib
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import pytest_roll_vllm
from roll_vllm import versions
from roll_vllm.backends import BACKENDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGES = ["roll_vllm", "pytest_roll_vllm", "conformance"]
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def names(requirements: list[str]) -> set[str]:
    return {Requirement(text).name for text in requirements}


def lines(path: Path) -> list[str]:
    """Return the lines of a requirements file, without comments."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def project(pyproject: dict[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = pyproject["project"]
    return table


@pytest.fixture(scope="module")
def tox() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini", encoding="utf-8")
    return parser


def test_name(project: dict[str, Any]) -> None:
    assert project["name"] == pytest_roll_vllm.DISTRIBUTION == "pytest-roll-vllm"


def test_pytest_finds_the_plugin(project: dict[str, Any]) -> None:
    assert project["entry-points"]["pytest11"] == {"roll_vllm": "pytest_roll_vllm.plugin"}
    assert (ROOT / "pytest_roll_vllm/plugin.py").is_file()


def test_vllm_and_torch_are_not_required(project: dict[str, Any]) -> None:
    assert names(project["dependencies"]) == {"hypothesis", "packaging", "psutil", "pytest", "tomli", "xxhash"}


def test_classifiers(project: dict[str, Any]) -> None:
    assert {"Framework :: Pytest", "Typing :: Typed"} <= {*project["classifiers"]}
    found = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", c) for c in project["classifiers"]]
    assert [match[1] for match in found if match] == PYTHONS
    required = SpecifierSet(project["requires-python"])
    assert [minor for minor in range(20) if f"3.{minor}" in required] == [10, 11, 12, 13]


def test_packages_are_typed(pyproject: dict[str, Any]) -> None:
    assert pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == PACKAGES
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").is_file()
        assert (ROOT / package / "py.typed").is_file()


def test_license(project: dict[str, Any]) -> None:
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2


def test_changelog_has_the_version(project: dict[str, Any]) -> None:
    assert f"\n## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def environments(tox: configparser.ConfigParser) -> dict[str, str]:
    """Return the section of every environment, with the braces of generative names expanded."""
    return {
        name: section
        for section in tox.sections()
        if section.startswith("testenv:")
        for name in expand(section.removeprefix("testenv:"))
    }


def expand(text: str) -> list[str]:
    """Expand braces the way tox does: ``a{,-b}`` is ``a`` and ``a-b``."""
    parts = [part[1:-1].split(",") if part[0] == "{" else [part] for part in re.findall(r"{[^{}]*}|[^{}]+", text)]
    return ["".join(choice) for choice in itertools.product(*parts)]


_CONDITION = re.compile(r"(?:([\w.!, -]+): )?(.*)")


def value(tox: configparser.ConfigParser, section: str, key: str, environment: str) -> list[str]:
    """Return the lines of a setting that hold in an environment, without their conditions."""
    found = []
    for line in tox[section][key].split("\n"):
        condition, rest = (match[1] or "", match[2]) if (match := _CONDITION.fullmatch(line)) else ("", line)
        factors = environment.split("-")
        if not condition or any(
            all((f[1:] not in factors) if f[0] == "!" else f in factors for f in group.strip().split("-"))
            for group in condition.split(",")
        ):
            found.append(rest.replace("{env_name}", environment))
    return [line for line in found if line]


def test_every_release_has_its_environments(tox: configparser.ConfigParser) -> None:
    named = {name for name in environments(tox) if name.startswith(("vllm", "proof"))}
    wanted = {f"vllm{row.release}-{factor}" for row in versions.TESTED for factor in ("cpu", "cpuref", "cuda")}
    wanted |= {f"proof{row.release}-cpu" for row in versions.TESTED}
    cpu_engines = {row.release: BACKENDS[row.route("cpu").backend].engines(row.release) for row in versions.TESTED}
    wanted |= {f"vllm{release}-cpu-v0" for release, engines in cpu_engines.items() if len(engines) > 1}
    assert {"vllm0.8.4-cpu-v0", "vllm0.10.2-cpu-v0"} <= wanted <= named
    for name in named - wanted:  # what is more than wanted is the other engine on GPUs
        release = re.fullmatch(r"vllm(.+)-cuda-v0", name)
        assert release
        assert "V0" in getattr(versions.resolve(release[1]), "engines", ())


def test_environments_install_what_the_table_says(tox: configparser.ConfigParser) -> None:
    main = environments(tox)["vllm0.12.0-cpu"]
    assert tox[main]["deps"] == "-r {[requirements]file}"
    assert "\nUV_OVERRIDE = {[requirements]file} requirements/override-smollm2.txt\n" in tox[main]["set_env"]
    for name, section in environments(tox).items():
        match = re.match(r"(?:vllm|proof)(\d[\d.]+)-(cpuref|cpu|cuda)", name)
        if not match:
            continue
        if section != main:
            assert tox[section]["base"].split(", ")[0].removeprefix("testenv:") in environments(tox)
            assert environments(tox)[tox[section]["base"].split(", ")[0].removeprefix("testenv:")] == main
            assert "deps" not in tox[section]
        (file,) = value(tox, "requirements", "file", name)
        assert file == f"requirements/vllm{match[1]}-{match[2]}.txt"
        row = versions.resolve(match[1])
        assert row
        route = row.route({"cpuref": "cpu-reference"}.get(match[2], match[2]))
        first, *others = lines(ROOT / file)
        assert first.partition(";")[0] == route.requirement
        assert others == [*route.overrides]
        settings = value(tox, main, "set_env", name)
        assert ("ROLL_VLLM_CPU_REFERENCE = 1" in settings) == (route.backend == "cpu-reference")
        assert ("VLLM_USE_V1 = 0" in settings) == name.endswith("-v0")
        assert ("PYTEST_VLLM_BACKEND = cuda" in settings) == (route.backend == "cuda")
        if name.startswith("vllm"):
            wanted = f"pytest --pyargs conformance --vllm-version {match[1]} {{posargs}}"
            assert value(tox, main, "commands", name) == [wanted]


def test_pythons_that_a_wheel_excludes_are_named_and_get_no_vllm(tox: configparser.ConfigParser) -> None:
    main = environments(tox)["vllm0.12.0-cpu"]
    for row in versions.TESTED:
        excluded = [python for python in PYTHONS if python not in SpecifierSet(row.python)]
        for name in (f"vllm{row.release}-cpu", f"proof{row.release}-cpu"):
            checks = value(tox, main, "commands_pre", name)
            assert len(checks) == bool(excluded)
            if excluded:
                allowed = [python for python in PYTHONS if python not in excluded]
                assert f"vLLM {row.release} needs Python {allowed[0]} to {allowed[-1]}:" in checks[0]
                assert f"< ({excluded[0].replace('.', ', ')})" in checks[0]
        for factor in ("cpu", "cpuref", "cuda"):
            wheel = Requirement(lines(ROOT / f"requirements/vllm{row.release}-{factor}.txt")[0])
            assert wheel.marker
            assert [python for python in PYTHONS if not wheel.marker.evaluate({"python_version": python})] == excluded


def test_requirement_files_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "requirements/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", sorted({row.requirements_file for row in versions.TESTED}))
def test_files_for_gpu_hosts_are_for_plain_pip(file: str) -> None:
    requirements = {Requirement(line).name: Requirement(line).specifier for line in lines(ROOT / file)}
    rows = [row for row in versions.TESTED if row.requirements_file == file]
    # Every release on this torch may be chosen, and without a choice pip takes the newest.
    allowed = [row.release for row in versions.TESTED if row.release in requirements["vllm"]]
    assert allowed == [row.release for row in rows]
    text = (ROOT / file).read_text(encoding="utf-8")
    for row in rows:
        assert f"# vLLM {row.release} " in text
        assert {Requirement(pin).name: Requirement(pin).specifier for pin in row.cuda.overrides} == {
            name: specifier for name, specifier in requirements.items() if name != "vllm"
        }


def test_no_requirement_file_is_left_over() -> None:
    written = {f"vllm{row.release}-{factor}.txt" for row in versions.TESTED for factor in ("cpu", "cpuref", "cuda")}
    assert {path.name for path in (ROOT / "requirements").glob("*.txt")} == {*written, "override-smollm2.txt"}
    assert {path.name for path in ROOT.glob("requirements*.txt")} == {row.requirements_file for row in versions.TESTED}


@pytest.mark.parametrize("release", ["0.8.4", "0.10.2", "0.12.0"])
def test_the_ci_script_runs_the_environments_that_it_must(release: str, tox: configparser.ConfigParser) -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert versions.resolve(release)
    assert re.search(rf"\bvllm{re.escape(release)}-cpu\b", script)
    named = {name for names in re.findall(r"\btox -e (\S+)", script) for name in names.split(",")}
    assert named <= environments(tox).keys()


def test_the_table_of_the_readme_names_every_release() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d[\d.]+) \| ([^|]*) \|", readme, re.MULTILINE)
    assert sorted(release for release, _ in rows) == sorted(row.release for row in versions.TESTED)


def test_nothing_of_smollm2_must_be_compiled() -> None:
    overrides = [Requirement(line) for line in lines(ROOT / "requirements/override-smollm2.txt")]
    assert {override.name for override in overrides} == {"llama-cpp-python", "llm"}
    assert not any(override.marker is None or override.marker.evaluate() for override in overrides)


def test_unit_tests_run_on_every_python(tox: configparser.ConfigParser) -> None:
    factors = "".join(f",-py{python.replace('.', '')}" for python in PYTHONS)
    assert f"testenv:unit{{{factors}}}" in tox
