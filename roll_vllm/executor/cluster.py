"""What the executor asks of a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from roll_vllm.errors import ConfigurationError, PlacementTimeoutError
from roll_vllm.executor.placement import RankPlacement

#: Seconds to wait for placement groups, and for room in their bundles.
TIMEOUT_VARIABLE = "ROLL_VLLM_PLACEMENT_TIMEOUT"

#: Tells a worker the index of its bundle; of the two, Ray tells it the placement group only.
BUNDLE_VARIABLE = "ROLL_VLLM_BUNDLE"

_POLL_S = 0.2


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle that exists.

    Attributes:
        group: Ray's placement group.
        index: the bundle's index in it.
        resources: what it holds.
        node_id: Ray's id of its node.
        device: as in :class:`RankPlacement`.
    """

    group: Any
    index: int
    resources: dict[str, float]
    node_id: str
    device: str | None

    @property
    def group_id(self) -> str:
        """The placement group's id, in hexadecimal."""
        return str(self.group.id.hex())

    def __str__(self) -> str:
        return f"bundle {self.index} {self.resources} of placement group {self.group_id}"


def timeout() -> float:
    """Seconds to wait for what was asked.

    Raises:
        ConfigurationError: the variable is not a positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "").strip() or "60"
    with contextlib.suppress(ValueError):
        if (seconds := float(text)) > 0:
            return seconds
    raise ConfigurationError(f"{TIMEOUT_VARIABLE}={text!r} is not a positive number of seconds")


def connect(address: str | None) -> bool:
    """Connect this process to the cluster; returns whether it was not connected before.

    Raises:
        ConfigurationError: there is no cluster, or the process is connected to another one.
    """
    import ray

    if ray.is_initialized():
        current = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", current):
            raise ConfigurationError(
                f"this process is connected to the Ray cluster at {current}, and resource_placement_groups names the "
                f"one at {address}; call ray.shutdown() first, or leave ray_address out"
            )
        return False
    try:
        # What workers print is worth having; Ray's own banner is not.
        ray.init(address=address or "auto", logging_level="WARNING")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"no Ray cluster could be reached at {address or 'any known address'} ({error}); call ray.init() before "
            "you create the engine, start a cluster (ray start --head), or give each entry its 'ray_address'"
        ) from error
    return True


def group_of(identity: str) -> Any:
    """Ray's placement group of an id."""
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup

    return PlacementGroup(PlacementGroupID(bytes.fromhex(identity)))


def own_group(ranks: int, resource: str) -> Any:
    """Make a placement group with one bundle a rank, close to each other."""
    from ray.util import placement_group

    return placement_group([{resource: 1}] * ranks, strategy="PACK")


def bundles(ranks: Sequence[RankPlacement], resource: str, share: float) -> list[Bundle]:
    """Wait until every rank's bundle exists and has room, and return them in rank order.

    Args:
        ranks: what the caller listed.
        resource: by which Ray counts the devices.
        share: how much of it one rank takes.

    Raises:
        ConfigurationError: a group is gone, or has no such bundle, or the bundle no such resource.
        PlacementTimeoutError: the cluster has no room.
    """
    deadline = time.monotonic() + timeout()
    tables = {placed.group: _created(placed.group, deadline) for placed in ranks}
    found = [_bundle(rank, placed, tables[placed.group]) for rank, placed in enumerate(ranks)]
    for rank, bundle in enumerate(found):
        if resource != "CPU" and not bundle.resources.get(resource):
            raise ConfigurationError(
                f"resource_placement_groups, rank {rank}: {bundle} holds no {resource}; reserve one for every rank"
            )
    _wait_for_room(found, resource, share, deadline)
    return found


def share_of(bundle: Bundle, resource: str, share: float) -> float:
    """How much of the resource a rank asks for; a bundle may have no CPUs, which every node has."""
    return min(share, bundle.resources.get(resource, 0))


def _created(identity: str, deadline: float) -> dict[str, Any]:
    from ray.util import placement_group_table

    while True:
        table: dict[str, Any] = placement_group_table(group_of(identity)) or {}
        state = table.get("state", "UNKNOWN")
        if state == "CREATED":
            return table
        if state in ("UNKNOWN", "REMOVED"):
            raise ConfigurationError(
                f"placement group {identity} does not exist in this cluster (any more); Ray removes a group with the "
                "process that made it, unless that gave lifetime='detached'"
            )
        if time.monotonic() > deadline:
            raise PlacementTimeoutError(
                f"placement group {identity} with the bundles {list(table['bundles'].values())} and strategy "
                f"{table['strategy']} could not be scheduled within {timeout():g} s (state {state}); {_inventory()}; "
                f"ask for less, add nodes, or wait longer by {TIMEOUT_VARIABLE}"
            )
        time.sleep(_POLL_S)


def _bundle(rank: int, placed: RankPlacement, table: dict[str, Any]) -> Bundle:
    specs: dict[int, dict[str, float]] = table["bundles"]
    index = placed.bundle
    if index is None:
        if len(specs) > 1:
            raise ConfigurationError(
                f"resource_placement_groups, rank {rank}: placement group {placed.group} has {len(specs)} bundles; "
                "say which one with 'bundle_index'"
            )
        index = 0
    if index not in specs:
        raise ConfigurationError(
            f"resource_placement_groups, rank {rank}: placement group {placed.group} has no bundle {index}, only "
            f"{sorted(specs)}"
        )
    return Bundle(group_of(placed.group), index, specs[index], table["bundles_to_node_id"][index], placed.device)


def _wait_for_room(found: Sequence[Bundle], resource: str, share: float, deadline: float) -> None:
    import ray

    wanted: Counter[tuple[str, int]] = Counter((bundle.group_id, bundle.index) for bundle in found)
    for bundle in found:
        asked = share_of(bundle, resource, share) * wanted[bundle.group_id, bundle.index]
        key = f"{resource}_group_{bundle.index}_{bundle.group_id}"
        while asked and (free := ray.available_resources().get(key, 0.0)) < asked - 1e-6:
            if time.monotonic() > deadline:
                raise PlacementTimeoutError(
                    f"{bundle} has {free:g} {resource} left, and {asked:g} was asked for; nobody freed it within "
                    f"{timeout():g} s. End what runs there, or ask for a smaller share (VLLM_RAY_PER_WORKER_GPUS)"
                )
            time.sleep(_POLL_S)


def _inventory() -> str:
    import ray

    def told(resources: dict[str, float]) -> dict[str, float]:
        # What groups have reserved has names with their ids.
        return {key: value for key, value in sorted(resources.items()) if "_group_" not in key and ":" not in key}

    return f"the cluster has {told(ray.cluster_resources())}, of which free {told(ray.available_resources())}"


def where(visibility: Sequence[str] = ()) -> dict[str, Any]:
    """Where this process is, as Ray and the process itself know it.

    Returns:
        ``pid``, ``node_id`` and ``node_ip``, ``placement_group`` (its id in hexadecimal) and ``bundle_index``,
        ``devices`` (what it sees, by the names in the visibility variable); outside Ray empty, and -1.
    """
    place: dict[str, Any] = {
        "pid": os.getpid(),
        "node_id": "",
        "node_ip": "",
        "placement_group": "",
        "bundle_index": -1,
        "devices": _seen_devices(visibility),
    }
    if BUNDLE_VARIABLE in os.environ:
        import ray

        context = ray.get_runtime_context()
        place["node_id"], place["node_ip"] = context.get_node_id(), ray.util.get_node_ip_address()
        place["placement_group"] = context.get_placement_group_id() or ""
        place["bundle_index"] = int(os.environ[BUNDLE_VARIABLE])
    return place


def _seen_devices(visibility: Sequence[str]) -> list[str]:
    """The devices that this process sees by a visibility variable, by their names there."""
    for name in visibility:
        if name in os.environ:
            return [device for device in os.environ[name].split(",") if device]
    return []
