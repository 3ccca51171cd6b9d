"""The Ray executor of the V0 engine, which lives in the caller's process."""

from __future__ import annotations

from roll_vllm.executor import stock
from roll_vllm.executor.ray_executor import PlacedRayExecutor


class RayExecutorV0(PlacedRayExecutor, stock.executor("V0")):  # type: ignore[misc]
    """For the V0 engine; all ranks are actors, and steps run as a compiled graph."""

    def _stock_state(self) -> None:
        super()._stock_state()
        import msgspec
        from vllm.executor.msgspec_utils import encode_hook
        from vllm.model_executor.layers.sampler import SamplerOutput

        self.tp_driver_workers: list[object] = []
        self.non_driver_workers: list[object] = []
        self.input_encoder = msgspec.msgpack.Encoder(enc_hook=encode_hook)
        self.output_decoder = msgspec.msgpack.Decoder(list[SamplerOutput] | None)
