"""What the suite asks inside of workers: a worker extension with questions that the runtime has no use for.

It also brings the kernels that fp8 weights need and vLLM has for GPUs only, in plain PyTorch, for workers on a CPU.
Where scales come from, which tensor gets which, and what is kept of all that stays vLLM's.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

from roll_vllm.patches.hook import ImportHook
from roll_vllm.worker.extension import RollVllmWorkerExtension

QUALNAME = f"{__name__}.SuiteExtension"


class SuiteExtension(RollVllmWorkerExtension):
    """The runtime's extension, and more calls."""

    def roll_vllm_addresses(self) -> dict[str, int]:
        """Where every parameter and buffer lies, and every tensor that a module keeps, by name."""
        from roll_vllm.worker.checksums import named_tensors

        runner: Any = vars(self)["model_runner"]
        return {name: tensor.data_ptr() for name, tensor in named_tensors(runner.get_model())}

    def roll_vllm_numbers(self, suffix: str) -> dict[str, list[float]]:
        """The elements of every tensor whose name ends so."""
        from roll_vllm.worker.checksums import named_tensors

        runner: Any = vars(self)["model_runner"]
        found = named_tensors(runner.get_model())
        return {name: tensor.flatten().tolist() for name, tensor in found if name.endswith(suffix)}

    def roll_vllm_scale(self, suffix: str, factor: float) -> None:
        """Multiply every tensor whose name ends so."""
        import torch

        from roll_vllm.worker.checksums import named_tensors

        runner: Any = vars(self)["model_runner"]
        with torch.inference_mode():
            for name, tensor in named_tensors(runner.get_model()):
                if name.endswith(suffix):
                    tensor.mul_(factor)

    def roll_vllm_graph_replays(self) -> int:
        """How often this process has replayed captured graphs since it was asked for the first time."""
        return _replays()

    def roll_vllm_stand_in_drafter(self, present: bool) -> None:
        """Give the model runner a drafter that has weights, or take it away. It drafts nothing: no CPU can run one."""
        import torch

        runner: Any = vars(self)["model_runner"]
        if present:
            runner.drafter = SimpleNamespace(model=torch.nn.Linear(2, 2))
        else:
            del runner.drafter

    def roll_vllm_withhold_memory(self) -> None:
        """Take all memory that this process can have, but for a few MiB on a CPU. No page of it is touched."""
        import psutil
        import torch

        runner: Any = vars(self)["model_runner"]
        device = next(runner.get_model().parameters()).device
        if device.type != "cpu":
            # What the allocator has kept, too.
            vars(self)["roll_vllm_withheld"] = None, _all_blocks(device, 512)
            return
        process, spare = psutil.Process(), 4 * 2**20
        before = process.rlimit(psutil.RLIMIT_AS)
        # An allocator keeps address space that was freed and hands it out again, whatever the limit.
        process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms, before[1]))
        blocks = _all_blocks(torch.device("cpu"), spare // 4)
        process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + spare, before[1]))
        vars(self)["roll_vllm_withheld"] = before, blocks

    def roll_vllm_release_memory(self) -> None:
        """Give back what :meth:`roll_vllm_withhold_memory` took."""
        import psutil
        import torch

        before, blocks = vars(self).pop("roll_vllm_withheld")
        if before is not None:
            psutil.Process().rlimit(psutil.RLIMIT_AS, before)
        blocks.clear()
        if before is None:
            torch.cuda.empty_cache()


def _all_blocks(device: Any, smallest: int) -> list[Any]:
    """Tensors that together take all that torch can get, in pieces of a GiB and less."""
    import torch

    blocks, size = [], 2**30
    while size >= smallest:
        try:
            blocks.append(torch.empty(size, dtype=torch.uint8, device=device))
        except RuntimeError:
            size //= 2
    return blocks


_replayed: list[int] = []


def _replays() -> int:
    import torch

    if not _replayed:
        graph: Any = torch.cuda.CUDAGraph
        replay = graph.replay
        _replayed.append(0)

        def counted(self: Any) -> None:
            _replayed[0] += 1
            replay(self)

        graph.replay = counted
    return _replayed[0]


_FP8 = "vllm.model_executor.layers.quantization.fp8"
_LARGEST = 448.0  # of float8_e4m3fn


def _fp8_on_a_cpu(module: ModuleType) -> None:
    """Let vLLM's fp8 linear layers work without compiled kernels: exact products of the quantised weights."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    method: Any = vars(module)["Fp8LinearMethod"]
    initialise = method.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        self.use_marlin = False  # what vLLM takes wherever it does not find a GPU with fp8

    method.__init__ = __init__
    method.apply = _product
    vars(module)["ops"].scaled_fp8_quant = _quantise


def _product(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
    """``x @ weight``, where the layer keeps its weight as fp8 ``[in, out]`` with one scale."""
    product = x @ (layer.weight.float() * layer.weight_scale.float()).to(x.dtype)
    return product if bias is None else product + bias


def _quantise(input: Any, scale: Any = None, **kwargs: Any) -> tuple[Any, Any]:
    """``vllm._custom_ops.scaled_fp8_quant`` for one scale a tensor, computed from the largest element if not given."""
    import torch

    if scale is None:
        scale = (input.float().abs().max() / _LARGEST).clamp(min=1e-12).reshape(1)
    quantised = (input.float() / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return quantised, scale


if _FP8 in sys.modules:
    _fp8_on_a_cpu(sys.modules[_FP8])
else:
    ImportHook().after(_FP8, _fp8_on_a_cpu)
