"""One worker's side of the rollout engine: what each remote call does there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from roll_vllm import versions
from roll_vllm.errors import (
    ConfigurationError,
    EngineAsleepError,
    RollVllmError,
    UnsupportedFeatureError,
    WeightUpdateError,
)
from roll_vllm.state import TAGS, WeightsStatus
from roll_vllm.transfer import collective, shared_memory
from roll_vllm.transfer.manifest import BucketManifest, specs_from
from roll_vllm.worker import lora
from roll_vllm.worker.checksums import model_checksums
from roll_vllm.worker.loading import WeightLoader
from roll_vllm.worker.memory import PoolMemory, SleepMemory, StorageMemory, out_of_memory_explained

if TYPE_CHECKING:
    from roll_vllm.transfer.collective import CollectiveGroup

#: How many bucket layouts a worker remembers.
_MOST_BUCKETS = 64


class WorkerRuntime:
    """The state that the rollout engine keeps in one vLLM worker.

    Args:
        worker: vLLM's worker, with its model loaded and its KV cache allocated.
        initial: what the parameters hold at the start.
    """

    def __init__(self, worker: Any, initial: WeightsStatus) -> None:
        self._worker = worker
        self._model: torch.nn.Module = worker.model_runner.get_model()
        _keep_linear_weights_live(self._model)
        self._loader = WeightLoader(self._model, _is_tied(worker))
        self._memory: SleepMemory = (
            PoolMemory(worker)
            if worker.model_config.enable_sleep_mode
            else StorageMemory(self._model, worker.model_runner.kv_caches)
        )
        self._groups: dict[str, CollectiveGroup] = {}
        self._segments: dict[str, torch.Tensor] = {}
        self._buckets: dict[bytes, list[tuple[str, torch.Tensor]]] = {}
        self._adapter: dict[str, torch.Tensor] = {}
        self._status = initial
        _guard(worker, self._memory)

    # -- state ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """This worker's state, as the fields of ``WorkerState``."""
        updating = self._status is WeightsStatus.UPDATING
        return {
            "rank": int(self._worker.rank),
            "pid": os.getpid(),
            "weights": self._status.value,
            "sleeping": sorted(self._memory.sleeping),
            "resident_bytes": self._memory.resident_bytes(),
            "missing": self._loader.missing()[:10] if updating else [],
        }

    def checksums(self) -> dict[str, str]:
        """XXH3 of every parameter, buffer and plain tensor attribute, by name."""
        if "weights" in self._memory.sleeping:
            raise EngineAsleepError("the weights are asleep; wake them (load_states()) before asking for checksums")
        return model_checksums(self._model)

    def ping(self, delays: Sequence[float]) -> int:
        """This worker's rank, after ``delays[rank]`` seconds where that is given."""
        rank = int(self._worker.rank)
        time.sleep(delays[rank] if rank < len(delays) else 0)
        return rank

    def environment(self, names: Sequence[str]) -> dict[str, str | None]:
        """The values of the variables in this process; None where unset."""
        return {name: os.environ.get(name) for name in names}

    # -- sleep ----------------------------------------------------------------------------------------------

    def sleep(self, level: int) -> dict[str, Any]:
        """Give memory back; see :mod:`roll_vllm.worker.memory`."""
        self._release_senders_memory()
        if level == 2:
            # vLLM's pool holds them with the weights.
            self._adapter.clear()
            self._forget_adapters()
        self._memory.sleep(level)
        if level == 2:
            self._status = WeightsStatus.DESTROYED
        return self.state()

    def wake(self, tags: Sequence[str] | None) -> dict[str, Any]:
        """Take the memory of the tags again, of all when None."""
        with out_of_memory_explained("waking"):
            self._memory.wake(TAGS if tags is None else tags)
        return self.state()

    # -- weights --------------------------------------------------------------------------------------------

    def begin_update(self) -> dict[str, Any]:
        """Start a complete set of weights; wakes their memory if it is asleep.

        Raises:
            UnsupportedFeatureError: the engine speculates with a drafter model, which would keep its old weights.
        """
        if hasattr(getattr(self._worker.model_runner, "drafter", None), "model"):
            raise UnsupportedFeatureError(
                "this release of roll_vllm does not update the weights of a drafter model; start the engine without "
                "speculative_config, or with a method that has no weights (ngram)"
            )
        if "weights" in self._memory.sleeping:
            self.wake(["weights"])
        self._loader.begin()
        return self.state()

    def receive_bucket(self, payloads: Sequence[bytes], is_lora: bool = False) -> dict[str, Any]:
        """Take the tensors of one shared-memory bucket; ``payloads`` has one entry a rank."""
        payload = payloads[int(self._worker.rank)]
        if not isinstance(payload, bytes):
            raise WeightUpdateError(f"a payload must be bytes, got {type(payload).__name__}; see BucketSender.payloads")
        if payload not in self._buckets:
            manifest = BucketManifest.decode(payload)
            # Mappings of segments that their senders deleted would hold memory here.
            if not all(os.path.exists(path) for path in self._segments):
                self._release_senders_memory()
            memory = self._segments.get(manifest.segment)
            if memory is None or memory.nbytes < manifest.size:
                memory = shared_memory.attach(manifest.segment, manifest.size)
                self._segments[manifest.segment] = memory
            if len(self._buckets) >= _MOST_BUCKETS:
                self._buckets.clear()
                self._loader.forget()
            # Remembered, because senders that share their memory send the same layouts every time.
            self._buckets[payload] = [
                (p.spec.name, memory[p.offset : p.end].view(getattr(torch, p.spec.dtype)).view(p.spec.shape))
                for p in manifest.placements
            ]
        return self._take(self._buckets[payload], is_lora)

    def _release_senders_memory(self) -> None:
        self._segments.clear()
        self._buckets.clear()
        self._loader.forget()

    def receive_broadcast(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], group: str, is_lora: bool = False
    ) -> Any:
        """Receive tensors from rank 0 of a collective group, then take them."""
        if group not in self._groups:
            known = ", ".join(sorted(self._groups)) or "none"
            raise ConfigurationError(
                f"no collective group {group!r} here (known: {known}); call setup_collective_group"
            )
        specs = specs_from(names, dtypes, shapes)
        # Everything is received before anything is judged, so that the sender is never left half-way.
        try:
            pairs = collective.receive(self._groups[group], specs, self._device)
        except WeightUpdateError:
            self._groups.pop(group).close()
            raise
        return self._take(pairs, is_lora)

    def _take(self, pairs: list[tuple[str, torch.Tensor]], is_lora: bool) -> dict[str, Any]:
        if not is_lora:
            return self._load(pairs)
        # Copies: the sender will use its memory again.
        self._adapter.update({name: tensor.to("cpu", copy=True) for name, tensor in pairs})
        return self.state()

    def add_lora(self, number: int, config: dict[str, Any]) -> None:
        """Make an adapter of the tensors that were kept, and let vLLM load it in place of the one before.

        Raises:
            ConfigurationError: no tensors were sent, or vLLM refuses the adapter.
        """
        tensors, self._adapter = self._adapter, {}
        lora.register(number, config, tensors)
        try:
            self._worker.add_lora(lora.request(number))
        except Exception as error:
            lora.forget(number)
            raise ConfigurationError(
                f"vLLM refuses the LoRA adapter: {error}. Check the adapter_config, the tensors' names and shapes, and "
                "the engine's max_lora_rank; then send the tensors again"
            ) from error
        self._forget_adapters(older_than=number)

    def _forget_adapters(self, older_than: int | None = None) -> None:
        for number in lora.registered():
            if older_than is None or number < older_than:
                lora.forget(number)
                self._worker.remove_lora(number)

    def _load(self, pairs: list[tuple[str, torch.Tensor]]) -> dict[str, Any]:
        # A tied head may trail behind the tensor that completed the set; it starts no new one.
        if not self._loader.touches_parameters([name for name, _ in pairs]):
            self._loader.load(pairs)
            if self._status is WeightsStatus.COMPLETE:
                self._loader.check_tied_heads()
            return self.state()
        device = self._device
        try:
            with out_of_memory_explained("loading weights"):
                if any(tensor.device != device for _, tensor in pairs):
                    pairs = [(name, tensor.to(device)) for name, tensor in pairs]
                self._loader.load(pairs)
        except RollVllmError:
            self.abandon_update()
            raise
        if not any(pairs is kept for kept in self._buckets.values()):
            self._loader.forget()  # copies made here, which would hold as much memory as the weights
        self._status = WeightsStatus.UPDATING
        return self.state()

    def finish_update(self) -> dict[str, Any]:
        """Declare the set complete.

        Raises:
            WeightUpdateError: it is not; the parameters are then a mixture.
        """
        try:
            self._loader.finish()
        except WeightUpdateError:
            self._status = WeightsStatus.INCONSISTENT if self._loader.dirty else self._status
            raise
        self._status = WeightsStatus.COMPLETE
        return {**self.state(), "replayed": self._loader.replayed, "loaded": self._loader.loaded}

    def abandon_update(self) -> bool:
        """Give the set up. Returns whether it had written anything, so that the parameters are a mixture."""
        if self._loader.dirty:
            self._status = WeightsStatus.INCONSISTENT
        return self._loader.dirty

    def process_weights_after_loading(self) -> None:
        """Run vLLM's post-load step (kernel layouts, scales) on the weights as they are."""
        if "weights" in self._memory.sleeping:
            raise EngineAsleepError("the weights are asleep; wake and update them before processing them")
        from vllm.config import set_current_vllm_config

        worker = self._worker
        default = torch.get_default_dtype()
        torch.set_default_dtype(worker.model_config.dtype)
        try:
            with set_current_vllm_config(worker.vllm_config):
                _post_load_step()(self._model, worker.model_config, self._device)
        finally:
            torch.set_default_dtype(default)
        _keep_linear_weights_live(self._model)
        self._loader.rescan()

    # -- collective -----------------------------------------------------------------------------------------

    def setup_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> int:
        """Join a collective group; returns the rank taken in it."""
        if group_name in self._groups:
            raise ConfigurationError(
                f"collective group {group_name!r} exists already; set up the new one under another name"
            )
        rank = int(self._worker.rank) + rank_offset
        if not 0 < rank < world_size:
            raise ConfigurationError(
                f"worker rank {self._worker.rank} + rank_offset {rank_offset} = {rank} is not in 1..{world_size - 1}: "
                "the trainer is rank 0, and world_size counts it and every worker"
            )
        self._groups[group_name] = collective.CollectiveGroup(
            master_address, master_port, rank, world_size, group_name, backend
        )
        return rank

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def call(self, method: str, args: Sequence[Any]) -> dict[str, Any]:
        """Run one of the methods above; errors come back as data, since vLLM keeps only an error's text."""
        try:
            if method.startswith("_"):
                raise ConfigurationError(f"{method!r} cannot be called from outside the worker")
            operation: Callable[..., Any] = getattr(self, method)
            return {"value": operation(*args)}
        except RollVllmError as error:
            return {"error": type(error).__name__, "message": str(error), "rank": int(self._worker.rank)}


def _post_load_step() -> Callable[..., None]:
    from vllm import __version__

    if versions.satisfies(__version__, "<0.8.5"):
        from vllm.model_executor.model_loader.loader import _process_weights_after_loading as step
    else:
        from vllm.model_executor.model_loader.utils import process_weights_after_loading as step
    found: Callable[..., None] = step
    return found


def _is_tied(worker: Any) -> bool:
    return bool(getattr(worker.model_config.hf_text_config, "tie_word_embeddings", False))


def _keep_linear_weights_live(model: torch.nn.Module) -> None:
    """Undo or refuse CPU builds that compute with a packed copy of the weights.

    From 0.10.2 on, builds with oneDNN or sgl kernels pack linear weights at load; an update would then change
    nothing (``layers/utils.py: dispatch_cpu_unquantized_gemm``). The packed form is a closure over the copy,
    the plain one closes over nothing.
    """
    for name, module in model.named_modules():
        linear = vars(module).get("cpu_linear")
        if linear is None or linear.__closure__ is None:
            continue
        if module.weight.numel() == 0:
            raise UnsupportedFeatureError(
                f"this CPU build of vLLM packed the weights of {name} at load, so they cannot be updated; use a "
                "build without oneDNN and with VLLM_CPU_SGL_KERNEL=0"
            )
        module.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias)


def _guard(worker: Any, memory: SleepMemory) -> None:
    """Refuse to run the model on memory that is given back: on CPU that would be a segmentation fault."""
    execute_model = worker.execute_model

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if memory.sleeping:
            raise EngineAsleepError(
                f"the scheduler tried to run the model while {', '.join(sorted(memory.sleeping))} sleep; send "
                "requests through the rollout engine, which holds them back until it is awake"
            )
        return execute_model(*args, **kwargs)

    worker.execute_model = guarded
