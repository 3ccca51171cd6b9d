"""Runs pytest with the plugin inside a test."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import pytest_roll_vllm

PLUGIN = "pytest_roll_vllm.plugin"
ROOT = Path(pytest_roll_vllm.__file__).parents[1]


class Inner:
    """Runs pytest with the plugin, and no other that was not asked for, in a directory of its own."""

    def __init__(self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pytester = pytester
        self.monkeypatch = monkeypatch

    def install(self, version: str, distribution: str = "vllm") -> None:
        """Simulate an installed vLLM: there is metadata on sys.path, and no code."""
        site = self.pytester.mkdir("site")
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        self.pytester.syspathinsert(site)
        # for xdist workers and other processes
        paths = [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))

    def no_vllm(self) -> None:
        """Simulate an environment without vLLM, in this process only."""
        self.monkeypatch.setattr("roll_vllm.versions.installed", lambda: None)

    def run(self, *args: str | Path, source: str | None = None) -> pytest.RunResult:
        """Run pytest in this process, on a module with the given source if there is one."""
        if source is not None:
            self.pytester.makepyfile(source)
        # xdist hands its workers the sys.path of the moment when it was imported, without what was added.
        subprocess = "-pxdist" in args
        run = self.pytester.runpytest_subprocess if subprocess else self.pytester.runpytest_inprocess
        return run("-p", PLUGIN, "--strict-markers", *args)

    def report(self, *args: str | Path, source: str | None = None) -> dict[str, Any]:
        """Run pytest, and return report.json."""
        self.run("--vllm-report=out", *args, source=source)
        document: dict[str, Any] = json.loads((self.pytester.path / "out/report.json").read_text())
        return document
