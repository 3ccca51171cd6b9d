"""``create_async_llm``: from ROLL's arguments to a running rollout engine."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from roll_vllm import backends, devices, environment, scheduling, versions
from roll_vllm.engine import EngineOptions
from roll_vllm.errors import (
    OUT_OF_MEMORY_REMEDY,
    ConfigurationError,
    EngineOutOfMemoryError,
    RollVllmError,
    UnsupportedFeatureError,
)
from roll_vllm.patches import process

if TYPE_CHECKING:
    from roll_vllm.backends import Backend
    from roll_vllm.engine import RolloutEngine

logger = logging.getLogger(__name__)

ROLL_DEFAULTS: Mapping[str, Any] = {"gpu_memory_utilization": 0.8, "load_format": "dummy"}

_EXTENSION = "roll_vllm.worker.extension.RollVllmWorkerExtension"
_OUT_OF_MEMORY_SIGNS = ("out of memory", "No available memory", "MemoryError", "less than desired GPU memory")


async def create_async_llm(
    resource_placement_groups: Sequence[Any] | None = None,
    *,
    worker_name: str | None = None,
    allow_dummy_weights: bool = False,
    **engine_args: Any,
) -> RolloutEngine:
    """Start a rollout engine, with ROLL's signature and defaults.

    The defaults are ``gpu_memory_utilization`` 0.8, ``load_format="dummy"`` (the trainer sends the weights)
    and sleep mode on. Everything else is vLLM's, ``seed`` and ``enable_prefix_caching`` as given. The caller's
    environment is the same afterwards; the engine's processes get their own, see :mod:`roll_vllm.environment`.

    Args:
        resource_placement_groups: for the Ray executor, which is not in this release; None or empty for the
            single-host executors.
        worker_name: names the worker's cache directories, so that the next start finds them warm;
            by default ``$WORKER_NAME``. Two engines that run at once need two names.
        allow_dummy_weights: let an engine with dummy weights generate before its first weight update.
        engine_args: fields of vLLM's ``AsyncEngineArgs``.

    Returns:
        The running engine.

    Raises:
        ConfigurationError: an argument cannot work.
        UnsupportedFeatureError: the feature is not in this release, or not on this vLLM version.
        EngineOutOfMemoryError: the device has too little memory.
    """
    installed = versions.installed()
    if installed is None:
        raise ConfigurationError("vLLM is not installed here; install one of the tested versions, e.g. vllm==0.12.0")
    versions.warn_if_untested(installed.version, logger)
    if resource_placement_groups or engine_args.get("distributed_executor_backend") == "ray":
        versions.require_ray_executor(installed.version)
        raise UnsupportedFeatureError(
            "ROLL does not support using ray distributed executor in this release of roll_vllm; leave out "
            "resource_placement_groups and use distributed_executor_backend='mp' or None"
        )
    device = devices.detect()
    devices.require_runnable(device)
    backend = backends.of(device)
    generation = environment.engine_generation(installed.version, backend.name, os.environ)
    arguments = _engine_arguments(engine_args, installed.version, backend, generation)
    changes: dict[str, str | None] = dict(
        environment.worker_environment(
            worker_name=worker_name if worker_name is not None else os.environ.get("WORKER_NAME"),
            device_kind=backend.name,
            vllm_version=installed.version,
            port=environment.free_port(),
            environ=os.environ,
            ranks=_ranks(arguments),
        )
    )
    caches = [Path(str(changes[name])) for name in ("VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE")]
    for directory in caches:
        environment.ensure_cache_directory(directory)
    records = Path(tempfile.mkdtemp(prefix="roll_vllm-records-"))
    changes[process.VARIABLE] = str(records)
    # A worker without a name has caches that nobody finds again.
    scratch = (*(directory for directory in caches if environment.is_unnamed(directory.name)), records)
    hold = _Hold(changes)
    try:
        with environment.left_as_found():
            # Inside, because importing vLLM sets variables too, and looks at VLLM_USE_V1.
            hold.patches()
            backend.release_allocator(os.environ)
            options = EngineOptions(allow_dummy_weights, scratch, records, hold.release)
            engine = await _start(generation, arguments, options)
    except BaseException:
        hold.release()
        for directory in scratch:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    if generation == "V1":  # a V0 engine goes on reading the variables, in this process
        hold.variables.restore()
    return engine


class _Hold:
    """What an engine changes in this process, until it is released: the variables, and the patches."""

    _engines: ClassVar[int] = 0

    def __init__(self, changes: Mapping[str, str | None]) -> None:
        self.variables = environment.AppliedEnvironment(changes).apply()
        self._patched = False

    def patches(self) -> None:
        """Apply the patches; they go when the last engine of this process does."""
        _Hold._engines += 1
        self._patched = True
        process.apply_here("parent")

    def release(self) -> None:
        """Put everything back; may be repeated."""
        self.variables.restore()
        if self._patched:
            self._patched = False
            _Hold._engines -= 1
            if not _Hold._engines:
                process.undo_here()


async def _start(generation: str, arguments: dict[str, Any], options: EngineOptions) -> RolloutEngine:
    """Start the engine in the environment as it is."""
    checked = _checked(arguments)
    kind: type[RolloutEngine]
    if generation == "V1":
        from roll_vllm.frontends.v1 import RolloutEngineV1 as kind
    else:
        from roll_vllm.frontends.v0 import RolloutEngineV0 as kind
    try:
        return await kind.start(checked, options)
    except RollVllmError:
        raise
    except Exception as error:
        if any(sign in str(error) for sign in _OUT_OF_MEMORY_SIGNS):
            raise EngineOutOfMemoryError(f"the engine could not start: {error}. {OUT_OF_MEMORY_REMEDY}") from error
        raise


def _engine_arguments(given: Mapping[str, Any], vllm_version: str, backend: Backend, generation: str) -> dict[str, Any]:
    """ROLL's defaults, the caller's arguments, and what the runtime itself needs."""
    arguments = {**ROLL_DEFAULTS, "worker_extension_cls": _EXTENSION, **given}
    if given.get("enable_sleep_mode") is False:
        raise ConfigurationError("enable_sleep_mode=False: the rollout engine always has sleep mode; leave it out")
    arguments["enable_sleep_mode"] = backend.enable_sleep_mode(vllm_version, generation)
    if generation == "V1" and not given.get("scheduler_cls") and not given.get("async_scheduling"):
        arguments["scheduler_cls"] = scheduling.QUALNAME
    if arguments["worker_extension_cls"] != _EXTENSION:
        _check_extension(arguments["worker_extension_cls"])
    return arguments


def _ranks(arguments: Mapping[str, Any]) -> int:
    return int(arguments.get("tensor_parallel_size", 1)) * int(arguments.get("pipeline_parallel_size", 1))


def _check_extension(qualname: Any) -> None:
    import pkgutil

    from roll_vllm.worker.extension import RollVllmWorkerExtension

    try:
        extension = pkgutil.resolve_name(qualname)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise ConfigurationError(f"worker_extension_cls {qualname!r} cannot be imported: {error}") from error
    if not (isinstance(extension, type) and issubclass(extension, RollVllmWorkerExtension)):
        raise ConfigurationError(
            f"worker_extension_cls {qualname!r} must derive from {_EXTENSION}, which the rollout engine needs"
        )


def _checked(arguments: dict[str, Any]) -> Any:
    """The arguments as vLLM's ``AsyncEngineArgs``; unknown names and unreadable models are one clear error."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigurationError(f"vLLM has no engine argument {name!r}{hint}")
    model = arguments.get("model")
    if not model:
        raise ConfigurationError("model is missing; give the path of a model directory or a model's name")
    path = Path(str(model)).expanduser()
    looks_local = path.is_absolute() or str(model).startswith((".", "~"))
    if looks_local and not (path / "config.json").is_file():
        raise ConfigurationError(f"the model {model} has no readable config.json; give the directory that holds it")
    if "disable_log_requests" in known:  # 0.8.4 would log every request; later ones do not
        arguments.setdefault("disable_log_requests", True)
    return AsyncEngineArgs(**arguments)
