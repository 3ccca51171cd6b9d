"""A real Ray cluster for tests: a small one of this process's own, or one that runs already.

Ray is imported when a cluster is started, and never before. Everything of a cluster of our own lies in a directory of
its own and on ports that are free, so that any number of them may run on one machine.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from pytest_roll_vllm.waiting import waiting
from roll_vllm.environment import AppliedEnvironment
from roll_vllm.errors import ConfigurationError

#: What a node of our own says that it has; nothing is reserved for it on the machine.
_CPUS = 16
_OBJECT_STORE = 80 * 2**20  # Ray's least; it lies in /dev/shm, which is small in containers
_TIMEOUT_S = 60
_REPORTED_S = 5


class RayCluster:
    """A cluster that this process is connected to.

    Args:
        address: of a cluster that runs, which :meth:`close` leaves alone; empty to start one on this machine.
        resource: by which Ray counts the devices that an engine's ranks need, such as ``GPU``.
        devices: how many of them a node of our own has.

    Attributes:
        address: the cluster's address.
        owned: whether :meth:`close` stops it.

    Raises:
        ConfigurationError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, address: str = "", *, resource: str = "CPU", devices: int = 0) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigurationError(
                f"Ray cannot be imported here ({error}): `pip install ray`, or leave the Ray executor out with "
                "--vllm-executors mp"
            ) from error
        self._ray: Any = ray
        self._resource = resource
        self._devices = devices
        self._cluster: Any = None
        self._directory = ""
        self._groups: list[Any] = []
        self._shared: dict[int, list[tuple[Any, int]]] = {}
        self.owned = not address
        with waiting("starting a Ray cluster"):
            self.address = address or self._start()
        try:
            if address:
                _check_listens(address)
            ray.init(address=self.address, namespace=f"pytest-{os.getpid()}", log_to_driver=False)
        except Exception as error:
            self._stop()
            raise ConfigurationError(
                f"cannot connect to the Ray cluster at {self.address} (--ray-address): {error}"
            ) from error

    def _start(self) -> str:
        from ray.cluster_utils import Cluster

        # Short, since the paths of its sockets begin with it.
        self._directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        # Here, and not in the directory of all, Ray also notes the cluster that a bare ray.init() would join.
        with AppliedEnvironment({"RAY_TMPDIR": self._directory, "RAY_USAGE_STATS_ENABLED": "0"}):
            self._cluster = Cluster(initialize_head=True, head_node_args={**self._node, "include_dashboard": False})
        return str(self._cluster.address)

    @property
    def _node(self) -> dict[str, Any]:
        # Nodes of one machine have one address, so each gets a resource by which it can be told from the others.
        resources: dict[str, float] = {f"node-{uuid.uuid4().hex[:8]}": 1}
        if self._resource not in ("CPU", "GPU"):
            resources[self._resource] = self._devices
        return {
            "num_cpus": _CPUS,
            "num_gpus": self._devices if self._resource == "GPU" else 0,
            "resources": resources,
            "object_store_memory": _OBJECT_STORE,
        }

    @cached_property
    def bundle(self) -> dict[str, float]:
        """What one rank of an engine needs."""
        # A test may have several engines at once. Ranks of one engine must not share a device.
        whole = self._resource == "CPU" or self._devices != 1
        return {"CPU": 1.0, self._resource: 1.0 if whole else 0.1}

    def nodes(self, count: int = 1) -> list[str]:
        """Return the ids of so many nodes, this process's first; a cluster of our own grows to it.

        Raises:
            ConfigurationError: If a cluster that is not ours has fewer.
        """
        while len(alive := self._alive()) < count and self._cluster is not None:
            with AppliedEnvironment({"RAY_TMPDIR": self._directory}), waiting("adding a node to the Ray cluster"):
                self._cluster.add_node(**self._node)
        if len(alive) < count:
            raise ConfigurationError(
                f"the Ray cluster at {self.address} has {len(alive)} of {count} nodes that it takes"
            )
        here = self._ray.get_runtime_context().get_node_id()
        return sorted(alive, key=lambda node: (node != here, node))[:count]

    def end_node(self, node_id: str) -> None:
        """Let a node of our own cluster die as a machine does that loses power: nothing of it says goodbye.

        Raises:
            ConfigurationError: If the node is not ours to end.
        """
        for node in self._cluster.list_all_nodes() if self._cluster is not None else ():
            if node.node_id == node_id and node is not self._cluster.head_node:
                self._cluster.remove_node(node, allow_graceful=False)
                return
        raise ConfigurationError(f"node {node_id} is not one that this process added to the cluster at {self.address}")

    def _alive(self) -> list[str]:
        return [str(node["NodeID"]) for node in self._ray.nodes() if node["Alive"]]

    # -- placement groups -----------------------------------------------------------------------------------

    def group(
        self, bundles: Sequence[Mapping[str, float]], *, strategy: str = "PACK", nodes: Sequence[str] = ()
    ) -> Any:
        """Make a placement group and wait until it is there.

        Args:
            bundles: the resources of each bundle.
            strategy: Ray's strategy.
            nodes: the node's id of each bundle; empty to let Ray choose.

        Returns:
            Ray's ``PlacementGroup``.

        Raises:
            ConfigurationError: The cluster has no room for it.
        """
        from ray.util.placement_group import placement_group, remove_placement_group

        wanted = [dict(bundle) for bundle in bundles]
        for bundle, node in zip(wanted, nodes, strict=False):
            bundle[self._mark(node)] = 0.001
        group = placement_group(wanted, strategy=strategy)
        with waiting(f"placing {len(wanted)} bundles on the Ray cluster"):
            there = group.wait(_TIMEOUT_S)
        if not there:
            remove_placement_group(group)
            free = self._ray.available_resources()
            raise ConfigurationError(f"the Ray cluster at {self.address} has no room for {wanted}; free now: {free}")
        self._groups.append(group)
        return group

    def _mark(self, node: str) -> str:
        """A resource that only this node has."""
        resources = {one["NodeID"]: set(one["Resources"]) for one in self._ray.nodes() if one["Alive"]}
        own = resources.pop(node).difference(*resources.values())
        return min(name for name in own if name.startswith("node"))  # Ray's own is "node:" and its address

    def remove(self, group: Any) -> None:
        """Remove a group from :meth:`group`, and wait until its resources are free."""
        from ray.util.placement_group import remove_placement_group

        self._groups.remove(group)
        free = self._ray.available_resources()
        for bundle in self.placements(group)["bundles"].values():
            for name, amount in bundle.items():
                free[name] = free.get(name, 0) + amount
        remove_placement_group(group)
        end = time.monotonic() + _TIMEOUT_S
        # The nodes report what is free a little later than the group is gone.
        while (self.placements(group)["state"] != "REMOVED" or self._own(group)) and time.monotonic() < end:
            time.sleep(0.02)
        # ... in two steps. But somebody else may have taken what was free.
        end = min(end, time.monotonic() + _REPORTED_S)
        while not self._are_free(free) and time.monotonic() < end:
            time.sleep(0.02)

    def _are_free(self, wanted: Mapping[str, float]) -> bool:
        known, free = self._ray.cluster_resources(), self._ray.available_resources()
        return all(free.get(name, 0) >= min(amount, known.get(name, 0)) for name, amount in wanted.items())

    def _own(self, group: Any) -> list[str]:
        """The names of what is reserved for a group."""
        known = {**self._ray.cluster_resources(), **self._ray.available_resources()}
        return [name for name in known if name.endswith(f"_{group.id.hex()}")]

    def placements(self, group: Any) -> dict[str, Any]:
        """Return what Ray itself says of a group: ``state``, ``bundles_to_node_id`` and more."""
        from ray.util.placement_group import placement_group_table

        return dict(placement_group_table(group))

    @contextmanager
    def waiting_group(self, bundles: Sequence[Mapping[str, float]]) -> Iterator[Any]:
        """A group that nobody has waited for, and that there may never be room for."""
        from ray.util.placement_group import placement_group, remove_placement_group

        group = placement_group([dict(bundle) for bundle in bundles])
        try:
            yield group
        finally:
            remove_placement_group(group)

    def is_free(self, group: Any) -> bool:
        """Whether nobody has taken any of a group's resources."""
        reserved, free = self._ray.cluster_resources(), self._ray.available_resources()
        own = self._own(group)
        return bool(own) and all(free.get(name, 0) == reserved.get(name, 0) for name in own)

    def total(self, resource: str) -> float:
        """How much of a resource the cluster has."""
        return float(self._ray.cluster_resources().get(resource, 0))

    # -- actors ---------------------------------------------------------------------------------------------

    def actors(self) -> dict[int, str]:
        """Return the node's id of every actor that lives, by process."""
        found = self._ray._private.state.actors().values()
        return {actor["Pid"]: actor["Address"]["NodeID"] for actor in found if actor["State"] == "ALIVE"}

    @contextmanager
    def actor_in(self, group: Any, index: int, share: float) -> Iterator[dict[str, Any]]:
        """An actor that lives in a bundle, and takes a share of a rank's resources there.

        Gives its ``pid`` and its ``bundle``, (id of the group, index), as the actor knows them.
        """
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        class Trainer:
            def where(self) -> dict[str, Any]:
                import ray

                return {"pid": os.getpid(), "group": ray.get_runtime_context().get_placement_group_id()}

        strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
        amounts = {name: share * amount for name, amount in self.bundle.items()}
        asked = {"num_cpus": amounts.pop("CPU"), "num_gpus": amounts.pop("GPU", 0), "resources": amounts}
        actor = self._ray.remote(scheduling_strategy=strategy, **asked)(Trainer).remote()
        try:
            said = self._ray.get(actor.where.remote(), timeout=_TIMEOUT_S)
            yield {"pid": said["pid"], "bundle": (said["group"], index)}
        finally:
            self._ray.kill(actor)

    # -- what is kept ---------------------------------------------------------------------------------------

    def shared(self, ranks: int) -> list[tuple[Any, int]]:
        """Return a place for each rank, the same ones whenever so many are asked for.

        Engines with equal arguments are shared, and for that their places must be equal. They are listed in another
        order than Ray's, which an engine must keep.
        """
        if ranks not in self._shared:
            group = self.group([self.bundle] * ranks)
            self._shared[ranks] = [(group, index) for index in reversed(range(ranks))]
        return list(self._shared[ranks])

    # -- the end --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove all groups and disconnect; stop the cluster if it is ours."""
        try:
            for group in list(self._groups):
                self.remove(group)
        finally:
            self._ray.shutdown()
            self._stop()

    def _stop(self) -> None:
        if self._cluster is not None:
            self._cluster.shutdown()
            shutil.rmtree(self._directory, ignore_errors=True)


def _check_listens(address: str) -> None:
    """Raise OSError if nothing answers at ``HOST:PORT``: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if "//" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
