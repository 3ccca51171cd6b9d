"""The backends answer for every tested release, without torch or vllm.

That the answers agree with the released sources of vLLM and vllm-ascend is tested in tests/backends.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import get_args

import pytest

from roll_vllm import backends, devices, environment, reference, versions
from roll_vllm.backends import BACKENDS, VERIFIED, Backend
from roll_vllm.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
RELEASES = [row.release for row in versions.TESTED]

every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=str)


def test_the_table() -> None:
    facts = {name: (b.kind, b.torch_device, b.ray_resource, b.communication) for name, b in BACKENDS.items()}
    assert facts == {
        "cuda": ("cuda", "cuda", "GPU", "nccl"),
        "rocm": ("rocm", "cuda", "GPU", "nccl"),
        "npu": ("npu", "npu", "NPU", "hccl"),
        "cpu": ("cpu", "cpu", "CPU", "gloo"),
        "cpu-reference": ("cpu", "cpu", "CPU", "gloo"),
    }


def test_every_kind_of_device_has_a_backend_of_its_name() -> None:
    assert {backend.kind for backend in BACKENDS.values()} == {*get_args(devices.Kind)} <= {*BACKENDS}
    assert reference.NAME in BACKENDS


@every_backend
def test_backends_are_found(backend: Backend) -> None:
    assert backends.get(backend.name) is backend
    assert backends.of_torch(backend.torch_device).communication == backend.communication
    device = devices.Device(backend.kind, 1, ("x",), (None,), "because", backend.name)
    assert backends.of(device) is backend
    assert backend.name in repr(backend)


@pytest.mark.parametrize("name", ["gpu", "", "CUDA", "tpu"])
def test_an_unknown_backend_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="choose one of: cuda, rocm, npu, cpu, cpu-reference") as caught:
        backends.get(name)
    assert repr(name) in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"choose one of: cuda, npu, cpu$"):
        backends.of_torch(name)


@every_backend
@pytest.mark.parametrize("release", [*RELEASES, "0.9.2", "0.33.0"])
def test_every_engine_has_a_worker_class(backend: Backend, release: str) -> None:
    engines = backend.engines(release)
    assert engines in (("V0",), ("V1",), ("V0", "V1"))
    assert backend.default_engine(release) in engines
    row = versions.resolve(release)
    assert row is None or {*engines} <= {*row.engines}
    for engine in ("V0", "V1"):
        if engine in engines:
            package, _, name = backend.worker_class(release, engine).rpartition(".")
            assert package.split(".")[0] in ("vllm", "vllm_ascend", "roll_vllm")
            assert name.endswith("Worker")
        else:
            with pytest.raises(ConfigurationError, match=f"has no {engine} engine"):
                backend.worker_class(release, engine)


@pytest.mark.parametrize(
    ("name", "release", "engine", "expected"),
    [
        ("cuda", "0.8.4", "V0", "vllm.worker.worker.Worker"),
        ("cuda", "0.12.0+cu128", "V1", "vllm.v1.worker.gpu_worker.Worker"),
        ("rocm", "0.10.2", "V0", "vllm.worker.worker.Worker"),
        ("npu", "0.8.4", "V0", "vllm_ascend.worker.worker.NPUWorker"),
        ("npu", "0.12.0", "V1", "vllm_ascend.worker.worker_v1.NPUWorker"),
        ("cpu", "0.8.4", "V0", "vllm.worker.cpu_worker.CPUWorker"),
        ("cpu", "0.12.0.post2", "V1", "vllm.v1.worker.cpu_worker.CPUWorker"),
        ("cpu-reference", "0.8.4", "V0", "roll_vllm.reference.worker_v0.ReferenceWorker"),
        ("cpu-reference", "0.8.4", "V1", "roll_vllm.reference.worker_v1.ReferenceWorker"),
    ],
)
def test_worker_classes(name: str, release: str, engine: str, expected: str) -> None:
    assert BACKENDS[name].worker_class(release, engine) == expected


def test_the_pool_is_used_where_vllm_has_one() -> None:
    def having(name: str, engine: str = "V1") -> list[str]:
        return [release for release in RELEASES if BACKENDS[name].enable_sleep_mode(release, engine)]

    assert having("cuda") == RELEASES
    assert having("rocm") == ["0.11.1", "0.12.0"]
    assert having("npu") == RELEASES[1:]
    assert "0.8.4" in having("npu", "V0")
    assert having("cpu") == having("cpu-reference") == []


@pytest.mark.parametrize(
    ("name", "variables", "ray"),
    [
        ("cuda", {"CUDA_VISIBLE_DEVICES": "2,0"}, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"),
        (
            "rocm",
            {"HIP_VISIBLE_DEVICES": "2,0", "CUDA_VISIBLE_DEVICES": "2,0"},
            "RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES",
        ),
        ("npu", {"ASCEND_RT_VISIBLE_DEVICES": "2,0"}, "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"),
        ("cpu", {}, ""),
        ("cpu-reference", {}, ""),
    ],
)
def test_visibility(name: str, variables: dict[str, str], ray: str) -> None:
    assert BACKENDS[name].show_only(["2", "0"]) == variables
    assert BACKENDS[name].ray_keeps_visibility == ray


# --- variables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {}),
        ({"ROCR_VISIBLE_DEVICES": "3"}, {}),
        ({"CUDA_VISIBLE_DEVICES": "1,2"}, {"HIP_VISIBLE_DEVICES": "1,2", "CUDA_VISIBLE_DEVICES": "1,2"}),
        ({"HIP_VISIBLE_DEVICES": ""}, {"HIP_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": ""}),
        (  # what HIP itself would do
            {"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"},
            {"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "0"},
        ),
    ],
)
def test_both_names_of_amd_devices_agree(environ: dict[str, str], expected: dict[str, str]) -> None:
    assert BACKENDS["rocm"].worker_environment("0.12.0", environ) == expected


def test_gpus_named_by_uuid_reach_vllm_by_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU-aa, H100, 81559'\necho 'GPU-bb, H100, 81559'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    environ = {"CUDA_VISIBLE_DEVICES": "GPU-bb,GPU-aa"}
    expected = {"CUDA_VISIBLE_DEVICES": "1,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert BACKENDS["cuda"].worker_environment("0.12.0", environ) == expected
    computed = environment.worker_environment(
        worker_name="w", device_kind="cuda", vllm_version="0.8.4", port=None, environ={"HOME": "/x", **environ}
    )
    assert expected.items() <= computed.items()
    assert BACKENDS["cuda"].worker_environment("0.12.0", {"CUDA_VISIBLE_DEVICES": "1,0"}) == {}


@pytest.mark.parametrize(
    ("release", "ranks", "native", "stand_in"),
    [
        ("0.8.4", 1, None, "all"),
        ("0.8.4", 2, "all|all", "all|all"),
        ("0.10.2", 3, "all|all|all", "all|all|all"),
        ("0.11.0.post2", 2, "all|all", "all|all"),
        ("0.11.1.post2", 1, None, "nobind"),
        ("0.12.0", 2, "nobind", "nobind"),
    ],
)
def test_threads_are_not_bound(release: str, ranks: int, native: str | None, stand_in: str) -> None:
    name = "VLLM_CPU_OMP_THREADS_BIND"
    for backend, expected in (("cpu", native), ("cpu-reference", stand_in)):
        assert BACKENDS[backend].worker_environment(release, {}, ranks).get(name) == expected
        assert name not in BACKENDS[backend].worker_environment(release, {name: "0-1|2-3"}, ranks)


def test_workers_of_the_reference_platform_ask_for_it() -> None:
    assert reference.requested(BACKENDS["cpu-reference"].worker_environment("0.8.4", {}))
    assert not reference.requested(BACKENDS["cpu"].worker_environment("0.12.0", {}, 2))


@every_backend
def test_computing_changes_nothing(backend: Backend) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "1", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    before = dict(environ)
    backend.worker_environment("0.12.0", environ, 2)
    assert environ == before


# --- the allocator ---------------------------------------------------------------------------------------


class FakeTorch(ModuleType):
    """Stands in for torch with an accelerator, which no machine of ours has."""

    def __init__(self, device: str, initialized: bool, settable: bool = True) -> None:
        super().__init__("torch")
        self.settings: list[str] = []
        memory = SimpleNamespace(_set_allocator_settings=self.settings.append) if settable else SimpleNamespace()
        setattr(self, device, SimpleNamespace(is_initialized=lambda: initialized, memory=memory))


OPTIONS = "max_split_size_mb:64,expandable_segments:True"


@pytest.mark.parametrize(
    ("name", "device", "variable"),
    [
        ("cuda", "cuda", "PYTORCH_CUDA_ALLOC_CONF"),
        ("rocm", "cuda", "PYTORCH_HIP_ALLOC_CONF"),
        ("npu", "npu", "PYTORCH_NPU_ALLOC_CONF"),
    ],
)
def test_a_running_allocator_is_told(monkeypatch: pytest.MonkeyPatch, name: str, device: str, variable: str) -> None:
    for initialized in (True, False):
        torch = FakeTorch(device, initialized)
        monkeypatch.setitem(sys.modules, "torch", torch)
        BACKENDS[name].release_allocator({variable: OPTIONS})
        assert torch.settings == ["max_split_size_mb:64,expandable_segments:False"] * initialized


def test_an_npu_allocator_that_cannot_be_told_is_complained_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch", FakeTorch("npu", initialized=True, settable=False))
    BACKENDS["npu"].release_allocator({"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:64"})
    assert caplog.records == []
    with caplog.at_level(logging.WARNING):
        BACKENDS["npu"].release_allocator({"PYTORCH_NPU_ALLOC_CONF": OPTIONS})
    assert "unset the variable before the process starts" in caplog.text


def test_torch_without_npus_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", FakeTorch("cuda", initialized=False))
    BACKENDS["npu"].release_allocator({"PYTORCH_NPU_ALLOC_CONF": OPTIONS})


@pytest.mark.parametrize("name", ["cpu", "cpu-reference"])
def test_main_memory_needs_no_telling(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it would fail
    BACKENDS[name].release_allocator({"PYTORCH_CUDA_ALLOC_CONF": OPTIONS})


# --- trust -----------------------------------------------------------------------------------------------


def test_only_what_passed_on_hardware_is_called_verified() -> None:
    for row in versions.TESTED:
        assert {*row.verified} <= {*BACKENDS}
        for name, backend in BACKENDS.items():
            assert (backend.verified(row.release) == VERIFIED) == (name in row.verified)
    assert BACKENDS["cpu"].verified("0.12.0.post2") == VERIFIED
    assert BACKENDS["cpu"].verified("0.33.0") == "not verified"
    assert {name: b.evidence for name, b in BACKENDS.items() if b.evidence != "not verified"} == {
        "rocm": "simulated",
        "npu": "simulated",
    }


def tables() -> list[list[dict[str, str]]]:
    """Return the tables of docs/backends.md, each row by column."""
    found: list[list[dict[str, str]]] = []
    for block in re.findall(r"(?:^\|.*\n)+", (ROOT / "docs/backends.md").read_text(encoding="utf-8"), re.MULTILINE):
        header, _, *rows = (
            [cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in block.splitlines()
        )
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


def test_the_page_says_what_the_backends_say() -> None:
    backends_table, verified, engines, _ = tables()
    assert [row["backend"] for row in backends_table] == [*BACKENDS]
    for row in backends_table:
        backend = BACKENDS[row["backend"]]
        assert (row["Ray counts"], row["groups talk by"]) == (backend.ray_resource, backend.communication)
        assert row["evidence"] in (backend.evidence, "see below")
        for group in backend.visibility:
            assert all(name in row["visible devices"] for name in group)
    assert [row["vLLM"] for row in verified] == RELEASES
    for row, known in zip(verified, versions.TESTED, strict=True):
        assert {name: row[name] for name in BACKENDS} == {n: b.verified(known.release) for n, b in BACKENDS.items()}
        assert row["vllm-ascend"] == (known.ascend or "none")
    for row in engines:
        for release in RELEASES[2:] if "newer" in row["vLLM"] else [row["vLLM"]]:
            for name, backend in BACKENDS.items():
                if row[name] == "no build is known":
                    known_row = versions.resolve(release)
                    assert known_row
                    assert known_row.native is None
                    continue
                started = backend.default_engine(release)
                said = [f"**{one}**" if one == started else one for one in backend.engines(release)]
                assert row[name] == ", ".join(said)


def test_backends_are_light() -> None:
    program = (
        "import sys; import roll_vllm.backends; "
        "print(sorted({'torch', 'vllm', 'ray', 'numpy', 'transformers', 'pytest'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
