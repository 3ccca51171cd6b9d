"""Several vLLM versions from an environment that has none, with the real uv, wheels and engines.

Needs the network, about 20 GB for the packages of two torch releases, and minutes, so it runs only when asked for:
``pytest tests/provision``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_roll_vllm import provision

ROOT = Path(__file__).parents[2]
VERSIONS = ("0.11.0", "0.12.0")


class Plain:
    """An environment with pytest, pytest-xdist, uv and this project, and caches of its own but for uv's."""

    def __init__(self, path: Path, *project: str) -> None:
        self.path = path
        uv = str(provision.find_uv())
        python = str(path / "venv/bin/python")
        subprocess.run([uv, "venv", "--python", sys.executable, str(path / "venv")], check=True)
        subprocess.run([uv, "pip", "install", "--python", python, "pytest-xdist", "uv", *project], check=True)
        cache = subprocess.run([uv, "cache", "dir"], check=True, capture_output=True, text=True).stdout.strip()
        self._command = [python, "-m", "pytest", "--vllm-provision", "--vllm-report=report", "--pyargs", "conformance"]
        # Not the caller's path, which may have packages that the environment lacks.
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHON", "VLLM_"))
        }
        self._environ = {**kept, "UV_CACHE_DIR": cache, "XDG_CACHE_HOME": str(path / "cache")}

    def run(self, *arguments: str) -> tuple[dict[str, Any], str, float]:
        """Run the suite, and return the report, what was printed, and the seconds it took."""
        begun = time.monotonic()
        done = subprocess.run(
            [*self._command, *arguments], cwd=self.path, env=self._environ, stdout=subprocess.PIPE, text=True
        )
        print(done.stdout)
        report: dict[str, Any] = json.loads((self.path / "report/report.json").read_text())
        return report, done.stdout, time.monotonic() - begun


def outcomes(run: dict[str, Any]) -> set[str]:
    assert run["contracts"]
    return {one["outcome"] for one in run["contracts"].values()}


def test_from_a_checkout(tmp_path: Path) -> None:
    plain = Plain(tmp_path, "--editable", str(ROOT))
    wanted = [f"--vllm-version={version}" for version in VERSIONS]
    report, printed, first = plain.run(*wanted, "-k", "gen-token-ids-verbatim or wu-a-b-a")
    assert report["exit_status"] == 0
    assert report["complete"]
    for run, version in zip(report["runs"], VERSIONS, strict=True):
        assert run["vllm"]["version"].startswith(version)
        assert outcomes(run) == {"passed"}
        assert f"{version}-cpu: making " in printed

    report, printed, second = plain.run(*wanted, "-k", "gen-token-ids-verbatim or wu-a-b-a")
    assert report["exit_status"] == 0
    assert ": making " not in printed
    assert second < first


def test_from_an_installed_copy(tmp_path: Path) -> None:
    """It goes along as a wheel that is put together from its files."""
    plain = Plain(tmp_path, str(ROOT))
    report, printed, _ = plain.run("--vllm-version=0.12.0", "-k", "gen-token-ids-verbatim")
    assert report["exit_status"] == 0, printed
    assert report["vllm"]["version"].startswith("0.12.0")
    assert outcomes(report) == {"passed"}
    assert [*tmp_path.glob("cache/pytest-roll-vllm/envs/0.12.0-*/lib/python*/site-packages/conformance/__init__.py")]


@pytest.mark.parametrize("version", ["0.8.4", "0.12.0"])
def test_the_reference_platform(tmp_path: Path, version: str) -> None:
    plain = Plain(tmp_path, "--editable", str(ROOT))
    report, printed, _ = plain.run(
        f"--vllm-version={version}", "--vllm-backend=cpu-reference", "-k", "gen-token-ids-verbatim"
    )
    assert report["exit_status"] == 0, printed
    assert (report["backend"], report["vllm"]["distribution"]) == ("cpu-reference", "vllm")
    assert outcomes(report) == {"passed"}
