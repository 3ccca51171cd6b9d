"""One worker's side of the rollout engine: what each remote call does there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from roll_vllm import backends, versions
from roll_vllm.errors import (
    ConfigurationError,
    EngineAsleepError,
    EngineOutOfMemoryError,
    RollVllmError,
    UnsupportedFeatureError,
    WeightUpdateError,
)
from roll_vllm.executor.cluster import where
from roll_vllm.patches import process
from roll_vllm.state import TAGS, WeightsStatus
from roll_vllm.transfer import collective, device_memory, roll_bucket
from roll_vllm.transfer.manifest import specs_from
from roll_vllm.worker import lora
from roll_vllm.worker.checksums import model_checksums
from roll_vllm.worker.loading import WeightLoader
from roll_vllm.worker.mapped import MappedBuckets
from roll_vllm.worker.memory import PoolMemory, SleepMemory, StorageMemory, out_of_memory_explained
from roll_vllm.worker.refit import Refit, is_quantised

if TYPE_CHECKING:
    from roll_vllm.transfer.collective import CollectiveGroup


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
        self._loader = self._own_loader = WeightLoader(self._model, _is_tied(worker))
        self._refit = Refit(worker, self._model, self._process) if is_quantised(worker) else None
        self._memory: SleepMemory = (
            PoolMemory(worker)
            if worker.model_config.enable_sleep_mode
            else StorageMemory(self._model, worker.model_runner.kv_caches)
        )
        self._groups: dict[str, CollectiveGroup] = {}
        self._mapped = MappedBuckets(self._device, lambda: self._loader.forget())
        self._adapter: dict[str, torch.Tensor] = {}
        self._adapters: set[int] = set()  # of this engine; others may live in the same process
        self._status = initial
        self._passes = _guard(worker, self._memory)

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
            "passes": self._passes.run,
            "refused_passes": self._passes.refused,
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

    def placement(self) -> dict[str, Any]:
        """Where this worker runs, as :func:`roll_vllm.executor.cluster.where` tells it, and its rank."""
        visibility = backends.of_torch(self._device.type).visibility
        return {"rank": int(self._worker.rank), **where(visibility[-1] if visibility else ())}

    def patch_record(self) -> dict[str, Any]:
        """What became of the patches in this process."""
        return process.record()

    def environment(self, names: Sequence[str]) -> dict[str, str | None]:
        """The values of the variables in this process; None where unset."""
        return {name: os.environ.get(name) for name in names}

    def device_identity(self) -> str:
        """What names this worker's device in every process of the host; empty for a CPU, or where none is known."""
        return device_memory.identity(self._device)

    def device_memory(self, reset_peak: bool) -> dict[str, int]:
        """Bytes that torch has allocated on this worker's device, ``allocated`` and ``peak``.

        Raises:
            UnsupportedFeatureError: the device has no memory of its own.
        """
        if self._device.type == "cpu":
            raise UnsupportedFeatureError("torch does not count what it allocates on a CPU; ask the operating system")
        device = torch.get_device_module(self._device.type)
        if reset_peak:
            device.reset_peak_memory_stats()
        return {"allocated": device.memory_allocated(), "peak": device.max_memory_allocated()}

    # -- sleep ----------------------------------------------------------------------------------------------

    def sleep(self, level: int) -> dict[str, Any]:
        """Give memory back; see :mod:`roll_vllm.worker.memory`."""
        self._mapped.release()
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
        if self._refit is not None:
            with out_of_memory_explained("making room for the weights to be quantised"):
                second = self._refit.begin()
            self._loader = WeightLoader(second, _is_tied(self._worker), self._refit.optional())
        self._loader.begin()
        return self.state()

    def receive_bucket(self, payloads: Sequence[bytes], is_lora: bool = False) -> dict[str, Any]:
        """Take the tensors of one shared-memory bucket; ``payloads`` has one entry a rank."""
        payload = payloads[int(self._worker.rank)]
        if not isinstance(payload, bytes):
            raise WeightUpdateError(f"a payload must be bytes, got {type(payload).__name__}; see BucketSender.payloads")
        if roll_bucket.is_pickle(payload):
            state = self._take(roll_bucket.load(payload), is_lora)
            self._finish_copies()
            return state
        with self._mapped.lock:
            state = self._take(self._mapped.pairs(payload), is_lora)
            self._finish_copies()
        return state

    def _finish_copies(self) -> None:
        """Wait for the copies that were begun: once the engine confirms, the sender uses its memory again."""
        if self._device.type != "cpu":
            torch.get_device_module(self._device.type).synchronize()

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
            with out_of_memory_explained("receiving weights"):
                pairs = collective.receive(self._groups[group], specs, self._device)
        except (EngineOutOfMemoryError, WeightUpdateError):
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
            EngineAsleepError: the weights are asleep, in whose memory vLLM's pool holds the adapters.
        """
        if "weights" in self._memory.sleeping:
            raise EngineAsleepError("the weights are asleep; wake them (load_states()) before add_lora()")
        self._mapped.end_of_update()
        tensors, self._adapter = self._adapter, {}
        lora.register(number, config, tensors)
        self._adapters.add(number)
        try:
            self._worker.add_lora(lora.request(number))
        except Exception as error:
            lora.forget(number)
            self._adapters.discard(number)
            raise ConfigurationError(
                f"vLLM refuses the LoRA adapter: {error}. Check the adapter_config, the tensors' names and shapes, and "
                "the engine's max_lora_rank; then send the tensors again"
            ) from error
        self._forget_adapters(older_than=number)

    def list_loras(self) -> list[int]:
        """The ids of the adapters that vLLM holds, or that are kept for it."""
        return sorted({*self._worker.list_loras(), *self._adapters})

    def _forget_adapters(self, older_than: int | None = None) -> None:
        for number in sorted(self._adapters):
            if older_than is None or number < older_than:
                lora.forget(number)
                self._worker.remove_lora(number)
                self._adapters.discard(number)

    def _load(self, pairs: list[tuple[str, torch.Tensor]]) -> dict[str, Any]:
        # A tied head may trail behind the tensor that completed the set; it starts no new one.
        known = self._loader.knows(pairs)  # a sender that shares its memory sends hundreds of tensors again and again
        if not known and not self._loader.touches_parameters([name for name, _ in pairs]):
            self._loader.load(pairs)
            if self._status is WeightsStatus.COMPLETE:
                self._loader.check_tied_heads()
            return self.state()
        device = self._device
        try:
            with out_of_memory_explained("loading weights"):
                if not known and any(tensor.device != device for _, tensor in pairs):
                    pairs = [(name, tensor.to(device)) for name, tensor in pairs]
                self._loader.load(pairs)
        except RollVllmError:
            self.abandon_update()
            raise
        if not self._mapped.holds(pairs):
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
            if self._refit is not None:
                with out_of_memory_explained("quantising the weights"):
                    self._refit.finish()
        except RollVllmError:
            self._status = WeightsStatus.INCONSISTENT if self._loader.dirty else self._status
            raise
        self._mapped.end_of_update()
        counts = {"replayed": self._loader.replayed, "loaded": self._loader.loaded}
        if self._refit is not None:
            self._own_loader.remember_embeddings(self._loader)
            self._loader = self._own_loader
        self._status = WeightsStatus.COMPLETE
        return {**self.state(), **counts}

    def abandon_update(self) -> bool:
        """Give the set up. Returns whether it had written anything, so that the parameters are a mixture."""
        self._mapped.end_of_update()
        dirty = self._loader.dirty
        if dirty:
            self._status = WeightsStatus.INCONSISTENT
        if self._refit is not None:
            self._refit.drop()
            self._loader, self._own_loader.dirty = self._own_loader, dirty
        return dirty

    def process_weights_after_loading(self) -> None:
        """Run vLLM's post-load step (kernel layouts, scales) on the weights as they are.

        Quantised weights have been through it, which they bear but once: then nothing is done.
        """
        if "weights" in self._memory.sleeping:
            raise EngineAsleepError("the weights are asleep; wake and update them before processing them")
        if self._refit is not None:
            return
        self._process(self._model)
        _keep_linear_weights_live(self._model)
        self._loader.rescan()

    def _process(self, model: torch.nn.Module) -> None:
        from vllm.config import set_current_vllm_config

        worker = self._worker
        default = torch.get_default_dtype()
        torch.set_default_dtype(worker.model_config.dtype)
        try:
            with set_current_vllm_config(worker.vllm_config):
                _post_load_step()(model, worker.model_config, self._device)
        finally:
            torch.set_default_dtype(default)

    # -- collective -----------------------------------------------------------------------------------------

    def setup_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
        seconds: float,
    ) -> int:
        """Join a collective group, waiting so long for the others; returns the rank taken in it."""
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
            master_address, master_port, rank, world_size, group_name, backend, timedelta(seconds=seconds)
        )
        return rank

    def leave_group(self, group_name: str) -> None:
        """Leave a collective group; harmless if the worker is in none of that name."""
        group = self._groups.pop(group_name, None)
        if group is not None:
            group.close()

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
        experts = type(vars(module).get("cpu_fused_moe")).__name__
        if experts == "SGLFusedMOE" or (experts == "CPUFusedMOE" and module.w13_weight.numel() == 0):
            raise UnsupportedFeatureError(
                f"this CPU build of vLLM packed the experts of {name} at load, so they cannot be updated; use a "
                "build without oneDNN and with VLLM_CPU_SGL_KERNEL=0"
            )
        linear = vars(module).get("cpu_linear")
        if linear is None or linear.__closure__ is None:
            continue
        if module.weight.numel() == 0:
            raise UnsupportedFeatureError(
                f"this CPU build of vLLM packed the weights of {name} at load, so they cannot be updated; use a "
                "build without oneDNN and with VLLM_CPU_SGL_KERNEL=0"
            )
        module.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias)


@dataclass
class _Passes:
    """Forward passes of one worker that were run, and that were refused because memory is given back."""

    run: int = 0
    refused: int = 0


def _guard(worker: Any, memory: SleepMemory) -> _Passes:
    """Count forward passes, and refuse those on memory that is given back: on CPU a segmentation fault else."""
    passes = _Passes()

    def guarded(forward: Callable[..., Any], innermost: bool) -> Callable[..., Any]:
        def execute(*args: Any, **kwargs: Any) -> Any:
            # Without tokens, V1 only tells the runner which requests have ended.
            if args and getattr(args[0], "total_num_scheduled_tokens", None) == 0:
                return forward(*args, **kwargs)
            if memory.sleeping:
                passes.refused += 1
                raise EngineAsleepError(
                    f"the scheduler tried to run the model while {', '.join(sorted(memory.sleeping))} sleep; send "
                    "requests through the rollout engine, which holds them back until it is awake"
                )
            passes.run += innermost
            return forward(*args, **kwargs)

        return execute

    runner = worker.model_runner
    # Ray calls the runner itself; idle data-parallel ranks run dummy batches.
    for owner, name in ((worker, "execute_model"), (runner, "execute_model"), (runner, "_dummy_run")):
        if hasattr(owner, name):
            setattr(owner, name, guarded(getattr(owner, name), owner is runner))
    return passes
