"""The collective transport: a torch process group that the trainer (rank 0) and every worker join.

The group is made by the same torch helper, with the same group name, as ROLL's and OpenRLHF's trainers use,
so that either side can be theirs. It never becomes or touches the process's default group.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from roll_vllm.environment import GLOO_INTERFACE, LOOPBACK_INTERFACE, AppliedEnvironment
from roll_vllm.errors import ConfigurationError, WeightUpdateError
from roll_vllm.transfer.bucket import NamedTensors, items_of
from roll_vllm.transfer.manifest import TensorSpec, dtype_name

if TYPE_CHECKING:
    import torch

DEFAULT_TIMEOUT_S = 120.0

#: By backend: variables that decide how the ranks' libraries talk to each other. Where they differ, a group hangs.
SETTINGS = {
    "gloo": ("GLOO_DEVICE_TRANSPORT",),
    "nccl": (
        "NCCL_ALGO",
        "NCCL_BUFFSIZE",
        "NCCL_COLLNET_ENABLE",
        "NCCL_CUMEM_ENABLE",
        "NCCL_CUMEM_HOST_ENABLE",
        "NCCL_IB_DISABLE",
        "NCCL_MAX_NCHANNELS",
        "NCCL_MIN_NCHANNELS",
        "NCCL_MNNVL_ENABLE",
        "NCCL_NET",
        "NCCL_NVLS_ENABLE",
        "NCCL_P2P_DISABLE",
        "NCCL_P2P_LEVEL",
        "NCCL_PROTO",
        "NCCL_SHM_DISABLE",
    ),
    "hccl": (
        "HCCL_ALGO",
        "HCCL_BUFFSIZE",
        "HCCL_DETERMINISTIC",
        "HCCL_INTRA_PCIE_ENABLE",
        "HCCL_INTRA_ROCE_ENABLE",
        "HCCL_OP_EXPANSION_MODE",
        "HCCL_WHITELIST_DISABLE",
    ),
}

#: How the answer of a rank begins that does not take part in a broadcast; the reason follows.
_REFUSAL = "refused: "

#: How long to wait for the notes of the other ranks. Those of another library leave none; ours may be late, as torch
#: asks for the name of every address that it connects to, and a resolver goes on for 10 s where nobody answers.
_NOTES_S = 12.0


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
        limit: how long to wait for the others; by default :func:`timeout`.

    Raises:
        ConfigurationError: the ranks differ in one of :data:`SETTINGS`, in the backend or in the world size.
        WeightUpdateError: the ranks did not meet in time, or torch cannot make such a group.
    """

    def __init__(
        self,
        master_address: str,
        master_port: int,
        rank: int,
        world_size: int,
        group_name: str,
        backend: str,
        limit: timedelta | None = None,
    ) -> None:
        from torch.distributed import PrefixStore, distributed_c10d
        from torch.distributed.rendezvous import rendezvous

        limit = limit or timeout()
        self.name, self.rank, self.world_size = group_name, rank, world_size
        self._limit, self._broadcasts = limit, 0
        url = f"tcp://{master_address}:{master_port}"
        try:
            if rank:
                _wait_for_listener(master_address, master_port, limit)
                store, _, _ = next(rendezvous(url, rank, world_size, timeout=limit))
            else:
                store = _listening_store(master_address, master_port, world_size, limit)
            store.set_timeout(limit)
            self._notes: Any = PrefixStore(f"roll_vllm/{group_name}", store)
            self._all_ours = self._compare(backend)
            self._group: Any
            with AppliedEnvironment(_interface(master_address, os.environ)):
                self._group, _ = distributed_c10d._new_process_group_helper(
                    world_size, rank, [], backend, PrefixStore(group_name, store), group_name, timeout=limit
                )
            # What torch's new_group() would note, and destroy_process_group() looks for.
            distributed_c10d._world.pg_group_ranks[self._group] = {each: each for each in range(world_size)}
        except ConfigurationError:
            raise
        except Exception as error:
            raise WeightUpdateError(
                f"rank {rank} of {world_size} could not join collective group {group_name!r} at {url} with "
                f"{backend} within {limit.total_seconds():g} s: {error}. Start every rank with the same address, "
                "port, world_size, group_name and backend"
            ) from error

    def _compare(self, backend: str) -> bool:
        """Compare what must be equal on every rank. Returns whether all ranks are of this library.

        Raises:
            ConfigurationError: naming what differs, both values and both ranks.
        """
        own = {name: os.environ.get(name) for name in SETTINGS.get(backend, ())}
        own |= {"backend": backend, "world_size": str(self.world_size)}
        self._notes.set(f"note/{self.rank}", json.dumps(own))
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        everybody = self._arrived([f"note/{rank}" for rank in others])
        # What the first to know has found holds for all, or one would wait for an agreement that the other skips.
        everybody = self._notes.compare_set("together", "", str(everybody)) == b"True"
        differences = []
        for rank in others:
            if not everybody and not self._notes.check([f"note/{rank}"]):
                continue  # another library's, or later than all patience
            theirs = json.loads(self._notes.get(f"note/{rank}"))
            for name in own.keys() | theirs.keys():
                if own.get(name) != theirs.get(name):
                    differences.append(
                        f"{name} is {_shown(own.get(name))} on rank {self.rank} and {_shown(theirs.get(name))} on rank "
                        f"{rank}"
                    )
        if differences:
            self._notes.set(f"told/{self.rank}", "")
            if self.rank == 0:  # the notes are here, and go with us
                self._arrived([f"told/{rank}" for rank in others])
            raise ConfigurationError(
                f"the ranks of collective group {self.name!r} do not go together: {'; '.join(sorted(differences))}. "
                "Start the trainer and the engine with the same values"
            )
        return everybody

    def _arrived(self, keys: list[str]) -> bool:
        """Whether all keys are set within a few seconds."""
        try:
            self._notes.wait(keys, min(self._limit, timedelta(seconds=_NOTES_S)))
        except RuntimeError:
            return False
        return True

    def _agree(self, tensors: Sequence[torch.Tensor]) -> None:
        """Compare what rank 0 is about to send with what the others expect; torch would hang or end the process.

        Every rank learns what became of it, since whoever began to receive would wait for rank 0 for ever.

        Raises:
            RuntimeError: they differ, or somebody refuses or does not answer.
        """
        if not self._all_ours:
            return
        self._broadcasts += 1
        number = self._broadcasts
        listed = [[dtype_name(tensor.dtype), *tensor.shape] for tensor in tensors]
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        own = f"{len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors)} bytes in all, layout {digest[:12]}"
        answers = [f"answer/{number}/{rank}" for rank in range(1, self.world_size)]
        # Of two ranks, each knows by then what the other does. Rank 0 may leave with the store after any broadcast, so
        # it makes sure that the others have read.
        verdict, read = f"verdict/{number}", [f"read/{number}/{rank}" for rank in range(1, self.world_size)]
        several = self.world_size > 2
        if self.rank:
            self._notes.wait([f"layout/{number}"], self._limit)
            theirs = self._notes.get(f"layout/{number}").decode()
            self._notes.set(answers[self.rank - 1], own)
            if theirs != own:
                raise RuntimeError(f"rank 0 sends {theirs}; expected are {own}")
            if several:
                self._notes.wait([verdict], self._limit)
                if objection := self._notes.get(verdict).decode():
                    raise RuntimeError(objection)
                self._notes.set(read[self.rank - 1], "")
            return
        self._notes.set(f"layout/{number}", own)
        self._notes.wait(answers, self._limit)
        objection = ""
        for rank, key in enumerate(answers, 1):
            theirs = self._notes.get(key).decode()
            if theirs.startswith(_REFUSAL):
                objection = f"rank {rank} {theirs}"
            elif theirs != own:
                objection = f"rank {rank} expects {theirs}; given are {own}"
            if objection:
                break
        if several:
            self._notes.set(verdict, objection)
        if objection:
            raise RuntimeError(objection)
        if several:
            self._notes.wait(read, self._limit)
        for key in (f"layout/{number}", *answers, *((verdict, *read) if several else ())):
            self._notes.delete_key(key)

    def refuse(self, reason: str) -> None:
        """Take no part in the next broadcast, which then fails on every rank with this reason. Not for rank 0."""
        if self._group is None or not self._all_ours:
            return
        self._broadcasts += 1
        with contextlib.suppress(RuntimeError):  # rank 0 is gone, and asks nobody
            self._notes.set(f"answer/{self._broadcasts}/{self.rank}", f"{_REFUSAL}{reason}")

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Send the tensors from rank 0, or receive them in place on any other rank, in order.

        Raises:
            WeightUpdateError: a rank left, refused or did not answer in time, or expects other tensors.
        """
        from torch.distributed import BroadcastOptions

        if self._group is None:
            raise WeightUpdateError(f"collective group {self.name!r} is closed; set up a new one")
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            self._agree(tensors)
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

        group, self._group, self._notes = self._group, None, None
        if group is not None:
            # Torch joins a backend's threads when the last reference to it goes. One of them may still be about to
            # let go of a tensor, for which it needs the lock of the interpreter: so ours must be the last reference,
            # as up to torch 2.6 only that of the backend itself, not of its group, goes without holding the lock.
            backends = [group._get_backend(device) for device in group._device_types]
            destroy_process_group(group)
            del group
            backends.clear()


def _listening_store(address: str, port: int, world_size: int, limit: timedelta) -> Any:
    """The store of a group, which listens at this address and, unlike torch's own, at no other."""
    from torch.distributed import TCPStore

    descriptor = None
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        descriptor = socket.create_server((address, port), family=family, backlog=128).detach()
    except OSError as error:
        # Another group of this process has the port, and shares its store; or the address is that of a router.
        if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
            raise
    return TCPStore(
        address,
        port,
        world_size,
        True,
        limit,
        multi_tenant=True,
        use_libuv=False,  # which before torch 2.7 takes no descriptor
        master_listen_fd=descriptor,
    )


def _wait_for_listener(address: str, port: int, limit: timedelta) -> None:
    """Return when somebody listens there; torch itself would try for two or three times the limit.

    Raises:
        TimeoutError: nobody does.
    """
    end = time.monotonic() + limit.total_seconds()
    while True:
        try:
            socket.create_connection((address, port), timeout=max(end - time.monotonic(), 0.1)).close()
        except OSError as error:
            if time.monotonic() >= end:
                raise TimeoutError(f"nobody listens there ({error})") from error
            time.sleep(0.05)
        else:
            return


def _interface(address: str, environ: Mapping[str, str]) -> dict[str, str | None]:
    """Let gloo listen where only the ranks of this host can reach it, if the group is of this host."""
    here = address == "localhost" or address.startswith("127.") or address == "::1"
    chosen = environ.get(GLOO_INTERFACE)
    if here and not chosen and LOOPBACK_INTERFACE in (name for _, name in socket.if_nameindex()):
        return {GLOO_INTERFACE: LOOPBACK_INTERFACE}
    if not here and chosen == LOOPBACK_INTERFACE:  # as an engine's workers have it
        return {GLOO_INTERFACE: None}
    return {}


def _shown(value: str | None) -> str:
    return "not set" if value is None else repr(value)


class CollectiveSender:
    """The trainer's end of a collective group: rank 0.

    Construct it at the same time as the engine's ``setup_collective_group`` runs: each waits for the other.
    The other arguments are those of :class:`CollectiveGroup`.

    Args:
        device: moves the tensors there before they are sent, such as ``cuda:1``; NCCL takes none of the host's.
        variables: set in this process until :meth:`close`, so that it goes together with the other ranks.
    """

    def __init__(
        self,
        master_address: str,
        master_port: int,
        world_size: int,
        group_name: str,
        backend: str = "gloo",
        device: str | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.group_name = group_name
        self._device = device
        self._variables = AppliedEnvironment(variables or {}).apply()
        try:
            self._group = CollectiveGroup(master_address, master_port, 0, world_size, group_name, backend)
        except BaseException:
            self._variables.restore()
            raise

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
        import torch

        pairs = items_of(named_tensors)
        tensors = [tensor.detach().to(self._device or tensor.device).contiguous() for _, tensor in pairs]
        self._group.broadcast(tensors)
        # A device's group only queues them.
        for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
            torch.get_device_module(device).synchronize(device)

    def close(self) -> None:
        """Leave the group."""
        self._group.close()
        self._variables.restore()


def receive(
    group: CollectiveGroup, specs: Iterable[TensorSpec], device: torch.device
) -> list[tuple[str, torch.Tensor]]:
    """Receive one tensor a spec from rank 0.

    Where there is no memory for them, rank 0 gets to know, and the allocator's error goes on as it is.

    Returns:
        ``(name, tensor)`` pairs on ``device``, in the order of ``specs``.
    """
    import torch

    specs = list(specs)
    try:
        tensors = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device) for spec in specs]
    except (MemoryError, RuntimeError) as error:
        group.refuse(f"it cannot take the {len(specs)} tensors ({error})")
        raise
    group.broadcast(tensors)
    return [(spec.name, tensor) for spec, tensor in zip(specs, tensors, strict=True)]
