"""vLLM 0.11.1: a worker that sees one GPU may be one of several, as under Ray."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from roll_vllm.patches.patch import Patch


class _WithoutLocalWorld:
    """A parallel configuration that asks for no device of its host; otherwise the one it was made from."""

    local_world_size = 0

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def checked_where_ranks_share(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Worker.init_device`` that counts visible devices only where 0.12.0 does."""

    @wraps(original)
    def init_device(self: Any) -> None:
        config = self.parallel_config
        ranks_share_devices = (
            config.data_parallel_size > 1
            and config.data_parallel_size_local > 0
            and config.distributed_executor_backend not in ("ray", "external_launcher")
            and config.data_parallel_backend != "ray"
            and config.nnodes_within_dp == 1
        )
        if ranks_share_devices:
            original(self)
            return
        # Only this method reads the configuration from the worker; everything it calls gets vllm_config's.
        self.parallel_config = _WithoutLocalWorld(config)
        try:
            original(self)
        finally:
            self.parallel_config = config

    return init_device


PATCHES = (
    Patch(
        name="one-visible-device",
        target="vllm.v1.worker.gpu_worker:Worker.init_device",
        versions=">=0.11.1,<0.12",
        replacement=checked_where_ranks_share,
        why="Every worker demands to see as many devices as its host has ranks, and Ray shows each worker one.",
        upstream="vllm/v1/worker/gpu_worker.py: the assertion stands under data parallelism in 0.12.0",
        remove_when="0.11.1 is no longer supported",
    ),
)
