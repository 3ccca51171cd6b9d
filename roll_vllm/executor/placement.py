"""``resource_placement_groups`` in one plain form: which bundle, and which device there, for every rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from roll_vllm.errors import ConfigurationError

_FORMS = (
    "give one entry for each worker rank, in rank order: ROLL's {'placement_group': …, 'gpu_rank': …, 'node_rank': …, "
    "'ray_address': …}, or (placement_group, bundle_index)"
)


@dataclasses.dataclass(frozen=True)
class RankPlacement:
    """Where one rank goes.

    Attributes:
        group: Ray's id of the placement group, in hexadecimal.
        bundle: the bundle's index; None for the only one there is.
        device: the device on the bundle's node, as its visibility variable names it; None for what Ray assigns.
    """

    group: str
    bundle: int | None
    device: str | None = None


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where an engine goes.

    Attributes:
        ranks: one entry a rank, in rank order; empty if the executor is to make a group of its own.
        address: of the cluster; None for the one that this process is connected to.
        resource: by which Ray counts the devices, such as ``GPU``.
        visibility: the variables that show a process its device.
        keep_visibility: the variable that keeps Ray from setting those; empty if there is none.
        frontend: the process of the engine's frontend.
        one_host: whether all ranks must be on one host.
    """

    ranks: tuple[RankPlacement, ...]
    address: str | None
    resource: str
    visibility: tuple[str, ...] = ()
    keep_visibility: str = ""
    frontend: int = 0
    one_host: bool = False


def parse(entries: Sequence[Any] | None, world_size: int) -> tuple[tuple[RankPlacement, ...], str | None]:
    """Read ``resource_placement_groups``: the placements by rank, and the cluster's address if an entry names it.

    Args:
        entries: the caller's list; None or empty stands for a placement group of the executor's own.
        world_size: the engine's ranks.

    Raises:
        ConfigurationError: the list does not fit the ranks, or an entry is malformed; the message names it.
    """
    if entries is None:
        return (), None
    if isinstance(entries, (str, bytes, Mapping)) or not isinstance(entries, Sequence):
        raise ConfigurationError(f"resource_placement_groups is a {type(entries).__name__}, not a list; {_FORMS}")
    if not entries:
        return (), None
    if len(entries) != world_size:
        raise ConfigurationError(
            f"resource_placement_groups has {len(entries)} entries for {world_size} ranks (tensor_parallel_size times "
            f"pipeline_parallel_size); {_FORMS}"
        )
    ranks, addresses = [], {}
    for rank, entry in enumerate(entries):
        ranks.append(_read(entry, rank))
        if isinstance(entry, Mapping) and entry.get("ray_address"):
            addresses[str(entry["ray_address"])] = rank
    if len(addresses) > 1:
        raise ConfigurationError(
            f"resource_placement_groups names several clusters, {' and '.join(addresses)}; all ranks of an engine must "
            "be in one"
        )
    taken: dict[tuple[Any, ...], int] = {}
    for rank, placed in enumerate(ranks):
        if placed.device is not None:
            first = taken.setdefault((placed.group, placed.bundle, placed.device), rank)
            if first != rank:
                raise ConfigurationError(
                    f"ranks {first} and {rank} of resource_placement_groups have the same placement group and gpu_rank "
                    f"{placed.device}; each rank needs a device of its own"
                )
    return tuple(ranks), next(iter(addresses), None)


def _read(entry: Any, rank: int) -> RankPlacement:
    def wrong(what: str) -> ConfigurationError:
        return ConfigurationError(f"resource_placement_groups, rank {rank}: {what}; {_FORMS}")

    if isinstance(entry, RankPlacement):
        return entry
    if isinstance(entry, Mapping):
        if "placement_group" not in entry:
            raise wrong(f"no 'placement_group' among {sorted(map(str, entry))}")
        index, device = entry.get("bundle_index"), entry.get("gpu_rank")
        if device is not None and (isinstance(device, bool) or not isinstance(device, (int, str))):
            raise wrong(f"gpu_rank is {device!r}, not a device's index")
        group, named = entry["placement_group"], None if device is None else str(device)
    elif isinstance(entry, Sequence) and not isinstance(entry, (str, bytes)) and len(entry) == 2:
        group, index, named = entry[0], entry[1], None
        if index is None:
            raise wrong("the bundle_index is None")
    else:
        raise wrong(f"cannot read {entry!r}")
    if index is not None and (isinstance(index, bool) or not isinstance(index, int) or index < 0):
        raise wrong(f"the bundle_index is {index!r}, not a number from 0 on")
    identity = getattr(getattr(group, "id", None), "hex", None)
    if identity is None:
        raise wrong(f"the placement group is {group!r}, not one of Ray's")
    return RankPlacement(identity(), index, named)
