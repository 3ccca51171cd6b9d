"""What accelerator this machine offers, and why we think so.

Nothing here imports torch or vllm: asking torch for devices initialises drivers in the parent process, and
takes seconds. The answers come from the visibility variables, the installed vLLM build, the vendors'
command-line tools and the files of the kernel drivers.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from roll_vllm import backends, versions
from roll_vllm.backends import BACKENDS
from roll_vllm.errors import ConfigurationError

Kind = backends.Kind

_ACCELERATORS = {backend.kind: backend.visibility for backend in BACKENDS.values() if backend.visibility}
_CUDA_VISIBLE = "CUDA_VISIBLE_DEVICES"
_COMMAND_TIMEOUT = 10.0  # seconds; nvidia-smi needs a few when the driver is not yet loaded
_MIB = 2**20


@dataclass(frozen=True)
class Device:
    """The devices of one kind that this process may use.

    Attributes:
        kind: ``cuda``, ``rocm``, ``npu`` or ``cpu``.
        count: Number of visible devices; the CPU counts as one.
        names: One name a device.
        memory_bytes: Total memory of each device in bytes, ``None`` where unknown.
        reason: One sentence on how this was found out.
        backend: What an engine on these devices runs by: ``cpu-reference``, or the same as ``kind``.
    """

    kind: Kind
    count: int
    names: tuple[str, ...]
    memory_bytes: tuple[int | None, ...]
    reason: str
    backend: str = ""

    def __post_init__(self) -> None:
        if not self.backend:
            object.__setattr__(self, "backend", self.kind)


def _run(command: Sequence[str]) -> str | None:
    """Return what a command prints, or ``None`` if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, check=True, timeout=_COMMAND_TIMEOUT, text=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Probe:
    """The machine as :func:`detect` sees it; tests put another one in its place.

    Attributes:
        root: Root of the file system, as an absolute path.
        environ: The environment variables.
        run: Runs a command and returns its output, or ``None`` if there is none to be had.
        installed: Returns the installed vLLM.
        cores: Returns the number of CPU cores this process may use.
    """

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    run: Callable[[Sequence[str]], str | None] = _run
    installed: Callable[[], versions.Installed | None] = versions.installed
    cores: Callable[[], int] = _cores

    def read(self, path: str | Path) -> str:
        """Return the text of a file below ``root``; empty if it cannot be read."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return ""

    def glob(self, pattern: str) -> list[Path]:
        """Return the paths below ``root`` that match, numbered ones in the order of their numbers."""
        return sorted(self.root.glob(pattern), key=lambda path: (len(str(path)), path))


def detect(requested: str = "auto", probe: Probe | None = None) -> Device:
    """Return the devices of the requested kind, or with ``auto`` of the best kind that is visible.

    The CPU reference platform is asked for as ``cpu-reference``, and by the variable ``ROLL_VLLM_CPU_REFERENCE=1``
    with ``auto`` or ``cpu``.

    Args:
        requested: ``auto``, ``cuda``, ``rocm``, ``npu``, ``cpu`` or ``cpu-reference``.
        probe: The machine to look at; this one by default.

    Raises:
        ConfigurationError: If the kind is unknown, no device of it is visible, or the CPU reference platform is
            asked for where a device or a CPU build of vLLM would be used instead of it.
    """
    from roll_vllm import reference

    probe = probe or Probe()
    if requested == "cpu-reference":
        return _reference(probe, "cpu-reference was requested")
    if requested in ("auto", "cpu") and reference.requested(probe.environ):
        return _reference(probe, f"{reference.VARIABLE}=1 asks for the CPU reference platform")
    if requested == "auto":
        return _best(probe)
    if requested == "cpu":
        return _cpu(probe, "cpu was requested")
    for kind in _ACCELERATORS:
        if kind == requested:
            return _demand(kind, probe)
    raise ConfigurationError(f"unknown device {requested!r}; choose one of: auto, {', '.join(BACKENDS)}")


def by_index(environ: Mapping[str, str], probe: Probe | None = None) -> dict[str, str]:
    """Compute the variables that name by index the NVIDIA GPUs that ``environ`` names by UUID.

    All tested releases of vLLM read the names as numbers.

    Args:
        environ: The variables; not changed. Where they name no GPU by UUID, there is nothing to change.
        probe: The machine to look at; this one by default.

    Raises:
        ConfigurationError: If a name is of no GPU here, of several or of a part of one, or an index stands beside a
            UUID.
    """
    setting = f"{_CUDA_VISIBLE}={environ.get(_CUDA_VISIBLE)!r}"
    entries = [part.strip() for part in environ.get(_CUDA_VISIBLE, "").split(",") if part.strip()]
    numbers = [entry for entry in entries if re.fullmatch(r"-?[0-9]+", entry)]
    if len(numbers) == len(entries):
        return {}
    slices = [entry for entry in entries if entry.upper().startswith("MIG-")]
    if slices:
        raise ConfigurationError(
            f"{setting}: {slices[0]} is a part of a GPU, which vLLM cannot be shown by its UUID; show it whole GPUs"
        )
    if numbers:
        # An index counts in CUDA_DEVICE_ORDER, and CUDA takes one kind of name or the other.
        raise ConfigurationError(f"{setting} names GPUs both by index and by UUID; name all of them the same way")
    found, _ = _nvidia(probe or Probe())
    indices: list[str] = []
    for entry in entries:
        matches = [str(index) for index, one in enumerate(found) if one.uuid.lower().startswith(entry.lower())]
        if len(matches) != 1 or matches[0] in indices:
            what = "no GPU" if not matches else "a GPU twice" if len(matches) == 1 else "several GPUs"
            raise ConfigurationError(f"{setting}: {entry} names {what} of this machine, which has {_listed(found)}")
        indices += matches
    # The order in which the driver's tools count; CUDA's own begins with the fastest.
    return {_CUDA_VISIBLE: ",".join(indices), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def require_runnable(device: Device, probe: Probe | None = None) -> None:
    """Check that the installed vLLM can run on the devices.

    vLLM itself would only say that its device string is empty.

    Args:
        device: What :func:`detect` returned.
        probe: The machine to look at; this one by default.

    Raises:
        ConfigurationError: If the devices are the CPU, and vLLM is neither a build for it nor helped out by the
            CPU reference platform.
    """
    from roll_vllm import reference

    vllm = (probe or Probe()).installed()
    if vllm is None or vllm.cpu_build or device.backend != "cpu":
        return
    row = versions.resolve(vllm.version)
    build = f"the CPU build ({row.native.requirement})" if row and row.native else "a CPU build of vLLM"
    raise ConfigurationError(
        f"{vllm.distribution} {vllm.version} is not a build for the CPU, and no accelerator is used ({device.reason}); "
        f"install {build}, or set {reference.VARIABLE}=1 (in pytest: --vllm-backend cpu-reference) to run this one by "
        "the CPU reference platform, or make a device visible"
    )


def _best(probe: Probe) -> Device:
    cpu_build = _cpu_build(probe)
    if cpu_build:
        return _cpu(probe, cpu_build)
    looked = []
    for kind in _ACCELERATORS:
        found, why = _look(kind, probe)
        if found:
            return _device(kind, found, why)
        looked.append(f"no {kind} device ({why})")
    return _cpu(probe, ", ".join(looked))


def _reference(probe: Probe, why: str) -> Device:
    # The platform never takes the place of something real, so an engine would not run on what was asked for.
    from roll_vllm import reference

    remedy = f"unset {reference.VARIABLE} and choose 'auto'"
    cpu_build = _cpu_build(probe)
    if cpu_build:
        raise ConfigurationError(f"{why}, but {cpu_build}, which needs no reference platform; {remedy}")
    vllm = probe.installed()
    if vllm is not None and versions.resolve(vllm.version) is None:
        tested = ", ".join(row.release for row in versions.TESTED)
        raise ConfigurationError(f"{why}, but it does not know vLLM {vllm.version}; install one of: {tested}")
    best = _best(probe)
    if best.kind != "cpu":
        raise ConfigurationError(
            f"{why}, but a {best.kind} device is visible ({best.reason}); {remedy}, "
            f"or hide the device ({_ACCELERATORS[best.kind][-1][0]}='')"
        )
    return replace(best, reason=f"{why}; {best.reason}", backend="cpu-reference")


def _demand(kind: Kind, probe: Probe) -> Device:
    # vLLM's CPU builds decline every accelerator, and then fail with a message that does not say so.
    cpu_build = _cpu_build(probe)
    if cpu_build:
        raise ConfigurationError(
            f"device {kind!r} was requested, but {cpu_build}; choose 'cpu' or 'auto', "
            f"or install a build of vLLM for {kind}"
        )
    found, why = _look(kind, probe)
    if not found:
        raise ConfigurationError(
            f"device {kind!r} was requested, but none is visible: {why}; choose 'cpu' or 'auto', "
            f"or make the device visible (driver, container options, "
            f"{', '.join(name for group in _ACCELERATORS[kind] for name in group)})"
        )
    return _device(kind, found, why)


def _cpu_build(probe: Probe) -> str:
    """Say that the installed vLLM is a CPU build; empty if it is not."""
    vllm = probe.installed()
    if vllm is None or not vllm.cpu_build:
        return ""
    return f"the installed vLLM is a CPU build ({vllm.distribution} {vllm.version})"


@dataclass(frozen=True, eq=False)  # devices of one model are alike, and still not the same
class _Found:
    """One accelerator, visible or not."""

    name: str
    memory_bytes: int | None = None
    uuid: str = ""


def _device(kind: Kind, found: Sequence[_Found], reason: str) -> Device:
    return Device(kind, len(found), tuple(one.name for one in found), tuple(one.memory_bytes for one in found), reason)


def _look(kind: Kind, probe: Probe) -> tuple[list[_Found], str]:
    """Return the visible accelerators of a kind, and how that was found out."""
    filters = [
        next(((name, probe.environ[name]) for name in group if name in probe.environ), None)
        for group in _ACCELERATORS[kind]
    ]
    for setting in filters:
        if setting and setting[1].split(",")[0].strip() in ("", "-1"):
            return [], f"{setting[0]}={setting[1]!r} hides every device"
    found, why = {"cuda": _nvidia, "rocm": _amd, "npu": _ascend}[kind](probe)
    for setting in filters:
        if setting and found:
            before, found = found, _select(found, setting[1])
            why += f"; {setting[0]}={setting[1]!r} shows {len(found)} of {len(before)}"
            if not found and not setting[1].split(",")[0].strip().isdecimal():
                why += f" ({_listed(before)})"
    return found, why


def _listed(found: Sequence[_Found]) -> str:
    return ", ".join(f"{index}: {one.uuid or one.name}" for index, one in enumerate(found)) or "none"


def _select(found: Sequence[_Found], visible: str) -> list[_Found]:
    """Apply a visibility variable: indices or UUID prefixes, valid up to the first that names nothing."""
    chosen: list[_Found] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdecimal():
            matches = list(found[int(entry) : int(entry) + 1])
        elif entry.upper().startswith("MIG-"):
            # A slice of a GPU. The tools list whole GPUs, so its own memory stays unknown.
            matches = [_Found(f"{found[0].name} ({entry})", uuid=entry)]
        else:
            matches = [one for one in found if entry and one.uuid.lower().startswith(entry.lower())]
        if len(matches) != 1 or matches[0] in chosen:
            break
        chosen += matches
    return chosen


def _nvidia(probe: Probe) -> tuple[list[_Found], str]:
    listing = probe.run(["nvidia-smi", "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"])
    rows = [line.split(",") for line in (listing or "").splitlines()]
    found = [
        _Found(name.strip(), int(memory) * _MIB if memory.strip().isdecimal() else None, uuid.strip())
        for uuid, name, memory in (row for row in rows if len(row) == 3)
    ]
    if found:
        return found, f"nvidia-smi lists {len(found)}"
    # The driver shows all GPUs of the host even in a container that was given none: the device file decides.
    for path in probe.glob("proc/driver/nvidia/gpus/*/information"):
        facts = dict(re.findall(r"^([^:\n]+):[ \t]*(.*?)\s*$", probe.read(path), re.MULTILINE))
        if (probe.root / f"dev/nvidia{facts.get('Device Minor')}").exists():
            found.append(_Found(facts.get("Model", "NVIDIA GPU"), uuid=facts.get("GPU UUID", "")))
    if found:
        return found, f"/proc/driver/nvidia/gpus lists {len(found)}, nvidia-smi does not answer"
    return [], "nvidia-smi lists none, /proc/driver/nvidia/gpus has none with a device file"


def _amd(probe: Probe) -> tuple[list[_Found], str]:
    if not (probe.root / "dev/kfd").exists():
        return [], "no /dev/kfd"
    found = []
    for node in probe.glob("sys/class/kfd/kfd/topology/nodes/*"):
        # CPUs are nodes as well, without SIMD units; nodes of other containers cannot be read.
        facts = _numbers(probe.read(node / "properties"))
        if facts.get("simd_count"):
            banks = [_numbers(probe.read(bank)) for bank in node.glob("mem_banks/*/properties")]
            # heap types 1 and 2 are the device's own memory, host-visible and private
            memory = sum(bank.get("size_in_bytes", 0) for bank in banks if bank.get("heap_type") in (1, 2))
            name = probe.read(node / "name") or "AMD GPU"
            unique_id = facts.get("unique_id")
            uuid = f"GPU-{unique_id:016x}" if unique_id else ""
            found.append(_Found(name, memory or None, uuid))
    return found, f"/dev/kfd is there, /sys/class/kfd lists {len(found)}"


def _numbers(text: str) -> dict[str, int]:
    """Parse the ``name value`` lines of the AMD driver."""
    return {name: int(value) for name, value in re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE)}


def _ascend(probe: Probe) -> tuple[list[_Found], str]:
    found = [_Found("Ascend NPU") for _ in probe.glob("dev/davinci[0-9]*")]
    if not found:
        return [], "no /dev/davinci*"
    # npu-smi prints two table rows a chip: number and name, then used / total memory in MB at the end.
    table = probe.run(["npu-smi", "info"]) or ""
    names = re.findall(r"^\|\s*\d+\s+(\S+)\s*\|\s*[A-Za-z]+\s*\|", table, re.MULTILINE)
    memory = re.findall(r"^\|.*\|\s*[0-9A-Fa-f]{4}:[0-9A-Fa-f:.]+\s*\|.*/\s*(\d+)\s*\|$", table, re.MULTILINE)
    if len(names) == len(memory) == len(found):
        found = [_Found(name, int(total) * _MIB) for name, total in zip(names, memory, strict=True)]
    return found, f"/dev/davinci* lists {len(found)}"


def _cpu(probe: Probe, why: str) -> Device:
    model = re.search(r"^model name\s*:\s*(.+)$", probe.read("proc/cpuinfo"), re.MULTILINE)
    total = re.search(r"^MemTotal:\s*(\d+) kB$", probe.read("proc/meminfo"), re.MULTILINE)
    amounts = [int(total[1]) * 1024] if total else []
    # The limit of a container; "max" (version 2) or a number beyond all memory (version 1) mean none.
    for path in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = probe.read(path)
        if limit.isdecimal():
            amounts.append(int(limit))
    cores = probe.cores()
    name = f"{model[1] if model else 'CPU'} ({cores} core{'' if cores == 1 else 's'})"
    return Device("cpu", 1, (name,), (min(amounts, default=None),), why)
