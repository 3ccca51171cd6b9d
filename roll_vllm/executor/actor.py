"""The process of one rank under Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from roll_vllm import backends, devices, environment
from roll_vllm.executor import cluster, stock, variables


class RollVllmRayWorker(stock.worker_wrapper()):  # type: ignore[misc]
    """vLLM's ``RayWorkerWrapper`` that sees its own device only, and runs without one, too.

    Args:
        device: what the caller wants it to see; None for what Ray assigned.
        resource: by which Ray counts the devices.
        visibility: the variables that show a process its devices.
        options: vLLM's own arguments.
    """

    def __init__(self, device: str | None, resource: str, visibility: Sequence[str], **options: Any) -> None:
        import ray

        assigned = ray.get_runtime_context().get_accelerator_ids().get(resource, [])
        self._roll_vllm_visibility = tuple(visibility)
        if visibility and (device is not None or assigned):
            # Ray does not do it where RAY_EXPERIMENTAL_NOSET_… forbids it, and shows what it assigned otherwise.
            shown = device if device is not None else ",".join(map(str, assigned))
            os.environ.update(dict.fromkeys(visibility, shown))
        if tuple(visibility) == backends.get("cuda").visibility[-1]:
            # Ray passes on what the node is shown, which may be UUIDs, and only here is it known what they name.
            os.environ.update(devices.by_index(os.environ))
        super().__init__(**options)

    def roll_vllm_describe(self) -> dict[str, Any]:
        """Where this process is; see :func:`.cluster.where`. ``port`` is free there."""
        return {**cluster.where(self._roll_vllm_visibility), "port": environment.free_port()}

    def roll_vllm_prepare(self, changes: Mapping[str, str]) -> None:
        """Set what could only be known here, and make the directories that the driver could not make here.

        Raises:
            ConfigurationError: this node has no room for them, or they cannot be written to.
        """
        os.environ.update(changes)
        for name in variables.OF_ONE_RANK:
            if os.environ.get(name):
                environment.ensure_cache_directory(Path(os.environ[name]))

    def setup_device_if_necessary(self) -> None:
        """As vLLM's, which knows no worker without a device."""
        self._mark_set_without_device()
        super().setup_device_if_necessary()

    def execute_model_spmd(self, request: Any) -> Any:
        """As vLLM's, on V0."""
        self._mark_set_without_device()
        return super().execute_model_spmd(request)

    def _mark_set_without_device(self) -> None:
        device = getattr(self.worker, "device", None)
        if device is None or device.type == "cpu":
            self.compiled_dag_cuda_device_set = True
