"""The Ray executor on placement groups of the caller's.

vLLM's own executor takes one placement group, puts its ranks in an order of its own, needs a device where the driver
is, gives all workers the driver's variables, and leaves workers alive that never ran a step. What runs a step, a
compiled graph, is vLLM's.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from roll_vllm import failure
from roll_vllm.errors import ConfigurationError, EngineDiedError, PlacementTimeoutError, RollVllmError
from roll_vllm.executor import cluster, stock
from roll_vllm.executor.actor import RollVllmRayWorker
from roll_vllm.executor.cluster import BUNDLE_VARIABLE, Bundle
from roll_vllm.executor.placement import Placement, RankPlacement
from roll_vllm.executor.variables import rank_environment, share_of_device
from roll_vllm.patches import process
from roll_vllm.worker.lifeline import watch_parent

logger = logging.getLogger(__name__)

#: Seconds that a worker may take to import vLLM; longer on cold file systems.
_START_S = 600.0
_POLL_S = 0.2
#: How long to wait for the watch to name a death that is certain, or possible.
_DEATH_S, _PEER_S = 5.0, 1.0


class _InFlight(Future):  # type: ignore[type-arg]
    """A step's result that may be waited for more than once."""

    def __init__(self, step: Any, guard: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self._step: Any = step
        self._guard = guard

    def result(self, timeout: float | None = None) -> Any:
        if self._step is not None:
            step, self._step = self._step, None
            try:
                with self._guard():
                    self.set_result(step.result())
            except BaseException as error:
                self.set_exception(error)
        return super().result(timeout)


class PlacedRayExecutor:
    """What the executors of all versions and engine generations share; stands in front of vLLM's."""

    # What vLLM's executor has.
    vllm_config: Any
    parallel_config: Any
    workers: list[Any]
    pp_tp_workers: list[list[Any]]
    forward_dag: Any

    _ended = True  # until there is something to end
    _own_group: Any = None
    _connected = False
    _deaths: _Deaths | None = None
    _steps: list[_InFlight]

    def _init_executor(self) -> None:
        placement: Placement = self.parallel_config.placement_group
        self._ended = False
        self.forward_dag = None
        self.workers, self.pp_tp_workers, self._steps = [], [], []
        self.driver_dummy_worker = None  # every rank is an actor
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if placement.frontend != os.getpid():
            watch_parent()
        try:
            self._connected = cluster.connect(placement.address)
            self._start_workers(placement)
        except BaseException as error:
            self._tell(error)
            self.shutdown()
            raise
        self._stock_state()

    def _stock_state(self) -> None:
        """What vLLM's ``_init_executor`` would leave behind."""
        config = self.vllm_config
        self.has_connector = config.kv_transfer_config is not None
        if stock.ONE_ENGINE:
            ec = getattr(config, "ec_transfer_config", None)
            self.uses_sampler = config.model_config.runner_type != "pooling" and (ec is None or not ec.is_ec_producer)
            self.scheduler_output = None
            return
        from vllm import envs

        self.use_ray_compiled_dag = self.use_ray_spmd_worker = True
        self.use_v1 = envs.VLLM_USE_V1
        self.pp_locks = None
        with suppress(ImportError):  # 0.10.2 makes it here, later ones in their base class
            from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator

            self.kv_output_aggregator = KVOutputAggregator(self.parallel_config.world_size)

    # -- start ----------------------------------------------------------------------------------------------

    def _start_workers(self, placement: Placement) -> None:
        world_size = self.parallel_config.world_size
        share = share_of_device(os.environ)
        ranks = placement.ranks
        if not ranks:
            self._own_group = cluster.own_group(world_size, placement.resource)
            identity = self._own_group.id.hex()
            ranks = tuple(RankPlacement(identity, index) for index in range(world_size))
        self._bundles = cluster.bundles(ranks, placement.resource, share)
        self.workers = [self._actor(rank, bundle, placement, share) for rank, bundle in enumerate(self._bundles)]
        self._deaths = _Deaths(self.workers, self._bundles, self._died)
        places = self._started()
        self._check_places(places, placement)
        self._deaths.places = places
        self.collective_rpc("init_worker", args=(self._worker_arguments(places, placement),))
        self.collective_rpc("init_device")
        self.collective_rpc("load_model")
        width = self.parallel_config.tensor_parallel_size
        self.pp_tp_workers = [self.workers[first : first + width] for first in range(0, world_size, width)]

    def _actor(self, rank: int, bundle: Bundle, placement: Placement, share: float) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        variables = rank_environment(rank, os.environ, placement.visibility)
        variables[BUNDLE_VARIABLE] = str(bundle.index)
        if bundle.device is not None:
            variables.update(dict.fromkeys(placement.visibility, bundle.device))
            if placement.keep_visibility:
                variables[placement.keep_visibility] = "1"
        amount = cluster.share_of(bundle, placement.resource, share)
        asked: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0}
        if placement.resource in ("CPU", "GPU"):
            asked[f"num_{placement.resource.lower()}s"] = amount
        else:
            asked["resources"] = {placement.resource: amount}
        where = PlacementGroupSchedulingStrategy(
            placement_group=bundle.group, placement_group_bundle_index=bundle.index
        )
        # An actor that came back would have neither a model nor its place in the process groups.
        kind = ray.remote(
            max_restarts=0, scheduling_strategy=where, runtime_env={"env_vars": variables}, **asked
        )(RollVllmRayWorker)  # fmt: skip
        return kind.remote(
            bundle.device, placement.resource, placement.visibility, vllm_config=self.vllm_config, rpc_rank=rank
        )

    def _started(self) -> list[dict[str, Any]]:
        """Where the workers are, once they are up."""
        import ray

        refs = [worker.execute_method.remote("roll_vllm_describe") for worker in self.workers]
        try:
            return list(self._get(refs, _START_S))
        except ray.exceptions.GetTimeoutError as error:
            late = [rank for rank, ref in enumerate(refs) if not ray.wait([ref], timeout=0)[0]]
            raise PlacementTimeoutError(
                f"the workers of ranks {late} did not start within {_START_S:g} s on "
                f"{', '.join(str(self._bundles[rank]) for rank in late)}; look at their logs on these nodes"
            ) from error

    def _check_places(self, places: Sequence[Mapping[str, Any]], placement: Placement) -> None:
        for rank, (place, bundle) in enumerate(zip(places, self._bundles, strict=True)):
            if place["node_id"] != bundle.node_id:
                raise RollVllmError(
                    f"rank {rank} runs on node {place['node_id']}, but {bundle} is on {bundle.node_id}: the group "
                    "moved while the engine started; create the engine again"
                )
        if placement.one_host and len({place["node_ip"] for place in places}) > 1:
            raise ConfigurationError(
                "the ranks of a CPU build of vLLM talk through shared memory, and these are on several hosts: "
                f"{sorted({place['node_ip'] for place in places})}; give bundles of one host"
            )
        seen: dict[tuple[str, str], int] = {}
        for rank, place in enumerate(places if placement.visibility else ()):
            if len(place["devices"]) != 1:
                raise ConfigurationError(
                    f"rank {rank} sees the devices {place['devices']} on {self._bundles[rank]}, and one is wanted; "
                    "give each rank a bundle with one device, or name its device by 'gpu_rank'"
                )
            first = seen.setdefault((place["node_id"], place["devices"][0]), rank)
            if first != rank:
                raise ConfigurationError(
                    f"ranks {first} and {rank} share device {place['devices'][0]} of node {place['node_ip']}; give "
                    "each a bundle of its own, or name its device by 'gpu_rank'"
                )

    def _worker_arguments(self, places: Sequence[Mapping[str, Any]], placement: Placement) -> list[dict[str, Any]]:
        """The arguments of vLLM's ``init_worker``, by rank; also sets what a worker's variables lack."""
        prepared = [
            worker.execute_method.remote("roll_vllm_prepare", {"VLLM_PORT": str(place["port"])})
            for worker, place in zip(self.workers, places, strict=True)
        ]
        self._get(prepared, _START_S)
        # Rank 0 opens the store that all others connect to, wherever it is.
        one_node = len({place["node_id"] for place in places}) == 1
        host = "127.0.0.1" if one_node else places[0]["node_ip"]
        port = self.workers[0].execute_method.remote("roll_vllm_describe")
        method = f"tcp://{f'[{host}]' if ':' in host else host}:{self._get([port], _START_S)[0]['port']}"
        width = self.parallel_config.tensor_parallel_size
        return [
            {
                "vllm_config": self.vllm_config,
                # A worker sees one device, which is its first; on CPU it is the number on its host.
                "local_rank": 0 if placement.visibility else _local_rank(places, rank),
                "rank": rank,
                "distributed_init_method": method,
                "is_driver_worker": rank % width == 0,
            }
            for rank in range(len(places))
        ]

    # -- calls ----------------------------------------------------------------------------------------------

    def collective_rpc(
        self, method: Any, timeout: float | None = None, args: Any = (), kwargs: Any = None, non_block: bool = False
    ) -> Any:
        """As vLLM's: one result a rank, in rank order. Steps in flight are over before a worker begins."""
        self._finish_steps()
        if non_block:
            return super().collective_rpc(method, timeout, args, kwargs, non_block=True)  # type: ignore[misc]
        if not isinstance(method, str):
            import cloudpickle

            method = cloudpickle.dumps(method)
        refs = [worker.execute_method.remote(method, *args, **(kwargs or {})) for worker in self.workers]
        return self._get(refs, timeout)

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's."""
        with self._deaths_named():
            return self._step(super().execute_model(*args, **kwargs))  # type: ignore[misc]

    def _step(self, result: Any) -> Any:
        """Remember a step that is still running."""
        if type(result).__name__ != "FutureWrapper":
            return result
        step = _InFlight(result, self._deaths_named)
        self._steps = [*(running for running in self._steps if not running.done()), step]
        return step

    def _finish_steps(self) -> None:
        # Ray runs the compiled graph on a thread of the worker's own, so a call would meet a running step.
        steps, self._steps = self._steps, []
        for step in steps:
            with suppress(Exception):  # whoever asked for the step gets it
                step.result()

    def _compiled_ray_dag(self, *args: Any, **kwargs: Any) -> Any:
        # vLLM's CPU platform makes it "mp" again whenever the engine core lets it look at the configuration.
        self.parallel_config.distributed_executor_backend = "ray"
        return super()._compiled_ray_dag(*args, **kwargs)  # type: ignore[misc]

    def _get(self, refs: Sequence[Any], timeout: float | None) -> Any:
        import ray

        with self._deaths_named():
            return ray.get(list(refs), timeout=timeout)

    @contextmanager
    def _deaths_named(self) -> Iterator[None]:
        """Let the watch say whose death an error of Ray's is: Ray names an actor, or a channel that was closed."""
        import ray

        try:
            yield
        except (ray.exceptions.RayActorError, ray.exceptions.RaySystemError, ray.exceptions.RayTaskError) as error:
            # What a rank raises may come of another one's death: a peer that hung up.
            patience = _PEER_S if isinstance(error, ray.exceptions.RayTaskError) else _DEATH_S
            named = self._deaths.wait(patience) if self._deaths else None
            if named is not None:
                raise named from error
            raise

    def check_health(self) -> None:
        """Raise what a worker died of."""
        if self._deaths is not None and self._deaths.error is not None:
            raise self._deaths.error

    # -- end ------------------------------------------------------------------------------------------------

    def _died(self, error: EngineDiedError) -> None:
        """A worker is gone: say so, and let nothing wait for it."""
        logger.error("%s", error)
        self._tell(error)
        for worker in self.workers:
            _kill(worker)

    def _tell(self, error: BaseException) -> None:
        directory = os.environ.get(process.VARIABLE)
        if directory and Path(directory).is_dir():
            error = getattr(error, "cause", None) or error  # what a worker raises has Ray's traceback for a message
            known = error if isinstance(error, RollVllmError) else RollVllmError(f"{type(error).__name__}: {error}")
            failure.leave(directory, known)

    def shutdown(self) -> None:
        """End every worker, whether it ever ran a step or not, and give back what this executor took."""
        if self._ended:
            return
        self._ended = True
        import ray

        if self._deaths is not None:
            self._deaths.close()
        if not ray.is_initialized():
            return
        if self.forward_dag is not None:
            graph, self.forward_dag = self.forward_dag, None
            with suppress(Exception):
                graph.teardown()
        for worker in self.workers:
            _kill(worker)
        if self._own_group is not None:
            with suppress(Exception):
                ray.util.remove_placement_group(self._own_group)
        if self._connected:
            ray.shutdown()

    def __del__(self) -> None:
        self.shutdown()


class _Deaths(threading.Thread):
    """Watches the actors; the first one that dies is reported, with its rank, node and cause."""

    def __init__(self, workers: Sequence[Any], bundles: Sequence[Bundle], report: Any) -> None:
        super().__init__(name="roll_vllm-deaths", daemon=True)
        self.places: Sequence[Mapping[str, Any]] = ()
        self.error: EngineDiedError | None = None
        self._workers, self._bundles, self._report = list(workers), list(bundles), report
        self._closed, self._found = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        from ray.core.generated.gcs_pb2 import ActorTableData

        while not self._closed.wait(_POLL_S):
            for rank, worker in enumerate(self._workers):
                if worker._get_local_state() == ActorTableData.DEAD and not self._closed.is_set():
                    self.error = self._describe(rank, worker)
                    self._report(self.error)
                    self._found.set()
                    return

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def wait(self, seconds: float) -> EngineDiedError | None:
        """What died; it may take the watch a moment longer than a caller to notice."""
        self._found.wait(seconds)
        return self.error

    def _describe(self, rank: int, worker: Any) -> EngineDiedError:
        import ray

        try:
            ray.get(worker.execute_method.remote("roll_vllm_describe"), timeout=5)
            cause = "unknown"
        except Exception as error:
            cause = _cause(error)
        place = self.places[rank] if self.places else {}
        node = place.get("node_id") or self._bundles[rank].node_id
        host, pid = place.get("node_ip", "address unknown"), place.get("pid", "unknown")
        return EngineDiedError(
            f"rank {rank} on node {node} ({host}, pid {pid}) died: {cause}. Shut this engine down and create a new one"
        )


def _cause(error: Exception) -> str:
    """What Ray says of a death, without its ids and its general advice."""
    text = " ".join(str(error).split())
    detail = text.partition("The actor is dead because ")[2] or text
    return detail.partition(" Some common causes include")[0].rstrip(".")


def _local_rank(places: Sequence[Mapping[str, Any]], rank: int) -> int:
    node = places[rank]["node_id"]
    return sum(place["node_id"] == node for place in places[:rank])


def _kill(worker: Any) -> None:
    import ray

    with suppress(Exception):
        ray.kill(worker, no_restart=True)


class RayExecutorV1(PlacedRayExecutor, stock.executor("V1")):  # type: ignore[misc]
    """For the V1 engine."""

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, which has it from 0.11.1 on."""
        with self._deaths_named():
            return self._step(super().sample_tokens(*args, **kwargs))
