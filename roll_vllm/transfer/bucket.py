"""The bucket transport, sender's side: tensors to memory that the engine can map, metadata to the engine.

The memory is the host's, or for tensors on a GPU that the engine runs on too the GPU's own.

Tensors that already live in the sender's shared memory (:meth:`BucketSender.share`) are sent where they lie:
the engine's copy into its parameters is then the only one. Others are first packed into a bucket; in host memory it
is kept and used again, since fresh pages cost more than the copy, on a device only until :meth:`BucketSender.trim`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from roll_vllm.errors import ConfigurationError, EngineOutOfMemoryError, WeightUpdateError
from roll_vllm.transfer import device_memory
from roll_vllm.transfer.device_memory import DeviceSegment
from roll_vllm.transfer.manifest import BucketManifest, Placement, TensorSpec, align, dtype_name
from roll_vllm.transfer.shared_memory import Segment

if TYPE_CHECKING:
    import torch

NamedTensors = Mapping[str, "torch.Tensor"] | Iterable[tuple[str, "torch.Tensor"]]
AnySegment = Segment | DeviceSegment

#: Where a bucket is packed: on each of these devices, one entry for each payload; in host memory if there is none.
_Homes = tuple["torch.device", ...]

DEFAULT_BUCKET_BYTES = 256 * 2**20


def items_of(named_tensors: NamedTensors) -> Iterable[tuple[str, torch.Tensor]]:
    """The ``(name, tensor)`` pairs of a mapping or of an iterable of pairs."""
    return named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors


class BucketSender:
    """Sends tensors to engines on the same host through shared memory, without pickle.

    One sender serves one trainer process and can feed any number of engines, one after the other.

    Args:
        bucket_bytes: size of the bucket for tensors that are not shared; also the most memory that sending them
            takes, on the host or on each device. A larger tensor gets a bucket of its own.
        via_host: whether tensors of a GPU go through host memory, too.

    Raises:
        ConfigurationError: ``bucket_bytes`` is not positive.
    """

    def __init__(self, bucket_bytes: int = DEFAULT_BUCKET_BYTES, *, via_host: bool = False) -> None:
        if bucket_bytes <= 0:
            raise ConfigurationError(f"bucket_bytes must be a positive number of bytes, got {bucket_bytes}")
        self._bucket_bytes = bucket_bytes
        self._via_host = via_host
        self._buckets: dict[torch.device | None, AnySegment] = {}  # None: in host memory
        self._shared: list[AnySegment] = []
        # What was found out about shared tensors, and their payloads: hundreds of tensors are sent again and again.
        self._places: dict[str, tuple[int, torch.dtype, torch.Size, AnySegment, Placement]] = {}
        self._encoded: dict[AnySegment, tuple[list[Placement], bytes]] = {}

    def share(self, named_tensors: NamedTensors) -> None:
        """Move tensors into shared memory, in place, so that later sends copy nothing on this side.

        Those of a CPU go to shared memory of the host, those of a GPU to memory of that GPU which engines on it can
        map; there the move needs room for a second copy of the largest tensor at least. The tensor objects stay the
        same and may go on being trained in place. Tensors that share a storage still do afterwards; other views of
        that storage that are not listed keep the old memory.

        Raises:
            ConfigurationError: memory of a tensor's device cannot be shared, or ``via_host`` forbids it.
            EngineOutOfMemoryError: a GPU has no room for the move; what was moved until then stays shared.
        """
        homes = {segment.memory.data_ptr() for segment in self._shared}
        # By object: a tied parameter may be listed under both of its names.
        listed = {id(tensor): tensor for _, tensor in items_of(named_tensors)}.values()
        tensors = [tensor for tensor in listed if tensor.untyped_storage().data_ptr() not in homes]
        for tensor in tensors:
            on_device = not self._via_host and device_memory.shareable(tensor.device)
            if tensor.device.type != "cpu" and not on_device:
                why = "" if tensor.device.type != "cuda" else "; via_host or this build of torch forbids it for GPUs"
                raise ConfigurationError(f"only CPU tensors can be shared, got one on {tensor.device}{why}")
        for device in {tensor.device for tensor in tensors}:
            self._move([tensor for tensor in tensors if tensor.device == device], device)

    def _move(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        storages: dict[int, list[torch.Tensor]] = {}
        for tensor in tensors:
            if tensor.untyped_storage().nbytes():
                storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        pending = list(storages.values())
        most = len(pending)
        # In one segment where there is room, for that is the fastest to send; else in several, each after the other.
        while pending:
            chunk = pending[:most]
            offsets, size = [], 0
            for views in chunk:
                offsets.append(size)
                size = align(size + views[0].untyped_storage().nbytes())
            try:
                segment = _segment(size, None if device.type == "cpu" else device)
            except EngineOutOfMemoryError:
                if len(chunk) == 1:
                    raise
                most = max(1, len(chunk) // 2)
                continue
            for views, start in zip(chunk, offsets, strict=True):
                _rehome(views, segment.memory, start)
            del views  # or the last storage would be held through the next move
            self._shared.append(segment)
            pending = pending[most:]

    def payloads(self, named_tensors: NamedTensors) -> Iterator[bytes]:
        """Lay the tensors out and yield one payload a bucket, for ``update_parameter_in_bucket``.

        A bucket is overwritten when the next payload is asked for: let the engine confirm first.

        Args:
            named_tensors: checkpoint names and tensors of any device and layout. Those of a GPU are for workers on
                the same GPU, unless the sender goes ``via_host``.
        """
        for payload, *_ in self._lay_out(named_tensors, None):
            yield payload

    def payloads_for(self, named_tensors: NamedTensors, workers: Sequence[str]) -> Iterator[list[bytes]]:
        """As :meth:`payloads`, one payload for each worker a bucket, by way of memory that all of them can map.

        Args:
            named_tensors: checkpoint names and tensors of any device and layout.
            workers: what :func:`roll_vllm.transfer.device_memory.identity` gives for the device of each worker.
        """
        for payloads in self._lay_out(named_tensors, workers):
            yield payloads if len(payloads) == len(workers) else payloads * len(workers)

    def _lay_out(self, named_tensors: NamedTensors, workers: Sequence[str] | None) -> Iterator[list[bytes]]:
        in_place: dict[AnySegment, list[Placement]] = {}
        pending: dict[_Homes, list[tuple[TensorSpec, torch.Tensor]]] = {}
        filled: dict[_Homes, int] = {}
        known: dict[torch.device, _Homes] = {}
        for name, tensor in items_of(named_tensors):
            device = tensor.device
            if device not in known:
                known[device] = self._homes(device, workers)
            homes = known[device]
            place = self._place(name, tensor) if set(homes) <= {device} and (homes or device.type == "cpu") else None
            if place is not None:
                in_place.setdefault(place[0], []).append(place[1])
                continue
            spec = TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))
            if homes in pending and filled[homes] + spec.nbytes > self._bucket_bytes:
                yield self._pack(pending.pop(homes), homes)
            if homes not in pending:
                pending[homes], filled[homes] = [], 0
            pending[homes].append((spec, tensor))
            filled[homes] = align(filled[homes] + spec.nbytes)
        for homes, specs in pending.items():
            yield self._pack(specs, homes)
        for segment, placements in in_place.items():
            _synchronize(segment.memory)  # whoever trains them may still be at it
            if segment not in self._encoded or self._encoded[segment][0] != placements:
                self._encoded[segment] = placements, _payload(segment, placements, kept=True)
            yield [self._encoded[segment][1]]

    def _homes(self, source: torch.device, workers: Sequence[str] | None) -> _Homes:
        """The devices that tensors of a device are packed on, one for each payload; none for host memory."""
        import torch

        if self._via_host or not device_memory.shareable(source):
            return ()
        if workers is None:
            return (source,)
        devices = [torch.device(source.type, index) for index in range(torch.cuda.device_count())]
        ours = {device_memory.identity(device): device for device in devices}
        return tuple(ours[worker] for worker in workers) if all(worker in ours for worker in workers) else ()

    def trim(self) -> None:
        """Give back what is kept for the next tensors on a device: memory that others of its users want meanwhile."""
        for device in [device for device in self._buckets if device is not None]:
            self._buckets.pop(device).close()

    def close(self) -> None:
        """Give the shared memory back. Tensors moved by :meth:`share` stay usable in this process."""
        for segment in (*self._buckets.values(), *self._shared):
            segment.close()
        self._buckets, self._shared = {}, []
        self._places, self._encoded = {}, {}

    def __enter__(self) -> BucketSender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _place(self, name: str, tensor: torch.Tensor) -> tuple[AnySegment, Placement] | None:
        """The shared segment that holds ``tensor``, and where in it, if it lies in one."""
        if not tensor.is_contiguous():
            return None
        found = self._places.get(name)
        if found is not None and found[:3] == (tensor.data_ptr(), tensor.dtype, tensor.shape):
            return found[3:]
        for segment in self._shared:
            offset = tensor.data_ptr() - segment.memory.data_ptr()
            inside = 0 <= offset and offset + tensor.nbytes <= segment.memory.nbytes
            if inside and segment.memory.device == tensor.device:
                placement = Placement(TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape)), offset)
                self._places[name] = (tensor.data_ptr(), tensor.dtype, tensor.shape, segment, placement)
                return segment, placement
        return None

    def _pack(self, pending: list[tuple[TensorSpec, torch.Tensor]], homes: _Homes) -> list[bytes]:
        placements: list[Placement] = []
        end = 0
        for spec, _ in pending:
            placements.append(Placement(spec, end))
            end = align(end + spec.nbytes)
        packed = {home: self._pack_at(home, end, placements, pending) for home in set(homes or (None,))}
        return [packed[home] for home in homes or (None,)]

    def _pack_at(
        self,
        home: torch.device | None,
        size: int,
        placements: list[Placement],
        pending: list[tuple[TensorSpec, torch.Tensor]],
    ) -> bytes:
        import torch

        bucket = self._buckets.get(home)
        if bucket is None or bucket.memory.nbytes < size:
            if bucket is not None:
                self._buckets.pop(home).close()
                del bucket  # or a device would have to hold both
            bucket = self._buckets[home] = _segment(size, home)
        targets = [
            bucket.memory[p.offset : p.end].view(tensor.dtype).view(tensor.shape)
            for p, (_, tensor) in zip(placements, pending, strict=True)
        ]
        with torch.no_grad():
            torch._foreach_copy_(targets, [tensor.detach() for _, tensor in pending])
        _synchronize(bucket.memory)
        return _payload(bucket, placements)


def _segment(size: int, home: torch.device | None) -> AnySegment:
    return Segment(size) if home is None else DeviceSegment(size, home)


def _synchronize(memory: torch.Tensor) -> None:
    """Wait for what was begun on the memory's device: the engine would not."""
    import torch

    if memory.device.type != "cpu":
        torch.get_device_module(memory.device.type).synchronize(memory.device)


def _rehome(views: Sequence[torch.Tensor], memory: torch.Tensor, start: int) -> None:
    """Move the storage that some tensors share to byte ``start`` of ``memory``."""
    import torch

    storage = views[0].untyped_storage()
    with torch.no_grad():
        as_bytes = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(storage)
        memory[start : start + storage.nbytes()].copy_(as_bytes)
        for tensor in views:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=memory.device).set_(
                memory.untyped_storage(),
                start // tensor.element_size() + tensor.storage_offset(),
                tensor.shape,
                tensor.stride(),
            )


def _payload(segment: AnySegment, placements: list[Placement], *, kept: bool = False) -> bytes:
    memory = "device" if isinstance(segment, DeviceSegment) else "host"
    return BucketManifest(str(segment.path), segment.memory.nbytes, tuple(placements), memory, kept).encode()


_default_sender: BucketSender | None = None


def serialize_named_weights(
    named_weights: NamedTensors, infer_strategy: str = "vllm", *, sender: BucketSender | None = None
) -> bytes:
    """Pack tensors into one bucket; ROLL's trainer-side call, without its pickle.

    Args:
        named_weights: checkpoint names and tensors; all go into one bucket. If all are on one GPU, so is the bucket,
            for workers on the same GPU.
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
    homes = {sender._homes(tensor.device, None) for _, tensor in named_weights}
    (payload,) = sender._pack(specs, homes.pop() if len(homes) == 1 else ())
    return payload
