"""The checks, each a function from what was seen to its findings."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import roll_vllm
from roll_vllm import backends, devices, environment, reference, versions
from roll_vllm.doctor import install, symbols
from roll_vllm.doctor.diagnosis import Finding, Package, Seen, Status, asked_by, packages, split
from roll_vllm.doctor.machine import UNREADABLE
from roll_vllm.errors import ConfigurationError, UnsupportedFeatureError
from roll_vllm.patches import drift
from roll_vllm.patches.apply import selected
from roll_vllm.patches.patch import PatchError
from roll_vllm.patches.process import PLUGIN
from roll_vllm.patches.registry import PATCHES
from roll_vllm.patches.sources import NotFound, SourceTree
from roll_vllm.versions import Gap

_GENERAL, _PLATFORM = "vllm.general_plugins", "vllm.platform_plugins"
_PLATFORM_PLUGIN = "roll_vllm_cpu_reference"
_BUCKET = 256 * 2**20  # transfer.bucket.DEFAULT_BUCKET_BYTES, which cannot be had without torch
_ROOMY = 2**30


def _joined(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _tested_instead(seen: Seen) -> str:
    """Return the command that installs the newest tested release for the devices here."""
    machine = seen.machine
    backend = seen.device.backend if seen.device is not None else seen.backend
    row = install.tested(machine, backend)
    # Without one for this Python, that is what has to change first.
    return install.vllm(machine, row, backend) if row else install.python(versions.TESTED[-1].python)


# -- Python and vLLM --------------------------------------------------------------------------------------------


def python(seen: Seen) -> Iterator[Finding]:
    """Whether Python is one that the release has wheels for."""
    here = seen.machine.python
    if seen.row is not None:
        release, wanted = f"vLLM {seen.row.release}", seen.row.python
        if versions.satisfies(here, wanted):
            yield Finding("python", "ok", f"Python {here} is one of those of {release} ({wanted})")
        else:
            remedy = install.python(wanted)
            yield Finding("python", "problem", f"Python {here} is none of those of {release} ({wanted})", remedy)
        return
    good = [row.release for row in versions.TESTED if versions.satisfies(here, row.python)]
    if good:
        yield Finding("python", "ok", f"Python {here} is good for vLLM {_joined(good)}")
    else:
        remedy = install.python(versions.TESTED[-1].python)
        yield Finding("python", "problem", f"no tested release of vLLM has wheels for Python {here}", remedy)


def vllm(seen: Seen) -> Iterator[Finding]:
    """Which vLLM is installed, whether it is whole, and which row it is."""
    machine = seen.machine
    remedy = _tested_instead(seen)
    tested = ", ".join(one.release for one in versions.TESTED)
    place = machine.package("vllm")
    if seen.unreadable:
        yield Finding("vllm", "problem", seen.unreadable, remedy)
        return
    if seen.vllm is None:
        if place is None:
            yield Finding("vllm", "problem", f"vLLM is not installed here (tested: {tested})", remedy)
        else:
            message = f"the vllm in {place} is a path without metadata, so its version is unknown (tested: {tested})"
            yield Finding("vllm", "problem", message, remedy)
        return
    name, version = seen.vllm.distribution, seen.vllm.version
    other = machine.version("vllm")
    if place is None:
        message = f"there is metadata of {name} {version}, but no package vllm to import"
        yield Finding("vllm", "problem", message, install.again(machine, f"{name}=={version}"))
    elif name == "vllm" and machine.version("vllm-cpu") is not None:
        message = f"vllm {version} and vllm-cpu {machine.version('vllm-cpu')} share their files, and one is damaged"
        yield Finding("vllm", "problem", message, remedy)
    elif other == UNREADABLE and name != "vllm":
        yield Finding("vllm", "problem", f"the metadata of vllm beside {name} cannot be read", remedy)
    elif seen.row is None:
        message = f"ROLL is not tested on vllm version {version} (tested: {tested})"
        yield Finding("vllm", "warning", message, remedy)
    elif name == "vllm-cpu" and seen.route is None:
        native = seen.row.native
        known = f"the tested one is {native.requirement}" if native else f"no build of vllm-cpu {version} is tested"
        better = install.vllm(machine, seen.row, "cpu")
        yield Finding("vllm", "warning", f"{name} {version} is another build of {seen.row.release}: {known}", better)
    else:
        yield Finding("vllm", "ok", f"{name} {version} is the tested release {seen.row.release}")


def roll(seen: Seen) -> Iterator[Finding]:
    """Whether vLLM can find this package in the processes that it starts."""
    root = Path(roll_vllm.__file__).parents[1]
    checkout = (root / "pyproject.toml").is_file()
    what = ("--editable", str(root)) if checkout else ("pytest-roll-vllm",)
    remedy = install.packages(seen.machine, *what)
    try:
        missing = [
            f"{name} in {group}"
            for group, name in ((_GENERAL, PLUGIN), (_PLATFORM, _PLATFORM_PLUGIN))
            if name not in seen.machine.plugins(group)
        ]
    except Exception as error:  # what damaged metadata raises differs between releases of Python
        message = f"the entry points of this environment cannot be read ({type(error).__name__}: {error})"
        yield Finding("roll-vllm", "problem", message, remedy)
        return
    if not missing:
        yield Finding("roll-vllm", "ok", "this package is installed, and vLLM finds its entry points")
        return
    message = f"{root} is a path that is not installed: vLLM does not find the entry points {_joined(missing)}"
    status: Status = "problem" if seen.backend == reference.NAME else "warning"
    consequence = "so there is no reference platform" if status == "problem" else "so the patches come late"
    yield Finding("roll-vllm", status, f"{message}, {consequence}", remedy)


# -- what it stands on ------------------------------------------------------------------------------------------


def dependencies(seen: Seen) -> Iterator[Finding]:
    """Whether torch and the others are what the release needs."""
    if seen.vllm is None:
        return
    found = {name: package for name, package in packages(seen).items() if name != "ray"}
    fitting = []
    torch = found["torch"].version
    for name, package in found.items():
        if seen.machine.version(name) == UNREADABLE:
            remedy = install.again(seen.machine, *_exact(found, [name]))
            yield Finding(name, "problem", f"the metadata of {name} cannot be read", remedy)
            continue
        pair = asked_by(seen.machine, name).get("torch", ()) if name in ("torchvision", "torchaudio") else ()
        if package.version is not None and torch is not None and pair and not _fits(torch, pair):
            consequence = (
                "importing vLLM fails with 'operator torchvision::nms does not exist'"
                if name == "torchvision"
                else "importing it fails"
            )
            message = f"{name} {package.version} is built for torch {' or '.join(pair)}, and torch is {torch}"
            remedy = install.packages(seen.machine, *_torch_family(found))
            yield Finding(name, "problem", f"{message}: {consequence}", remedy)
        elif package.version is None and package.wanted:
            message = f"{name} is missing; {package.by} wants {_wanted(name, package)}"
            yield Finding(name, _severity(seen, name, None), message, _put_right(seen, found, name))
        elif package.version is not None and not _fits(package.version, package.wanted):
            message = f"{name} is {package.version}; {package.by} wants {_wanted(name, package)}"
            status = _severity(seen, name, package.version)
            yield Finding(name, status, message, _put_right(seen, found, name))
        elif package.version is not None:
            fitting.append(f"{name} {package.version}")
        elif name in ("torch", "transformers", "numpy"):
            yield Finding(name, "problem", f"{name} is missing", install.packages(seen.machine, name))
    if fitting:
        yield Finding("packages", "ok", f"{_joined(fitting)} {'fit' if len(fitting) > 1 else 'fits'}")


def _fits(version: str, specifiers: tuple[str, ...]) -> bool:
    try:
        return not specifiers or any(versions.satisfies(version, one) for one in specifiers)
    except ConfigurationError:  # not a version: a build of the user's own
        return False


def _wanted(name: str, package: Package) -> str:
    return " or ".join(dict.fromkeys(name + one for one in package.wanted))


def _severity(seen: Seen, name: str, version: str | None) -> Status:
    # Compiled against it, or known to break.
    if name in ("torch", "torchvision", "numpy") or (version is None and name in ("transformers", "vllm-ascend")):
        return "problem"
    if name == "setuptools":  # triton 3.2 imports it
        return "problem" if version is None else "warning"
    if name == "transformers" and seen.row is not None and version is not None:
        later = int(versions.base(seen.row.transformers).major) + 1
        return "problem" if versions.at_least(version, str(later)) else "warning"
    return "warning"


def _exact(found: dict[str, Package], names: list[str]) -> list[str]:
    return [name + next(iter(found[name].wanted), "") for name in names]


def _torch_family(found: dict[str, Package]) -> list[str]:
    names = [
        name
        for name in ("torch", "torchvision", "torchaudio")
        if name == "torch" or found[name].version or found[name].wanted
    ]
    return _exact(found, names)


def _put_right(seen: Seen, found: dict[str, Package], name: str) -> str:
    family = name in ("torch", "torchvision", "torchaudio")
    return install.packages(seen.machine, *(_torch_family(found) if family else _exact(found, [name])))


_LIBRARIES = {
    "libstdc++.so.6": "conda install --channel conda-forge libstdcxx  # or use a newer system",
    "libc.so.6": "getconf GNU_LIBC_VERSION  # a newer one comes only with a newer system, such as a container of it",
    "libnuma.so.1": "apt-get install --yes libnuma1  # Fedora: dnf install numactl-libs",
}


def libraries(seen: Seen) -> Iterator[Finding]:
    """Whether the system's libraries are new enough for vLLM's compiled code."""
    place = seen.machine.package("vllm")
    if place is None:
        return
    lacking: dict[str, tuple[str, str]] = {}
    read = []
    for path in sorted(place.glob("*.so")):
        try:
            tables = symbols.read(path)
        except (OSError, ValueError):
            continue
        read.append(path.name)
        for library in _LIBRARIES.keys() & tables.needed.keys():
            where, provided = _library(seen, library, tables.machine)
            missing = tables.needed[library] - provided
            if missing and where is None:
                lacking[library] = path.name, "it is not where it usually is"
            elif missing:
                lacking[library] = path.name, f"{where} lacks {_joined(sorted(missing))}"
    for library, (name, why) in sorted(lacking.items()):
        yield Finding(
            "libraries", "problem", f"vLLM's {name} needs {library}, and {why}", _another_build(seen, library)
        )
    if read and not lacking:
        message = f"the system's libraries have what vLLM's compiled code needs ({', '.join(read)})"
        yield Finding("libraries", "ok", message)


def _another_build(seen: Seen, library: str) -> str:
    """Another build if there is one that asks for less."""
    vllm = seen.vllm
    if library != "libnuma.so.1" and vllm is not None and vllm.distribution == "vllm-cpu" and seen.row is not None:
        if seen.route is None and seen.row.native:
            return install.vllm(seen.machine, seen.row, "cpu")
        return install.vllm(seen.machine, seen.row, reference.NAME)
    return _LIBRARIES[library]


def _library(seen: Seen, name: str, machine: int) -> tuple[Path | None, frozenset[str]]:
    """The library that the loader would take, and the versions that it has."""
    probe = seen.machine.probe
    prefix = seen.machine.prefix
    directories = [Path(one) for one in probe.environ.get("LD_LIBRARY_PATH", "").split(":") if one]
    if (prefix / "conda-meta").is_dir():  # its Python looks there first
        directories.append(prefix / "lib")
    for pattern in ("usr/lib/*-linux-gnu*", "lib/*-linux-gnu*", "usr/lib64", "lib64", "usr/lib", "lib"):
        directories += probe.glob(pattern)
    for path in (directory / name for directory in directories):
        try:
            tables = symbols.read(path)
        except (OSError, ValueError):
            continue
        if tables.machine == machine:
            return path, tables.provided
    return None, frozenset()


# -- where it runs ----------------------------------------------------------------------------------------------


def backend(seen: Seen) -> Iterator[Finding]:
    """Which backend, why, and whether the installed vLLM runs on it."""
    probe, device, row = seen.machine.probe, seen.device, seen.row
    value = probe.environ.get(reference.VARIABLE, "")
    if value not in ("", "0", "1"):
        message = f"{reference.VARIABLE}={value!r} has no effect, only 1 has"
        yield Finding("backend", "warning", message, f"export {reference.VARIABLE}=1  # or: unset {reference.VARIABLE}")
    if device is None:
        unknown = seen.vllm is not None and row is None and not seen.vllm.cpu_build
        remedy = _tested_instead(seen) if unknown else f"unset {reference.VARIABLE}"
        yield Finding("backend", "problem", seen.contradiction, remedy)
        return
    names, hidden = _hidden(seen)
    setting = _joined([f"{name}={probe.environ[name]!r}" for name in names])
    hiding = f"{setting} hides {hidden.count} of kind {hidden.kind}" if hidden else ""
    try:
        devices.require_runnable(device, probe)
    except ConfigurationError as error:
        message = str(error)
        remedy = f"export {reference.VARIABLE}=1" if row is not None else _tested_instead(seen)
        if hidden is not None:
            message = f"{hiding}, and {message.partition(' (')[0]}"
            remedy = f"unset {' '.join(names)}  # or: export {reference.VARIABLE}=1"
        yield Finding("backend", "problem", message, remedy)
        return
    evidence = f" ({backends.get(device.backend).verified(seen.vllm.version)})" if seen.vllm else ""
    listed = ", ".join(dict.fromkeys(device.names))
    message = f"{device.backend}{evidence}, {device.count} x {listed}, because {device.reason}"
    if hidden is not None and seen.vllm is None and device.backend != reference.NAME:
        yield Finding("backend", "warning", f"{message}; {hiding}", f"unset {' '.join(names)}")
    else:
        yield Finding("backend", "ok", message)


def _hidden(seen: Seen) -> tuple[list[str], devices.Device | None]:
    """The visibility variables, and the devices that there would be without them; ``None`` if they hide none."""
    probe = seen.machine.probe
    every = {name for one in backends.BACKENDS.values() for group in one.visibility for name in group}
    names = sorted(every & probe.environ.keys())
    if not names or seen.device is None or seen.device.kind != "cpu" or (seen.vllm and seen.vllm.cpu_build):
        return names, None
    environ = {key: value for key, value in probe.environ.items() if key not in {*names, reference.VARIABLE}}
    found = devices.detect(probe=replace(probe, environ=environ))
    return names, found if found.kind != "cpu" else None


def engine(seen: Seen) -> Iterator[Finding]:
    """Which engine generation starts, and whether ``VLLM_USE_V1`` can have its way."""
    if seen.vllm is None:
        return
    asked = seen.machine.probe.environ.get("VLLM_USE_V1", "")
    try:
        generation = environment.engine_generation(seen.vllm.version, seen.backend, seen.machine.probe.environ)
    except ConfigurationError as error:
        yield Finding("engine", "problem", str(error), "unset VLLM_USE_V1")
        return
    having = " and ".join(backends.get(seen.backend).engines(seen.vllm.version))
    why = f"VLLM_USE_V1={asked}" if asked.strip() else "VLLM_USE_V1 is not set"
    yield Finding("engine", "ok", f"{generation} starts ({why}); there is {having}")


def plugins(seen: Seen) -> Iterator[Finding]:
    """Whether ``VLLM_PLUGINS`` lets the plugins in that are needed here."""
    allowed = seen.machine.probe.environ.get("VLLM_PLUGINS")
    needed = [PLUGIN, *([_PLATFORM_PLUGIN] if seen.backend == reference.NAME else [])]
    needed += ["ascend"] if seen.backend == "npu" else []
    missing = [] if allowed is None else [name for name in needed if name not in allowed.split(",")]
    if missing:
        everything = [name for name in (allowed or "").split(",") if name] + missing
        remedy = f"export VLLM_PLUGINS={shlex.quote(','.join(everything))}  # or: unset VLLM_PLUGINS"
        yield Finding("plugins", "problem", f"VLLM_PLUGINS={allowed!r} keeps {_joined(missing)} out", remedy)
    elif allowed is not None:
        yield Finding("plugins", "ok", f"VLLM_PLUGINS={allowed!r} lets {_joined(needed)} in")


_EXPANDABLE = re.compile(r"expandable\W?_?segments[\"'\s]*[:=][\"'\s]*true", re.IGNORECASE)


def allocator(seen: Seen) -> Iterator[Finding]:
    """Whether the allocator's variables ask for expandable segments, which the memory pool of sleep forbids."""
    environ = seen.machine.probe.environ
    names = [f"PYTORCH_{kind}ALLOC_CONF" for kind in ("CUDA_", "HIP_", "", "NPU_")]
    asking = [name for name in names if _EXPANDABLE.search(environ.get(name, ""))]
    if not asking:
        yield Finding("allocator", "ok", "no variable asks for expandable segments")
    elif seen.device is not None and seen.device.kind == "cpu":
        yield Finding("allocator", "ok", f"{_joined(asking)} asks for expandable segments, which a CPU does not have")
    else:
        commands = []
        for name in asking:
            kept = environment.without_expandable_segments(environ[name])
            commands.append(f"export {name}={shlex.quote(kept)}" if kept else f"unset {name}")
        message = (
            f"{_joined(asking)} asks for expandable segments, with which vLLM cannot sleep: engines turn them off for "
            "themselves, and a trainer that shares their process loses them"
        )
        yield Finding("allocator", "warning", message, "; ".join(commands))


# -- disk and memory --------------------------------------------------------------------------------------------


def caches(seen: Seen) -> Iterator[Finding]:
    """Whether the cache directories can be written to."""
    # The engine's version and kind do not matter for where they are.
    environ = {key: value for key, value in seen.machine.probe.environ.items() if key != "VLLM_USE_V1"}
    chosen = environment.worker_environment(
        worker_name="doctor", device_kind="cpu", vllm_version=versions.TESTED[-1].release, port=None, environ=environ
    )
    places: dict[Path, str] = {}
    for variable in ("VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE"):
        places.setdefault(Path(chosen[variable]).parent, variable)
    good = []
    for directory, variable in places.items():
        remedy = f"export {variable}=/tmp/vllm-cache"
        if directory.parts[0] == "~":
            message = f"there is no home directory, so that the caches would go to {str(directory)!r} wherever one is"
            yield Finding("caches", "problem", message, remedy)
            continue
        existing = next(one for one in (directory, *directory.parents) if os.path.lexists(one))
        refusal = seen.machine.refusal(existing)
        if refusal:
            message = f"the cache directory {directory} cannot be written to ({existing}: {refusal})"
            yield Finding("caches", "problem", message, remedy)
        else:
            good.append(str(directory))
    if good:
        yield Finding("caches", "ok", f"{_joined(good)} can be written to")


def shared_memory(seen: Seen) -> Iterator[Finding]:
    """Whether there is room for weights on their way, and for the queues between vLLM's processes."""
    probe = seen.machine.probe
    chosen = probe.environ.get("ROLL_VLLM_SHM_DIR")
    directory = Path(chosen) if chosen else probe.root / "dev/shm"
    free = seen.machine.free(directory)
    remedy = f"mount -o remount,size=4G {directory}  # as root; docker run --shm-size=4g; or set ROLL_VLLM_SHM_DIR"
    if chosen:
        remedy = "unset ROLL_VLLM_SHM_DIR  # or name a directory with more room, in memory"
    if free is None:
        message = f"there is no {directory}" + ("" if chosen else ": weights travel through the temporary directory")
        if not chosen:
            remedy = f"mkdir -p {directory} && mount -t tmpfs -o size=4G tmpfs {directory}  # as root"
        yield Finding("shared memory", "problem" if chosen else "warning", message, remedy)
        return
    message = f"{directory} has {free / 2**20:.0f} MiB free"
    if free < _BUCKET:
        message += f", and the bucket that weights travel in takes {_BUCKET // 2**20} MiB"
        yield Finding("shared memory", "problem", message, remedy)
    elif free < _ROOMY:
        message += ", which is little for several ranks or engines"
        yield Finding("shared memory", "warning", message, remedy)
    else:
        yield Finding("shared memory", "ok", message)


# -- what this package adds -------------------------------------------------------------------------------------


def patch_states(seen: Seen) -> dict[str, str]:
    """What becomes of every patch for this version: ``applies``, ``not reviewed``, or why it does not fit."""
    if seen.vllm is None:
        return {}
    place = seen.machine.package("vllm")
    states = {}
    tree = SourceTree(place.parent) if place else None
    for patch in selected(PATCHES, seen.vllm.version):
        release = seen.row.release if seen.row else str(versions.base(seen.vllm.version))
        if not drift.known(patch, release, drift.recorded()):
            states[patch.name] = "not reviewed"
            continue
        try:
            if tree is None:
                raise NotFound("no package vllm")
            drift.check(patch, release, tree, drift.recorded())
            states[patch.name] = "applies"
        except (PatchError, NotFound, OSError, SyntaxError) as error:
            states[patch.name] = str(error)
    return states


def patches(seen: Seen) -> Iterator[Finding]:
    """Whether the patches fit the installed code."""
    if seen.vllm is None or seen.machine.package("vllm") is None:
        return
    states = patch_states(seen)
    name, version = seen.vllm.distribution, seen.vllm.version
    applying = [patch for patch, state in states.items() if state == "applies"]
    unknown = [patch for patch, state in states.items() if state == "not reviewed"]
    broken = {patch: state for patch, state in states.items() if state not in ("applies", "not reviewed")}
    if broken:
        message = f"none is applied, because of {len(broken)} that do not fit: {next(iter(broken.values()))}"
        yield Finding("patches", "problem", message, install.again(seen.machine, f"{name}=={version}"))
    elif applying:
        yield Finding("patches", "ok", f"{len(applying)} for {version}, all fit: {', '.join(applying)}")
    if unknown:
        message = f"not applied, because this release was not reviewed: {', '.join(unknown)}"
        yield Finding("patches", "warning", message, _tested_instead(seen))
    if not states:
        yield Finding("patches", "ok", f"there are none for {version}")


def ray(seen: Seen) -> Iterator[Finding]:
    """Whether the Ray executor is available."""
    if seen.vllm is None:
        return
    machine = seen.machine
    try:
        versions.require_ray_executor(seen.vllm.version)
    except UnsupportedFeatureError as error:
        yield Finding("ray", "warning", str(error), _tested_instead(seen))
        return
    assert seen.row is not None
    pins = dict(map(split, seen.row.reference.overrides))
    package = packages(seen)["ray"]
    remedy = install.packages(machine, f"ray{pins['ray']}")
    having = " and ".join(seen.row.ray)
    if package.version is None:
        yield Finding("ray", "warning", f"ray is missing, without which the Ray executor ({having}) is not", remedy)
    elif not _fits(package.version, package.wanted):
        message = f"ray is {package.version}; {package.by} wants {_wanted('ray', package)}"
        yield Finding("ray", "warning", message, remedy)
    else:
        yield Finding("ray", "ok", f"the Ray executor is there for {having}, with ray {package.version}")


def gaps_here(seen: Seen) -> tuple[Gap, ...]:
    """What the release cannot do on this backend with the engine that would start."""
    return tuple(
        gap
        for gap in (seen.row.gaps if seen.row else ())
        if seen.engine in gap.engines and (not gap.backends or seen.backend in gap.backends)
    )


def gaps(seen: Seen) -> Iterator[Finding]:
    """What the release is known not to do."""
    if seen.row is None or seen.engine is None:
        return
    here = gaps_here(seen)
    if not here:
        message = f"none is declared for vLLM {seen.row.release} with {seen.engine} on {seen.backend}"
        yield Finding("gaps", "ok", message)
    for gap in here:
        # A gap of one generation is no gap of the other.
        others = [one for one in seen.row.engines if one not in gap.engines]
        remedy = f"export VLLM_USE_V1={others[-1][1]}" if others else _tested_instead(seen)
        yield Finding("gaps", "warning", f"{gap.contract} cannot be kept: {gap.reason}", remedy)


CHECKS: tuple[Callable[[Seen], Iterator[Finding]], ...] = (
    python,
    vllm,
    roll,
    dependencies,
    libraries,
    backend,
    engine,
    plugins,
    allocator,
    caches,
    shared_memory,
    patches,
    ray,
    gaps,
)
"""All checks, in the order in which their problems should be solved."""
