"""One complete weight update, seen from the trainer: pack, send, confirm."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from roll_vllm import backends
from roll_vllm.errors import ConfigurationError, UnsupportedFeatureError
from roll_vllm.transfer.bucket import BucketSender, NamedTensors, items_of
from roll_vllm.transfer.collective import SETTINGS, CollectiveSender

if TYPE_CHECKING:
    from collections.abc import Awaitable

Sender = BucketSender | CollectiveSender

TRANSPORTS = ("bucket", "collective")


class Receiver(Protocol):
    """The part of the rollout engine that takes weights."""

    vllm_config: Any

    @property
    def generation(self) -> str:
        """The engine's generation, ``V0`` or ``V1``."""

    def update_parameter_in_bucket(self, serialized_named_tensors: Sequence[bytes]) -> Awaitable[None]:
        """Load one bucket."""

    def broadcast_parameter(
        self, names: Sequence[str], dtypes: Sequence[Any], shapes: Sequence[Sequence[int]], group_name: str
    ) -> Awaitable[None]:
        """Load broadcast tensors."""

    def setup_collective_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> Awaitable[None]:
        """Join a group."""

    def device_identities(self) -> Awaitable[list[str]]:
        """What names the device of each worker on this host."""

    def worker_environment(self, names: Sequence[str]) -> Awaitable[list[dict[str, str | None]]]:
        """The values of variables in each worker."""


class WeightUpdate:
    """Handed out by ``engine.weight_update()``; sends tensors and waits until the engine has them.

    Attributes:
        counts: after the block, how many tensors went by recorded route (``replayed``) and through vLLM's
            ``load_weights`` (``loaded``), on rank 0.
    """

    def __init__(self, engine: Receiver, sender: Sender) -> None:
        self._engine = engine
        self._sender = sender
        self.counts: dict[str, int] = {}

    async def send(self, named_tensors: NamedTensors) -> None:
        """Send checkpoint tensors; may be called several times, with any split of the set.

        Args:
            named_tensors: checkpoint names and tensors, in the dtype of the engine's parameters.

        Raises:
            WeightUpdateError: a name, dtype or shape does not fit.
        """
        if isinstance(self._sender, CollectiveSender):
            await self._broadcast(self._sender, named_tensors)
            return
        buckets = self._sender.payloads_for(named_tensors, await self._engine.device_identities())
        # Packing is one large copy; in a thread it leaves the event loop to the engine's outputs.
        while (payloads := await asyncio.to_thread(next, buckets, None)) is not None:
            await self._engine.update_parameter_in_bucket(payloads)

    async def _broadcast(self, sender: CollectiveSender, named_tensors: NamedTensors) -> None:
        pairs = list(items_of(named_tensors))
        received = self._engine.broadcast_parameter(**sender.describe(pairs), group_name=sender.group_name)
        await _both(received, asyncio.to_thread(sender.send, pairs))


async def sender_for(engine: Receiver, transport: str, senders: dict[str, Sender]) -> Sender:
    """The engine's own sender for a transport, made on first use and kept in ``senders``.

    Raises:
        ConfigurationError: there is no such transport.
    """
    if transport not in TRANSPORTS:
        raise ConfigurationError(f"transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
    if transport not in senders:
        senders[transport] = BucketSender() if transport == "bucket" else await _local_group(engine)
    return senders[transport]


async def _local_group(engine: Receiver) -> CollectiveSender:
    """A group of this process and the engine's workers, over loopback."""
    if engine.generation == "V0":
        raise UnsupportedFeatureError(
            "the collective transport needs a trainer in another process: rank 0 of a V0 engine lives in this one, and "
            "torch keeps one process group of a name in a process; use transport='bucket' here"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world_size = 1 + engine.vllm_config.parallel_config.world_size
    name = f"roll_vllm-{uuid.uuid4().hex[:8]}"
    device = _spare_device(engine)
    communication = backends.of_torch(engine.vllm_config.device_config.device_type).communication
    backend = communication if device else "gloo"
    # What vLLM sets in its processes, such as NCCL_CUMEM_ENABLE=0 in 0.8.4, holds here too.
    (theirs, *_) = await engine.worker_environment(SETTINGS.get(backend, ()))
    variables = {name: value for name, value in theirs.items() if value is not None and name not in os.environ}
    joined = engine.setup_collective_group("127.0.0.1", port, 1, world_size, name, backend)
    joining = asyncio.to_thread(CollectiveSender, "127.0.0.1", port, world_size, name, backend, device, variables)
    _, sender = await _both(joined, joining)
    return sender


def _spare_device(engine: Receiver) -> str | None:
    """A device of this process beside those of the engine's workers, if there is one: NCCL takes one rank a device."""
    import torch

    kind, parallel = engine.vllm_config.device_config.device_type, engine.vllm_config.parallel_config
    # Multiprocessing workers have the first devices of this process, Ray's may have any.
    if kind == "cpu" or parallel.distributed_executor_backend == "ray":
        return None
    count = torch.get_device_module(kind).device_count()
    return f"{kind}:{parallel.world_size}" if count > parallel.world_size else None


async def _both(first: Any, second: Any) -> tuple[Any, Any]:
    """Run both ends; when one fails, still wait for the other, and raise the first end's error."""
    results = await asyncio.gather(first, second, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results[0], results[1]
