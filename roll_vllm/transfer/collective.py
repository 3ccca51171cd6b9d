"""The collective transport: a torch process group that the trainer (rank 0) and every worker join.

The group is made by the same torch helper, with the same group name, as ROLL's and OpenRLHF's trainers use,
so that either side can be theirs. It never becomes or touches the process's default group.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from roll_vllm.errors import ConfigurationError, WeightUpdateError
from roll_vllm.transfer.bucket import NamedTensors, items_of
from roll_vllm.transfer.manifest import TensorSpec, dtype_name

if TYPE_CHECKING:
    import torch

DEFAULT_TIMEOUT_S = 120.0


def timeout() -> timedelta:
    """How long a rank waits for the others: ``$ROLL_VLLM_COLLECTIVE_TIMEOUT`` seconds, else 120."""
    text = os.environ.get("ROLL_VLLM_COLLECTIVE_TIMEOUT", str(DEFAULT_TIMEOUT_S))
    try:
        limit = timedelta(seconds=float(text))
    except (ValueError, OverflowError):
        limit = timedelta(0)
    if limit <= timedelta(0):
        raise ConfigurationError(f"ROLL_VLLM_COLLECTIVE_TIMEOUT must be a positive number of seconds, got {text!r}")
    return limit


class CollectiveGroup:
    """One rank's membership in a transfer group.

    Args:
        master_address: host of rank 0, which listens.
        master_port: its TCP port.
        rank: this process's rank; 0 is the sender.
        world_size: number of ranks, the sender included.
        group_name: the same on every rank.
        backend: ``"gloo"`` on CPU, ``"nccl"`` on NVIDIA and AMD, ``"hccl"`` on Ascend.

    Raises:
        WeightUpdateError: the ranks did not meet in time, or torch cannot make such a group.
    """

    def __init__(
        self, master_address: str, master_port: int, rank: int, world_size: int, group_name: str, backend: str
    ) -> None:
        from torch.distributed import PrefixStore, distributed_c10d
        from torch.distributed.rendezvous import rendezvous

        limit = timeout()
        self.name, self.rank, self.world_size = group_name, rank, world_size
        url = f"tcp://{master_address}:{master_port}"
        try:
            store, _, _ = next(rendezvous(url, rank, world_size, timeout=limit))
            store.set_timeout(limit)
            self._group: Any
            self._group, _ = distributed_c10d._new_process_group_helper(
                world_size, rank, [], backend, PrefixStore(group_name, store), group_name, timeout=limit
            )
            # What torch's new_group() would note, and destroy_process_group() looks for.
            distributed_c10d._world.pg_group_ranks[self._group] = {each: each for each in range(world_size)}
        except Exception as error:
            raise WeightUpdateError(
                f"rank {rank} of {world_size} could not join collective group {group_name!r} at {url} with "
                f"{backend} within {limit.total_seconds():g} s: {error}. Start every rank with the same address, "
                "port, world_size, group_name and backend"
            ) from error

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Send the tensors from rank 0, or receive them in place on any other rank, in order.

        Raises:
            WeightUpdateError: a rank left or did not answer in time.
        """
        from torch.distributed import BroadcastOptions

        if self._group is None:
            raise WeightUpdateError(f"collective group {self.name!r} is closed; set up a new one")
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            for work in [self._group.broadcast([tensor], options) for tensor in tensors]:
                work.wait()
        except RuntimeError as error:
            raise WeightUpdateError(
                f"broadcast in collective group {self.name!r} failed on rank {self.rank}: {error}. The group is "
                "broken: set up a new one under another group_name, then send a full update"
            ) from error

    def close(self) -> None:
        """Leave the group; the other ranks' next call fails."""
        from torch.distributed import destroy_process_group

        group, self._group = self._group, None
        if group is not None:
            destroy_process_group(group)


class CollectiveSender:
    """The trainer's end of a collective group: rank 0.

    Construct it at the same time as the engine's ``setup_collective_group`` runs: each waits for the other.
    The arguments are those of :class:`CollectiveGroup`.
    """

    def __init__(
        self, master_address: str, master_port: int, world_size: int, group_name: str, backend: str = "gloo"
    ) -> None:
        self.group_name = group_name
        self._group = CollectiveGroup(master_address, master_port, 0, world_size, group_name, backend)

    @staticmethod
    def describe(named_tensors: NamedTensors) -> dict[str, list[Any]]:
        """The ``names``, ``dtypes`` and ``shapes`` for the engine's ``broadcast_parameter``."""
        pairs = list(items_of(named_tensors))
        return {
            "names": [name for name, _ in pairs],
            "dtypes": [dtype_name(tensor.dtype) for _, tensor in pairs],
            "shapes": [list(tensor.shape) for _, tensor in pairs],
        }

    def send(self, named_tensors: NamedTensors) -> None:
        """Broadcast the tensors, in the order given to ``broadcast_parameter``. Blocks until they have left."""
        self._group.broadcast([tensor.detach().contiguous() for _, tensor in items_of(named_tensors)])

    def close(self) -> None:
        """Leave the group."""
        self._group.close()


def receive(
    group: CollectiveGroup, specs: Iterable[TensorSpec], device: torch.device
) -> list[tuple[str, torch.Tensor]]:
    """Receive one tensor a spec from rank 0.

    Returns:
        ``(name, tensor)`` pairs on ``device``, in the order of ``specs``.
    """
    import torch

    specs = list(specs)
    tensors = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device) for spec in specs]
    group.broadcast(tensors)
    return [(spec.name, tensor) for spec, tensor in zip(specs, tensors, strict=True)]
