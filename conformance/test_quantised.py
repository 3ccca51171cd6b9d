"""fp8: quantised weights follow an update, with everything that vLLM computes when it quantises them.

On accelerators these are vLLM's own kernels. No tested release runs fp8 on a CPU: there the kernels are stand-ins of
:mod:`conformance.worker`, and what is tested is vLLM's quantisation of weights in a real engine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conformance.oracles import Fresh, assert_updated_is_as_fresh, poison, started_on
from conformance.test_moe import derived
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle, EnginePool
from pytest_roll_vllm.models import Model, Probe, make
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import WeightsStatus, WeightUpdateError
from roll_vllm.devices import Device

if TYPE_CHECKING:
    import torch

BACKENDS = ("cpu", "cuda", "rocm")


#: Rows and columns that have a scale in common, and the largest number of float8_e4m3fn.
BLOCK, LARGEST = 128, 448.0


class InBlocks(Model):
    """A model whose trainer quantises it: projections are in fp8, with a scale for each block, as vLLM expects them.

    Args:
        model: in bfloat16, of sizes that are multiples of the block's.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.name, self.path, self.dtype = f"{model.name} in blocks", model.path, model.dtype
        self.tied, self.vocab_size, self.reference_version = model.tied, model.vocab_size, model.reference_version

    def weights(self, version: int) -> dict[str, torch.Tensor]:
        import torch

        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in self._model.weights(version).items():
            if not name.endswith("_proj.weight"):
                tensors[name] = tensor
                continue
            rows, columns = tensor.shape
            blocks = tensor.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scales = blocks.abs().amax(dim=(1, 3)) / LARGEST
            quantised = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            tensors[name], tensors[f"{name}_scale_inv"] = quantised.view(rows, columns), scales
        return tensors

    def probes(self, version: int) -> list[Probe]:
        return self._model.probes(version)


@pytest.fixture(scope="session")
def unquantised(vllm_cache_dir: Path) -> Model:
    """Random weights in the dtype that is quantised."""
    return make("random", vllm_cache_dir / "models", "bfloat16")


@pytest.fixture(scope="session")
def in_blocks(unquantised: Model) -> Model:
    """The same, quantised by its trainer."""
    return InBlocks(unquantised)


@pytest.fixture(scope="session")
def vllm_model(unquantised: Model) -> Model:
    """Sent as it is: vLLM quantises it, with one scale for each tensor."""
    return unquantised


@pytest.fixture
def vllm_engine_args(vllm_engine_args: dict[str, Any]) -> dict[str, Any]:
    return {**vllm_engine_args, "quantization": "fp8"}


refit = contract(
    "q-refit-equals-fresh",
    "An engine that quantises what it is sent, updated from A to B, is one that was started on B, tensor for tensor; "
    "no tensor changes its address, and the post-load step, repeated, changes nothing.",
    backends=BACKENDS,
    references=("vllm-project/vllm#28425", "vllm-project/vllm#42821", "verl-project/verl#7519"),
    needs=("runtime",),
)


@pytest.fixture
def fresh(
    vllm_engine_pool: EnginePool,
    vllm_engine_creator: Callable[[dict[str, Any]], Callable[[], Any]],
    vllm_engine_args: dict[str, Any],
    vllm_trainer: Trainer,
    prompts: list[list[int]],
    tmp_path: Path,
) -> Fresh:
    """What an engine is that was started on other weights than the reference; one start for all tests of a model."""
    kept: dict[str, Fresh] = vllm_engine_pool.keep.setdefault("started on files", {})
    name = vllm_trainer.model.name
    if name not in kept:
        kept[name] = started_on(
            vllm_engine_pool, vllm_engine_creator, vllm_engine_args, vllm_trainer, prompts, tmp_path
        )
    return kept[name]


@refit
async def test_quantised_is_as_fresh(fresh: Fresh, vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    quantised = [name for name in fresh.checksums if name.endswith(("_proj.weight", "_proj.weight_scale"))]
    assert len(quantised) == 16, "eight quantised layers are expected, each with a scale"
    for version in (fresh.version + 1, fresh.version):
        await vllm_trainer.push(vllm_engine, version)
        found = (await vllm_engine.checksums())[0]
        same = [name for name in quantised if found[name] == fresh.checksums[name]]
        assert same == (quantised if version == fresh.version else [])


@derived
@pytest.mark.vllm_backend("cpu")
@pytest.mark.vllm_backend("cuda")
@pytest.mark.vllm_backend("rocm")
async def test_all_is_as_fresh(
    fresh: Fresh, vllm_engine: EngineHandle, vllm_trainer: Trainer, prompts: list[list[int]]
) -> None:
    await assert_updated_is_as_fresh(vllm_engine, vllm_trainer, prompts, fresh)


@refit
async def test_nothing_moves(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    version = vllm_trainer.reference_version
    addresses, sums = await vllm_engine.collective_rpc("roll_vllm_addresses"), await vllm_engine.checksums()
    for step in range(1, 4):
        await vllm_trainer.push(vllm_engine, version + step)
        assert await vllm_engine.checksums() != sums, "an update changed nothing"
    for _ in range(5):
        await vllm_engine.process_weights_after_loading()
    await vllm_trainer.push(vllm_engine, version)
    assert await vllm_engine.checksums() == sums, "after other weights, the same weights give other tensors"
    assert await vllm_engine.collective_rpc("roll_vllm_addresses") == addresses


@refit
async def test_refit_after_sleep(vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device) -> None:
    sums = await vllm_engine.checksums()
    await vllm_engine.offload_states(2)
    poison(vllm_device.kind)
    await vllm_trainer.push(vllm_engine, vllm_trainer.reference_version)
    await vllm_engine.load_states()
    assert await vllm_engine.checksums() == sums


@refit
async def test_an_incomplete_set_is_an_error(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    weights = vllm_trainer.weights(vllm_trainer.reference_version)
    sums = await vllm_engine.checksums()
    del weights["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(WeightUpdateError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        async with vllm_engine.weight_update() as update:
            await update.send(weights)
    assert (await vllm_engine.state()).weights is WeightsStatus.INCONSISTENT
    await vllm_trainer.push(vllm_engine, vllm_trainer.reference_version)
    assert await vllm_engine.checksums() == sums


@contract(
    "q-scales-refreshed",
    "After an update every scale of quantised weights is that of the new weights: four times the weights, four times "
    "the scales.",
    backends=BACKENDS,
    references=("vllm-project/vllm#25800", "vllm-project/vllm-ascend#13902"),
    needs=("runtime",),
)
async def test_scales_follow_the_weights(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    weights = vllm_trainer.weights(vllm_trainer.reference_version)
    before = (await vllm_engine.collective_rpc("roll_vllm_numbers", args=("weight_scale",)))[0]
    assert len(before) == 8, "four quantised layers are expected in each of two"
    assert all(scale > 0 for scales in before.values() for scale in scales)
    larger: dict[str, torch.Tensor] = {name: 4 * t if "_proj.weight" in name else t for name, t in weights.items()}
    vllm_engine.pushed = None
    async with vllm_engine.weight_update() as update:
        await update.send(larger)
    after = (await vllm_engine.collective_rpc("roll_vllm_numbers", args=("weight_scale",)))[0]
    stale = [name for name in before if after[name] != [4 * scale for scale in before[name]]]
    assert not stale, f"the weights are four times as large, and these scales are not: {stale}"


class TestBlocks:
    """A trainer that quantises by blocks. The kernels are for GPUs, and have no stand-ins."""

    pytestmark = pytest.mark.vllm_backend("cuda")

    @pytest.fixture
    def vllm_model(self, in_blocks: Model) -> Model:
        return in_blocks

    @pytest.fixture
    def vllm_engine_args(self, vllm_engine_args: dict[str, Any]) -> dict[str, Any]:
        how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
        return {**vllm_engine_args, "hf_overrides": {"quantization_config": how}}

    @refit
    async def test_blocks_are_as_fresh(
        self, fresh: Fresh, vllm_engine: EngineHandle, vllm_trainer: Trainer, prompts: list[list[int]]
    ) -> None:
        addresses = await vllm_engine.collective_rpc("roll_vllm_addresses")
        scales = [name for name in fresh.checksums if "_proj.weight_scale" in name]
        assert len(scales) == 8, "four quantised layers are expected in each of two"
        before = (await vllm_engine.checksums())[0]
        assert not [name for name in scales if before[name] == fresh.checksums[name]]
        await assert_updated_is_as_fresh(vllm_engine, vllm_trainer, prompts, fresh)
        assert await vllm_engine.collective_rpc("roll_vllm_addresses") == addresses

    @refit
    async def test_blocks_after_sleep(
        self, vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device
    ) -> None:
        version, sums = vllm_trainer.reference_version, await vllm_engine.checksums()
        for level in (1, 2):
            await vllm_engine.offload_states(level)
            poison(vllm_device.kind)
            await vllm_engine.load_states()
            if level == 2:
                await vllm_trainer.push(vllm_engine, version)
            assert await vllm_engine.checksums() == sums, f"after sleep level {level}"
        await vllm_trainer.push(vllm_engine, version + 1)
        assert await vllm_engine.checksums() != sums, "an update changed nothing"
