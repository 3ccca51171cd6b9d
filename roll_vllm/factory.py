"""``create_async_llm``: from ROLL's arguments to a running rollout engine."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from roll_vllm import backends, devices, environment, failure, scheduling, versions
from roll_vllm.engine import EngineOptions
from roll_vllm.errors import ConfigurationError, RollVllmError, UnsupportedFeatureError
from roll_vllm.executor.placement import Placement, RankPlacement, parse
from roll_vllm.patches import process

if TYPE_CHECKING:
    from roll_vllm.backends import Backend
    from roll_vllm.engine import RolloutEngine

logger = logging.getLogger(__name__)

ROLL_DEFAULTS: Mapping[str, Any] = {"gpu_memory_utilization": 0.8, "load_format": "dummy"}

_EXTENSION = "roll_vllm.worker.extension.RollVllmWorkerExtension"


async def create_async_llm(
    resource_placement_groups: Sequence[Any] | None = None,
    *,
    worker_name: str | None = None,
    allow_dummy_weights: bool = False,
    **engine_args: Any,
) -> RolloutEngine:
    """Start a rollout engine, with ROLL's signature and defaults.

    The defaults are ``gpu_memory_utilization`` 0.8, ``load_format="dummy"`` (the trainer sends the weights)
    and sleep mode on. Without ``seed`` every engine draws one of its own, so that replicas sample different answers;
    under vLLM's own default, 0, all would give the same. Everything else is vLLM's. The caller's
    environment is the same afterwards; the engine's processes get their own, see :mod:`roll_vllm.environment`.

    Args:
        resource_placement_groups: where the ranks go, for the Ray executor: a list with one entry a rank, in rank
            order, each ROLL's mapping (``placement_group``, ``gpu_rank``, ``node_rank``, ``ray_address``; other keys
            are ignored, except ``bundle_index`` for a group of several bundles) or ``(placement_group,
            bundle_index)``. Ranks may share groups and bundles, and may span several. None or empty with
            ``distributed_executor_backend="ray"`` takes the current placement group, or makes one.
        worker_name: names the worker's cache directories, so that the next start finds them warm;
            by default ``$WORKER_NAME``. Two engines that run at once need two names.
        allow_dummy_weights: let an engine with dummy weights generate before its first weight update.
        engine_args: fields of vLLM's ``AsyncEngineArgs``. ``logprobs_mode`` is checked on every version; what the
            engine returns is ``engine.logprobs_mode``.

    Returns:
        The running engine.

    Raises:
        ConfigurationError: an argument cannot work.
        UnsupportedFeatureError: the feature is not in this release, or not on this vLLM version.
        EngineOutOfMemoryError: the device has too little memory.
        PlacementTimeoutError: Ray has no room for a placement group or a worker.
    """
    installed = versions.installed()
    if installed is None:
        raise ConfigurationError("vLLM is not installed here; install one of the tested versions, e.g. vllm==0.12.0")
    versions.warn_if_untested(installed.version, logger)
    _check_replicas(engine_args)
    under_ray = bool(resource_placement_groups) or engine_args.get("distributed_executor_backend") == "ray"
    if under_ray:
        _check_ray(installed.version, engine_args)
    unseeing = _hides_everything(os.environ) if under_ray else {}
    device = devices.detect(probe=devices.Probe(environ=_without(os.environ, unseeing)))
    devices.require_runnable(device)
    backend = backends.of(device)
    generation = environment.engine_generation(installed.version, backend.name, os.environ)
    arguments = _engine_arguments(engine_args, installed.version, backend, generation)
    if under_ray and generation == "V0" and int(arguments.get("pipeline_parallel_size") or 1) > 1:
        raise UnsupportedFeatureError(
            "pipeline_parallel_size > 1 under Ray is not in this release of roll_vllm for the V0 engine, which mixes "
            "up requests there; use the V1 engine (VLLM_USE_V1=1) or tensor_parallel_size"
        )
    placement = _placement(resource_placement_groups, _ranks(arguments), backend) if under_ray else None
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
    if placement is None and int(arguments.get("nnodes") or 1) == 1 and not arguments.get("data_parallel_address"):
        changes.update(environment.one_host_environment(os.environ))
    if placement is not None:
        changes.update(unseeing)
        changes.update(_ray_variables(installed.version, backend))
        arguments["distributed_executor_backend"] = "ray"
        # It looks at other ranks' devices, which a worker under Ray does not see.
        arguments.setdefault("disable_custom_all_reduce", True)
    # A worker without a name has caches that nobody finds again.
    scratch = (*(directory for directory in caches if environment.is_unnamed(directory.name)), records)
    hold = _Hold(changes)
    try:
        with environment.left_as_found():
            # Inside, because importing vLLM sets variables too, and looks at VLLM_USE_V1.
            hold.patches()
            backend.release_allocator(os.environ)
            options = EngineOptions(allow_dummy_weights, scratch, records, hold.release, placement)
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
        # What the engine core knew, vLLM does not pass on.
        left = failure.read(options.records)
        if left is not None and type(left) is not RollVllmError:
            raise left from error
        lack = failure.out_of_memory(error if left is None else RuntimeError(f"{error} {left}"))
        if lack is not None:
            raise lack from error
        if left is not None:
            raise RollVllmError(
                f"the engine could not start: {left}. Its processes logged the whole traceback above; "
                "`roll-vllm doctor` tells whether the installation is to blame"
            ) from error
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
    _check_logprobs_mode(arguments, vllm_version, generation)
    if given.get("speculative_config") and (generation == "V0" or backend.kind == "cpu"):
        why = "no speculative decoding on a CPU" if backend.kind == "cpu" else "no worker extension beside a V0 drafter"
        raise UnsupportedFeatureError(f"vLLM {vllm_version} has {why}; leave speculative_config out")
    if arguments.get("seed") is None:
        arguments["seed"] = _own_seed()
        logger.info("seed of this engine: %d", arguments["seed"])
    return arguments


def _own_seed() -> int:
    return secrets.randbelow(2**31)  # what torch and NumPy both take


def _check_logprobs_mode(arguments: dict[str, Any], vllm_version: str, generation: str) -> None:
    """Refuse a mode that the engine does not have; where it has one only, vLLM wants no argument."""
    only = "processed_logprobs" if generation == "V0" else "raw_logprobs"
    fixed = generation == "V0" or versions.satisfies(vllm_version, "<0.10")
    modes = (only,) if fixed else ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")
    asked = arguments.get("logprobs_mode")
    if asked is not None and getattr(asked, "value", asked) not in modes:
        raise ConfigurationError(
            f"logprobs_mode={getattr(asked, 'value', asked)!r}: the {generation} engine of vLLM {vllm_version} has "
            f"{', '.join(modes)}; ask for one of these, or leave it out and read engine.logprobs_mode"
        )
    if fixed or asked is None:
        arguments.pop("logprobs_mode", None)


def _check_replicas(engine_args: Mapping[str, Any]) -> None:
    """Refuse replicas inside one engine."""
    if int(engine_args.get("data_parallel_size") or 1) > 1:
        raise UnsupportedFeatureError(
            f"data_parallel_size={engine_args['data_parallel_size']}: replicas inside one engine are not in this "
            "release of roll_vllm, since vLLM passes on what the first of them answers, also where another has failed "
            "to load weights or to sleep; create one engine for each replica"
        )


def _check_ray(vllm_version: str, engine_args: Mapping[str, Any]) -> None:
    """Raise what stands against the Ray executor."""
    versions.require_ray_executor(vllm_version)
    asked = engine_args.get("distributed_executor_backend")
    if asked not in (None, "ray"):
        raise ConfigurationError(
            f"resource_placement_groups are for the Ray executor, and distributed_executor_backend is {asked!r}; leave "
            "one of them out"
        )
    if importlib.util.find_spec("ray") is None:
        raise ConfigurationError(
            "the Ray executor (resource_placement_groups) needs Ray, which is not installed here; "
            "pip install 'ray>=2.48'"
        )


def _hides_everything(environ: Mapping[str, str]) -> dict[str, None]:
    """The visibility variables that hide all devices, as Ray sets them for an actor that holds none.

    The driver needs no device, but vLLM takes such a variable for a machine that has none.
    """
    names = {name for backend in backends.BACKENDS.values() for group in backend.visibility for name in group}
    return {name: None for name in sorted(names) if environ.get(name) == ""}


def _without(environ: Mapping[str, str], names: Mapping[str, None]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def _placement(entries: Sequence[Any] | None, ranks: int, backend: Backend) -> Placement:
    import ray

    placed, address = parse(entries, ranks)
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        address = address or here
        group = None if placed else ray.util.get_current_placement_group()
        if group is not None:
            resource = backend.ray_resource
            fitting = [index for index, bundle in enumerate(group.bundle_specs) if bundle.get(resource)]
            if len(fitting) < ranks:
                raise ConfigurationError(
                    f"the current placement group has {len(fitting)} bundles with {resource} for {ranks} ranks; make a "
                    "larger one, or give resource_placement_groups"
                )
            placed = tuple(RankPlacement(group.id.hex(), index) for index in fitting[:ranks])
    return Placement(
        placed,
        address,
        backend.ray_resource,
        backend.visibility[-1] if backend.visibility else (),
        backend.ray_keeps_visibility,
        os.getpid(),
        backend.name == "cpu",
    )


def _ray_variables(vllm_version: str, backend: Backend) -> dict[str, str]:
    """What vLLM's Ray executor wants to find in the environment."""
    changes: dict[str, str] = {}
    if versions.satisfies(vllm_version, "<0.11.1"):
        # Rank 0 of a V0 engine would stay in this process otherwise.
        changes |= {"VLLM_USE_RAY_SPMD_WORKER": "1", "VLLM_USE_RAY_COMPILED_DAG": "1"}
    if backend.torch_device == "cpu":
        changes["VLLM_USE_RAY_COMPILED_DAG_CHANNEL_TYPE"] = "shm"
    return changes


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
