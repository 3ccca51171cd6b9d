"""The environment variables of one worker: computed by pure functions, applied and restored in one place."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from roll_vllm import backends, versions
from roll_vllm.errors import ConfigurationError

logger = logging.getLogger(__name__)

# In the order in which torch looks for them: it reads the first one that is set, even if empty.
_TORCH_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_ALLOCATOR_VARIABLES = (*_TORCH_VARIABLES, "PYTORCH_NPU_ALLOC_CONF")  # the last one is torch_npu's

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""The network interface that gloo listens on."""

LOOPBACK_INTERFACE = "lo"

ALLOCATOR_SETTING = "expandable_segments:False"
"""Turns expandable segments off in a process whose allocator is already running."""


def worker_environment(
    *,
    worker_name: str | None,
    device_kind: str,
    vllm_version: str,
    port: int | None,
    environ: Mapping[str, str],
    cache_home: Path | None = None,
    ranks: int = 1,
) -> dict[str, str]:
    """Compute the variables to set for one worker. Nothing is changed, here or in ``environ``.

    Args:
        worker_name: The worker's name. Equal names share their caches, which keeps a second start warm;
            without a name the worker gets caches of its own that nobody finds again.
        device_kind: The name of the backend, which for all but ``cpu-reference`` is the kind of device.
        vllm_version: The version of vLLM the worker runs.
        port: First port vLLM may use for itself; ``None`` leaves the choice to vLLM.
        environ: The variables the worker would have otherwise.
        cache_home: Stands in for ``XDG_CACHE_HOME``.
        ranks: How many workers the engine has on this machine, data-parallel ones included.

    Returns:
        The variables to set on top of ``environ``.

    Raises:
        ConfigurationError: If the port, the version or the backend is wrong, or ``VLLM_USE_V1`` asks for an engine
            that the version does not have there.
    """
    if port is not None and not 0 < port < 65536:
        raise ConfigurationError(f"port {port} is not between 1 and 65535; leave it out, or use free_port()")
    changes = backends.get(device_kind).worker_environment(vllm_version, environ, ranks)
    changes.update(_allocator_variables(environ))
    # Processes forked after CUDA was initialised cannot use it.
    changes["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    # On by default since 0.11.0, and hangs or fails at start where a process sees only some of the host's
    # GPUs, as a rollout worker does (vllm-project/vllm#38550).
    changes["VLLM_ALLREDUCE_USE_SYMM_MEM"] = "0"
    # Nothing of the runtime needs pickled calls.
    changes["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "0"
    cache, flashinfer = _cache_roots(worker_name, environ, cache_home)
    changes["VLLM_CACHE_ROOT"] = str(cache)
    changes["FLASHINFER_WORKSPACE_BASE"] = str(flashinfer)
    if port is not None:
        changes["VLLM_PORT"] = str(port)
    engine = engine_generation(vllm_version, device_kind, environ)
    if versions.satisfies(vllm_version, "<0.11.1"):  # the variable is gone since then
        changes["VLLM_USE_V1"] = "1" if engine == "V1" else "0"
    return changes


def one_host_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Compute the variables that keep what the processes of one host say to each other on that host.

    Args:
        environ: The variables the workers would have otherwise; what the user has set there stays.

    Returns:
        The variables to set on top of ``environ``.
    """
    wanted = {"VLLM_HOST_IP": "127.0.0.1"}
    if LOOPBACK_INTERFACE in (name for _, name in socket.if_nameindex()):
        wanted[GLOO_INTERFACE] = LOOPBACK_INTERFACE
    return {name: value for name, value in wanted.items() if not environ.get(name)}


def engine_generation(vllm_version: str, device_kind: str, environ: Mapping[str, str]) -> str:
    """Return which engine to start: ``V0`` or ``V1``.

    The user's ``VLLM_USE_V1`` decides. Without it, it is V1 where there is one, except on ROCm, where it is V0.

    Args:
        vllm_version: The version of vLLM.
        device_kind: The name of the backend, which for all but ``cpu-reference`` is the kind of device.
        environ: Where the user's variable is; empty counts as not set.

    Raises:
        ConfigurationError: If the version has no such engine on this backend, or an argument is malformed.
    """
    backend = backends.get(device_kind)
    asked = environ.get("VLLM_USE_V1", "").strip()
    if not asked:
        return backend.default_engine(vllm_version)
    if asked not in ("0", "1"):
        raise ConfigurationError(f"VLLM_USE_V1={asked!r} must be 0 or 1; unset it, or set it to one of these")
    engine = f"V{asked}"
    if engine not in backend.engines(vllm_version):
        raise ConfigurationError(backend.no_engine(vllm_version, engine))
    return engine


def _allocator_variables(environ: Mapping[str, str]) -> dict[str, str]:
    changes = {name: without_expandable_segments(environ[name]) for name in _ALLOCATOR_VARIABLES if name in environ}
    # Ray workers inherit the variables of the node, not of this process: an explicit empty value keeps
    # expandable segments from coming in that way. Where the user set another of the variables, it would
    # hide that one from torch.
    if not any(name in environ for name in _TORCH_VARIABLES):
        changes[_TORCH_VARIABLES[0]] = ""
    return changes


def without_expandable_segments(options: str) -> str:
    """Remove ``expandable_segments`` from torch allocator options; the others keep their text and order.

    vLLM's sleep mode manages memory in a pool that cannot be made of expandable segments
    (pytorch/pytorch#147851), and asserts on this option.
    """
    return ",".join(option for option in _split(options) if not _is_expandable_segments(option))


def _split(options: str) -> list[str]:
    """Split at commas outside of brackets; leave out what is empty."""
    parts = [""]
    depth = 0
    for character in options:
        depth += (character == "[") - (character == "]")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _is_expandable_segments(option: str) -> bool:
    key = re.split("[:=]", option, maxsplit=1)[0]
    # torch ignores whitespace anywhere; users also vary case, hyphens and quotes.
    return re.sub(r"[\W_]", "", key).lower() == "expandablesegments"


def allocator_setting(environ: Mapping[str, str] | None = None) -> str:
    """Return what to give to ``torch.cuda.memory._set_allocator_settings`` in a running process.

    torch resets every option that the setting does not name, so the user's own options are repeated.

    Args:
        environ: Where the user's options are; by default there are none to keep.
    """
    name = next((name for name in _ALLOCATOR_VARIABLES if name in (environ or {})), None)
    kept = without_expandable_segments(environ[name]) if environ and name else ""
    return f"{kept},{ALLOCATOR_SETTING}" if kept else ALLOCATOR_SETTING


def _cache_roots(worker_name: str | None, environ: Mapping[str, str], cache_home: Path | None) -> tuple[Path, Path]:
    """Return the worker's own cache directories for vLLM and for FlashInfer."""
    home = environ.get("HOME") or os.path.expanduser("~")

    def chosen(variable: str) -> Path | None:
        value = environ.get(variable)
        return Path(re.sub(r"^~(?=/|$)", lambda _: home, value)) if value else None

    own = worker_directory(worker_name)
    general = cache_home or chosen("XDG_CACHE_HOME") or Path(home, ".cache")
    vllm = (chosen("VLLM_CACHE_ROOT") or general / "vllm") / own
    flashinfer = chosen("FLASHINFER_WORKSPACE_BASE")
    return vllm, flashinfer / own if flashinfer else vllm


_UNNAMED = "unnamed."


def is_unnamed(directory: str) -> bool:
    """Whether :func:`worker_directory` gave this name to a worker without one."""
    return directory.startswith(_UNNAMED)


def worker_directory(worker_name: str | None) -> str:
    """Return the name of a worker's sub-directory: one path component, different for different names.

    Names of letters, digits, ``_`` and ``-`` stay as they are. Others are made safe and get a dot and a hash.
    A missing or blank name yields a new directory name at every call.
    """
    if worker_name is None or not worker_name.strip():
        # Process ids repeat across machines that share a file system.
        return f"{_UNNAMED}{os.getpid()}.{uuid.uuid4().hex}"
    if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", worker_name):
        return worker_name
    digest = hashlib.sha256(worker_name.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return re.sub(r"[^A-Za-z0-9_-]", "_", worker_name)[:80] + "." + digest


def ensure_cache_directory(path: Path) -> Path:
    """Create a cache directory and check that it can be written to.

    Raises:
        ConfigurationError: If it cannot, or there is no home directory that it could be in.
    """
    if path.parts[:1] == ("~",):
        raise ConfigurationError(
            f"there is no home directory for the caches of vLLM ({path}): set HOME, XDG_CACHE_HOME or VLLM_CACHE_ROOT "
            "to an absolute path"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell about read-only mounts and quotas; writing does.
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0")
    except OSError as error:
        raise ConfigurationError(
            f"cannot write to the cache directory {path} ({error.strerror}); set VLLM_CACHE_ROOT (and "
            "FLASHINFER_WORKSPACE_BASE, if you set it) to a directory that this user can write to"
        ) from error
    return path


def free_port() -> int:
    """Return a TCP port that is free now on all interfaces.

    It is not reserved: vLLM takes the next free one if somebody else is faster.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
        return port


class AppliedEnvironment:
    """Sets variables, and restores exactly what was there before.

    Use it as a context manager, or call :meth:`apply` and :meth:`restore`. Both may be repeated, from any
    thread. Several may be active at once, and end in any order: a variable that a later one also changed goes
    back when that one ends. A variable that somebody else has changed meanwhile is left alone.

    Args:
        changes: The variables to set, or with ``None`` to remove.
        environ: Where; ``os.environ`` by default.
    """

    # Shared by all instances, as the variables are.
    _lock = threading.RLock()
    _active: ClassVar[list[AppliedEnvironment]] = []  # oldest first

    def __init__(self, changes: Mapping[str, str | None], environ: MutableMapping[str, str] | None = None) -> None:
        self._environ = os.environ if environ is None else environ
        self._changes = dict(changes)
        self._before: dict[str, str | None] = {}

    def apply(self) -> AppliedEnvironment:
        """Set the variables: all of them, or if one is refused (such as for a null byte) none."""
        with self._lock:
            if self not in self._active:
                self._active.append(self)
                try:
                    for name, value in self._changes.items():
                        before = self._environ.get(name)
                        _put(self._environ, name, value)
                        self._before[name] = before
                except BaseException:
                    self.restore()
                    raise
        return self

    def restore(self) -> None:
        """Put back what was there before."""
        with self._lock:
            if self not in self._active:
                return
            position = self._active.index(self)
            later = [other for other in self._active[position + 1 :] if other._environ is self._environ]
            self._active.remove(self)
            for name, before in self._before.items():
                heir = next((other for other in later if name in other._before), None)
                current = heir._before[name] if heir else self._environ.get(name)
                if current != self._changes[name]:
                    logger.warning("%s was changed by somebody else; leaving it as it is", name)
                elif heir:
                    heir._before[name] = before
                else:
                    _put(self._environ, name, before)
            self._before = {}

    def __enter__(self) -> AppliedEnvironment:
        return self.apply()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def _put(environ: MutableMapping[str, str], name: str, value: str | None) -> None:
    if value is None:
        environ.pop(name, None)
    else:
        environ[name] = value


@contextmanager
def left_as_found(environ: MutableMapping[str, str] | None = None) -> Iterator[None]:
    """Undo every change that the code in the block makes to the variables, such as vLLM's own settings."""
    environ = os.environ if environ is None else environ
    before = dict(environ)
    try:
        yield
    finally:
        for name in before.keys() | set(environ):
            if environ.get(name) != before.get(name):
                _put(environ, name, before.get(name))
