"""Runs pytest with the plugin inside a test."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import pytest_roll_vllm

PLUGIN = "pytest_roll_vllm.plugin"
ROOT = Path(pytest_roll_vllm.__file__).parents[1]

# How to start a process that is to be sent Ctrl-C: whoever runs the tests in the background may ignore that signal, and
# children inherit it.
INTERRUPTIBLE: dict[str, Any] = {
    "start_new_session": True,
    "preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
}


# Stands for uv: the environments are real, with interpreters of their own, but hold metadata of a vLLM only, and see
# pytest where the tests run.
UV = """#!{python}
import os, re, sys, time, venv
from pathlib import Path

with open(os.environ["FAKE_UV_LOG"], "a") as log:
    print(*sys.argv[1:], file=log)
command = sys.argv[1:3]
if command == ["python", "find"]:
    sys.exit("no interpreter found")
elif sys.argv[1] == "venv":
    venv.create(sys.argv[-1], symlinks=True, with_pip=False)
elif command == ["pip", "install"]:
    wanted = next(one for one in sys.argv if one.startswith("vllm"))
    print("Downloading", wanted, file=sys.stderr, flush=True)
    name, version = wanted.split("==")
    root = Path(sys.argv[sys.argv.index("--python") + 1]).parents[1]
    (site,) = root.glob("lib/python*/site-packages")
    (site / "half").touch()
    time.sleep(float(os.environ.get("FAKE_UV_SECONDS", "0")))
    if version in os.environ.get("FAKE_UV_FAILS", "").split():
        sys.exit("error: no solution for " + wanted)
    info = site / (name.replace("-", "_") + "-" + version + ".dist-info")
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {{name}}\\nVersion: {{version}}\\n")
    (site / "outer.pth").write_text({paths!r})
    print("Installed 1 package", file=sys.stderr)
else:
    sys.exit("unexpected")
"""


class Inner:
    """Runs pytest with the plugin, and no other that was not asked for, in a directory of its own."""

    def __init__(self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pytester = pytester
        self.monkeypatch = monkeypatch
        # On a CI server pytest shows differences in full.
        for name in ("CI", "BUILD_NUMBER"):
            monkeypatch.delenv(name, raising=False)

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

    def fake_uv(self) -> None:
        """Put a program ``uv`` on PATH that makes environments with the metadata of a vLLM; it logs to ``uv.log``."""
        program = self.pytester.mkdir("bin") / "uv"
        paths = "\n".join([str(Path(pytest.__file__).parents[1]), str(ROOT)])
        program.write_text(UV.format(python=sys.executable, paths=paths))
        program.chmod(0o755)
        self.monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        self.monkeypatch.setenv("FAKE_UV_LOG", str(self.pytester.path / "uv.log"))
        self.monkeypatch.setenv("PYTHONPATH", str(ROOT))

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
