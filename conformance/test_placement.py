"""Under Ray, every rank is where the caller wants it, and nothing else of the cluster is touched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conformance.oracles import TWO_DEVICES, assert_dead, assert_gone, assert_ranks_hold, processes_of, wait_until
from conformance.test_lifecycle import died, isolated_caches, no_orphans
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle, EnginePool
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.trainer import Trainer
from roll_vllm.environment import AppliedEnvironment
from roll_vllm.errors import EngineDiedError, PlacementTimeoutError

if TYPE_CHECKING:
    from pytest_roll_vllm.ray_cluster import RayCluster

pytestmark = [*TWO_DEVICES, pytest.mark.parametrize("vllm_executor", ["ray"], indirect=True)]


@pytest.fixture
def vllm_model(vllm_model_factory: Callable[[str], Model]) -> Model:
    """A model that two ranks can share."""
    return vllm_model_factory("counting")


@pytest.fixture
def vllm_engine_args(
    vllm_engine_args: dict[str, Any], vllm_executor_args: Callable[[int], dict[str, Any]]
) -> dict[str, Any]:
    return {**vllm_engine_args, "tensor_parallel_size": 2, **vllm_executor_args(2)}


placed = contract(
    "ex-placement-exact",
    "Rank r runs on the bundle that the caller listed at r, in whatever order, groups and nodes, beside what else is "
    "there.",
    references=("vllm-project/vllm#25113", "NovaSky-AI/SkyRL#1308", "OpenRLHF/OpenRLHF#971", "verl-project/verl#4903"),
)


async def assert_placed(engine: EngineHandle, cluster: RayCluster, wanted: Sequence[tuple[Any, int]]) -> None:
    """The workers themselves say that they are where they were wanted, and Ray says the same of nodes and processes."""
    found = await engine.worker_placements()
    assert [place["rank"] for place in found] == list(range(len(wanted)))
    where = [(place["placement_group"], place["bundle_index"]) for place in found]
    assert where == [(group.id.hex(), index) for group, index in wanted]
    actors = cluster.actors()
    for place, (group, index) in zip(found, wanted, strict=True):
        node = cluster.placements(group)["bundles_to_node_id"][index]
        assert place["node_id"] == node, f"rank {place['rank']}"
        assert actors.get(place["pid"]) == node, f"rank {place['rank']}: Ray knows no actor of process {place['pid']}"
    assert len({place["pid"] for place in found}) == len(wanted)


@placed
async def test_bundles_in_the_order_of_the_caller(
    vllm_engine: EngineHandle, vllm_engine_args: dict[str, Any], ray_cluster: RayCluster, vllm_trainer: Trainer
) -> None:
    wanted = vllm_engine_args["resource_placement_groups"]
    assert [index for _, index in wanted] == [1, 0]
    await assert_placed(vllm_engine, ray_cluster, wanted)
    await assert_ranks_hold(vllm_engine, vllm_trainer, vllm_trainer.reference_version)


@placed
async def test_a_trainer_in_the_same_bundle(
    vllm_engine: EngineHandle, vllm_engine_args: dict[str, Any], ray_cluster: RayCluster
) -> None:
    """It takes what ROLL leaves to it of a device, and the engine is not in its way."""
    group, index = vllm_engine_args["resource_placement_groups"][0]
    with ray_cluster.actor_in(group, index, share=0.9) as trainer:
        assert trainer["bundle"] == (group.id.hex(), index)
        assert trainer["pid"] not in {place["pid"] for place in await vllm_engine.worker_placements()}
        assert await vllm_engine.greedy([[1, 2, 3]], 2)


@isolated_caches
async def test_every_rank_has_its_own_caches(vllm_engine: EngineHandle, vllm_cache_dir: Path) -> None:
    """Ranks may be on several hosts with one file system, where locks cannot be trusted."""
    for name in ("VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE"):
        roots = [str(values[name]) for values in await vllm_engine.worker_environment([name])]
        assert len(set(roots)) == 2, f"both ranks have {name}={roots[0]}"
        assert all(root.startswith(str(vllm_cache_dir)) for root in roots)


@pytest.mark.vllm_backend("cpu")  # nodes of one machine would give out the same accelerators twice
class TestTwoEngines:
    """Side by side: one over two groups on two nodes, and one as ROLL lists it, both ranks in one bundle."""

    @pytest.fixture(scope="class")
    def engines(self) -> dict[str, EngineHandle]:
        """Those that have been started."""
        return {}

    @pytest.fixture(scope="class")
    def groups(self, ray_cluster: RayCluster) -> Iterator[dict[str, Any]]:
        """One on this node, one on another, and one for both ranks of the other engine."""
        here, there = ray_cluster.nodes(2)
        both = {name: 2 * amount for name, amount in ray_cluster.bundle.items()}
        made = {
            "here": ray_cluster.group([ray_cluster.bundle] * 2, nodes=[here] * 2),
            "there": ray_cluster.group([ray_cluster.bundle] * 2, nodes=[there] * 2),
            "both": ray_cluster.group([both], nodes=[there]),
        }
        yield made
        for group in made.values():
            ray_cluster.remove(group)

    @pytest.fixture
    def pair(
        self,
        engines: dict[str, EngineHandle],
        groups: dict[str, Any],
        ray_cluster: RayCluster,
        vllm_engine_pool: EnginePool,
        vllm_engine_args: dict[str, Any],
        vllm_engine_creator: Callable[[dict[str, Any]], Callable[[], Any]],
    ) -> dict[str, EngineHandle]:
        entry = {"placement_group": groups["both"], "node_rank": 1, "ray_address": ray_cluster.address}
        places: dict[str, list[Any]] = {
            "spread": [(groups["there"], 1), (groups["here"], 0)],
            "roll": [{**entry, "gpu_rank": rank, "master_port": 1} for rank in range(2)],
        }
        for name in places if not engines else ():
            arguments = {**vllm_engine_args, "resource_placement_groups": places[name], "worker_name": name}
            engines[name] = vllm_engine_pool.start(vllm_engine_creator(arguments))
        return engines

    @placed
    async def test_each_where_it_belongs(
        self, pair: dict[str, EngineHandle], groups: dict[str, Any], ray_cluster: RayCluster, vllm_trainer: Trainer
    ) -> None:
        await assert_placed(pair["spread"], ray_cluster, [(groups["there"], 1), (groups["here"], 0)])
        await assert_placed(pair["roll"], ray_cluster, [(groups["both"], 0)] * 2)
        for number, engine in enumerate(pair.values()):
            version = vllm_trainer.reference_version + 1 + number
            await vllm_trainer.push(engine, version)
            await assert_ranks_hold(engine, vllm_trainer, version)

    @no_orphans
    def test_groups_outlive_engines(
        self,
        pair: dict[str, EngineHandle],
        groups: dict[str, Any],
        ray_cluster: RayCluster,
        vllm_engine_pool: EnginePool,
    ) -> None:
        """All that an engine took is free again, and the placement groups are the caller's."""
        workers: set[int] = set()
        for name, engine in list(pair.items()):
            family = processes_of(engine)
            workers |= {place["pid"] for place in engine.run(engine.worker_placements())}
            assert workers & set(ray_cluster.actors())
            vllm_engine_pool.end(pair.pop(name))
            assert_gone(family, "shutdown")
        wait_until(lambda: not workers & set(ray_cluster.actors()), 10)
        assert not workers & set(ray_cluster.actors()), "the cluster still has actors of the engines"
        wait_until(lambda: all(map(ray_cluster.is_free, groups.values())), 10)
        for name, group in groups.items():
            assert ray_cluster.placements(group)["state"] == "CREATED", name
            assert ray_cluster.is_free(group), f"something of the group {name!r} is still taken"


@died
@pytest.mark.vllm_backend("cpu")
async def test_a_node_is_lost(
    vllm_engine_factory: Callable[..., EngineHandle], vllm_engine_pool: EnginePool, ray_cluster: RayCluster
) -> None:
    """With one rank of the engine; the other rank and the engine core live on another one."""
    here, there = ray_cluster.nodes(2)
    group = ray_cluster.group([ray_cluster.bundle] * 2, nodes=[here, there])
    engine = vllm_engine_factory(resource_placement_groups=[(group, 1), (group, 0)], worker_name="lost")
    family = processes_of(engine)
    lost = (await engine.worker_placements())[0]
    assert lost["node_id"] == there
    call = asyncio.ensure_future(engine.ping([0.0, 60.0]))
    await asyncio.sleep(1)
    ray_cluster.end_node(there)
    await assert_dead(engine, 0, lost["pid"], [call])
    with pytest.raises(EngineDiedError, match=f"on node {there}"):
        await engine.check_health()
    vllm_engine_pool.end(engine)
    assert_gone(family, "shutdown")


@contract(
    "ex-placement-fails-clearly",
    "A placement group without room in the cluster ends the start in the stated time, with what was asked and what "
    "there is.",
    references=("verl-project/verl#4903",),
)
def test_no_room(vllm_engine_factory: Callable[..., EngineHandle], ray_cluster: RayCluster) -> None:
    before = set(ray_cluster.actors())
    with ray_cluster.waiting_group([{"CPU": 1}, {"CPU": 1234}]) as group:
        places = [(group, 0), (group, 1)]
        with (
            AppliedEnvironment({"ROLL_VLLM_PLACEMENT_TIMEOUT": "3"}),
            pytest.raises(PlacementTimeoutError, match=r"within 3 s") as caught,
        ):
            vllm_engine_factory(resource_placement_groups=places)
    said = str(caught.value)
    assert "1234" in said, f"what was asked is not in: {said}"
    assert f"'CPU': {float(ray_cluster.total('CPU'))}" in said, f"what the cluster has is not in: {said}"
    assert set(ray_cluster.actors()) == before
