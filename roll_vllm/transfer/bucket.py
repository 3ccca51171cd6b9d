"""The bucket transport, sender's side: tensors to shared memory, metadata to the engine.

Tensors that already live in the sender's shared memory (:meth:`BucketSender.share`) are sent where they lie:
the engine's copy into its parameters is then the only one. Others are first packed into a bucket that is
kept and used again, since fresh pages cost more than the copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from roll_vllm.errors import ConfigurationError, WeightUpdateError
from roll_vllm.transfer.manifest import BucketManifest, Placement, TensorSpec, align, dtype_name
from roll_vllm.transfer.shared_memory import Segment

if TYPE_CHECKING:
    import torch

NamedTensors = Mapping[str, "torch.Tensor"] | Iterable[tuple[str, "torch.Tensor"]]

DEFAULT_BUCKET_BYTES = 256 * 2**20


def items_of(named_tensors: NamedTensors) -> Iterable[tuple[str, torch.Tensor]]:
    """The ``(name, tensor)`` pairs of a mapping or of an iterable of pairs."""
    return named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors


class BucketSender:
    """Sends tensors to engines on the same host through shared memory, without pickle.

    One sender serves one trainer process and can feed any number of engines, one after the other.

    Args:
        bucket_bytes: size of the bucket for tensors that are not shared; also the most host memory that
            sending them takes. A larger tensor gets a bucket of its own.

    Raises:
        ConfigurationError: ``bucket_bytes`` is not positive.
    """

    def __init__(self, bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> None:
        if bucket_bytes <= 0:
            raise ConfigurationError(f"bucket_bytes must be a positive number of bytes, got {bucket_bytes}")
        self._bucket_bytes = bucket_bytes
        self._bucket: Segment | None = None
        self._shared: list[Segment] = []

    def share(self, named_tensors: NamedTensors) -> None:
        """Move CPU tensors into shared memory, in place, so that later sends copy nothing on this side.

        The tensor objects stay the same and may go on being trained in place. Tensors that share a storage
        still do afterwards; other views of that storage that are not listed keep the old memory.
        """
        import torch

        homes = {segment.memory.data_ptr() for segment in self._shared}
        # By object: a tied parameter may be listed under both of its names.
        listed = {id(tensor): tensor for _, tensor in items_of(named_tensors)}.values()
        tensors = [tensor for tensor in listed if tensor.untyped_storage().data_ptr() not in homes]
        offsets: dict[int, int] = {}
        size = 0
        for tensor in tensors:
            if tensor.device.type != "cpu":
                raise ConfigurationError(f"only CPU tensors can be shared, got one on {tensor.device}")
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in offsets:
                offsets[storage.data_ptr()] = size
                size = align(size + storage.nbytes())
        if not size:
            return
        segment = Segment(size)
        with torch.no_grad():
            for tensor in tensors:
                storage = tensor.untyped_storage()
                start = offsets[storage.data_ptr()]
                home = segment.memory[start : start + storage.nbytes()]
                home.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
                tensor.data = torch.empty(0, dtype=tensor.dtype).set_(
                    segment.memory.untyped_storage(),
                    start // tensor.element_size() + tensor.storage_offset(),
                    tensor.shape,
                    tensor.stride(),
                )
        self._shared.append(segment)

    def payloads(self, named_tensors: NamedTensors) -> Iterator[bytes]:
        """Lay the tensors out and yield one payload a bucket, for ``update_parameter_in_bucket``.

        A bucket is overwritten when the next payload is asked for: let the engine confirm first.

        Args:
            named_tensors: checkpoint names and tensors of any device and layout.
        """
        in_place: dict[Segment, list[Placement]] = {}
        pending: list[tuple[TensorSpec, torch.Tensor]] = []
        filled = 0
        for name, tensor in items_of(named_tensors):
            spec = TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))
            place = self._locate(tensor)
            if place is not None:
                in_place.setdefault(place[0], []).append(Placement(spec, place[1]))
                continue
            if pending and filled + spec.nbytes > self._bucket_bytes:
                yield self._pack(pending)
                pending, filled = [], 0
            pending.append((spec, tensor))
            filled = align(filled + spec.nbytes)
        if pending:
            yield self._pack(pending)
        for segment, placements in in_place.items():
            yield _payload(segment, placements)

    def close(self) -> None:
        """Give the shared memory back. Tensors moved by :meth:`share` stay usable in this process."""
        for segment in (self._bucket, *self._shared):
            if segment is not None:
                segment.close()
        self._bucket, self._shared = None, []

    def __enter__(self) -> BucketSender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _locate(self, tensor: torch.Tensor) -> tuple[Segment, int] | None:
        """The shared segment that holds ``tensor`` and the tensor's first byte in it, if it lies in one."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return None
        for segment in self._shared:
            offset = tensor.data_ptr() - segment.memory.data_ptr()
            if 0 <= offset and offset + tensor.nbytes <= segment.memory.nbytes:
                return segment, offset
        return None

    def _pack(self, pending: list[tuple[TensorSpec, torch.Tensor]]) -> bytes:
        import torch

        placements: list[Placement] = []
        end = 0
        for spec, _ in pending:
            placements.append(Placement(spec, end))
            end = align(end + spec.nbytes)
        if self._bucket is None or self._bucket.memory.nbytes < end:
            if self._bucket is not None:
                self._bucket.close()
            self._bucket = Segment(end)
        memory = self._bucket.memory
        homes = [
            memory[p.offset : p.end].view(tensor.dtype).view(tensor.shape)
            for p, (_, tensor) in zip(placements, pending, strict=True)
        ]
        with torch.no_grad():
            torch._foreach_copy_(homes, [tensor.detach() for _, tensor in pending])
        return _payload(self._bucket, placements)


def _payload(segment: Segment, placements: list[Placement]) -> bytes:
    return BucketManifest(str(segment.path), segment.memory.nbytes, tuple(placements)).encode()


_default_sender: BucketSender | None = None


def serialize_named_weights(
    named_weights: NamedTensors, infer_strategy: str = "vllm", *, sender: BucketSender | None = None
) -> bytes:
    """Pack tensors into one bucket; ROLL's trainer-side call, without its pickle.

    Args:
        named_weights: checkpoint names and tensors; all go into one bucket.
        infer_strategy: must be ``"vllm"``.
        sender: the sender to pack with; by default one that this process keeps. Its bucket is overwritten
            by the next call, so let the engine confirm first.

    Returns:
        The payload; give ``[payload] * world_size`` to ``update_parameter_in_bucket``.
    """
    global _default_sender
    if infer_strategy != "vllm":
        raise ConfigurationError(f"infer_strategy must be 'vllm', got {infer_strategy!r}")
    named_weights = list(items_of(named_weights))
    if not named_weights:
        raise WeightUpdateError("nothing to send: named_weights is empty")
    if sender is None:
        sender = _default_sender = _default_sender or BucketSender()
    specs = [
        (TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape)), tensor) for name, tensor in named_weights
    ]
    return sender._pack(specs)
