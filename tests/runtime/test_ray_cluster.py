"""Clusters of the plugin, with the real Ray."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pytest_roll_vllm.ray_cluster import RayCluster
from roll_vllm.errors import ConfigurationError

ray = pytest.importorskip("ray", reason="the Ray executor is optional")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    cluster = RayCluster()
    directory = Path(cluster._directory)
    yield cluster
    cluster.close()
    assert not ray.is_initialized()
    assert not directory.exists()
    assert not [p for p in psutil.Process().children(recursive=True) if "ray" in " ".join(p.cmdline())]


def test_groups_come_and_go(cluster: RayCluster) -> None:
    free = ray.available_resources()["CPU"]
    group = cluster.group([cluster.bundle] * 2)
    assert cluster.placements(group)["state"] == "CREATED"
    cluster.remove(group)
    assert cluster.placements(group)["state"] == "REMOVED"
    assert ray.available_resources()["CPU"] == free
    shared = cluster.shared(2)
    assert shared == cluster.shared(2)
    assert [index for _, index in shared] == [1, 0]


def test_it_grows_to_several_nodes(cluster: RayCluster) -> None:
    here, there = cluster.nodes(2)
    assert here == ray.get_runtime_context().get_node_id()
    assert cluster.nodes(1) == [here]
    group = cluster.group([cluster.bundle] * 3, nodes=[there, here, there])
    assert cluster.placements(group)["bundles_to_node_id"] == {0: there, 1: here, 2: there}
    cluster.remove(group)


OTHER = """
import sys
from pytest_roll_vllm.ray_cluster import RayCluster
mine = RayCluster(sys.argv[1] if len(sys.argv) > 1 else "")
print(mine.owned, mine.address, len(mine.nodes()))
mine.close()
"""


def test_several_side_by_side(cluster: RayCluster) -> None:
    """Each of two processes starts its own, while ours runs."""
    both = [subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [one.communicate(timeout=120)[0].split() for one in both]
    assert [one[::2] for one in found] == [["True", "1"]] * 2, found
    assert len({cluster.address, *(one[1] for one in found)}) == 3


def test_a_cluster_that_runs_already_is_left_alone(cluster: RayCluster) -> None:
    done = subprocess.run([sys.executable, "-c", OTHER, cluster.address], capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[:2] == ["False", cluster.address], done.stderr
    assert cluster.nodes()


def test_no_cluster_at_the_address() -> None:
    code = "from pytest_roll_vllm.ray_cluster import RayCluster\nRayCluster('127.0.0.1:1')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "cannot connect to the Ray cluster at 127.0.0.1:1 (--ray-address)" in done.stderr
    assert ConfigurationError.__name__ in done.stderr
