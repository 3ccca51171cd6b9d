"""What a worker has mapped of its senders' memory, and for how long."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import torch

from roll_vllm.transfer import device_memory, shared_memory
from roll_vllm.transfer.manifest import BucketManifest

Pairs = list[tuple[str, torch.Tensor]]

#: How many bucket layouts a worker remembers.
_MOST_BUCKETS = 64
#: Seconds after which device memory of a sender that has gone is let go of, at most.
_GONE_AFTER_S = 0.25


class MappedBuckets:
    """Buckets by payload, and the segments that they lie in.

    Layouts and mappings are kept, because senders that share their memory send the same ones every time. Memory of a
    device is scarce: it is let go of after the update, or if the sender keeps it (``BucketSender.share``) as soon as
    the sender closes it.

    Args:
        device: the worker's device.
        forget: called before mappings end; lets go of tensors of earlier buckets.

    Attributes:
        lock: held by whoever uses the tensors, so that no mapping ends meanwhile.
    """

    def __init__(self, device: torch.device, forget: Callable[[], None]) -> None:
        self.lock = threading.RLock()
        self._device = device
        self._forget = forget
        self._segments: dict[str, torch.Tensor] = {}
        self._buckets: dict[bytes, Pairs] = {}
        self._passing = False  # whether a segment on a device is for the current update only

    def pairs(self, payload: bytes) -> Pairs:
        """The names and tensors of a bucket, the same list for the same payload; ``lock`` must be held.

        Raises:
            WeightUpdateError: the payload is malformed, or its segment cannot be mapped.
        """
        if payload not in self._buckets:
            manifest = BucketManifest.decode(payload)
            # Mappings of segments that their senders deleted would hold memory here.
            if not self._all_there():
                self.release()
            memory = self._segments.get(manifest.segment)
            if memory is None or memory.nbytes < manifest.size:
                memory = self._attach(manifest)
                self._segments[manifest.segment] = memory
            if len(self._buckets) >= _MOST_BUCKETS:
                self._buckets.clear()
                self._forget()
            self._buckets[payload] = [
                (p.spec.name, memory[p.offset : p.end].view(getattr(torch, p.spec.dtype)).view(p.spec.shape))
                for p in manifest.placements
            ]
        return self._buckets[payload]

    def holds(self, pairs: Pairs) -> bool:
        """Whether it is a list that :meth:`pairs` gave and still knows."""
        return any(pairs is kept for kept in self._buckets.values())

    def release(self) -> None:
        """Let go of everything."""
        with self.lock:
            self._segments.clear()
            self._buckets.clear()
            self._passing = False
            self._forget()

    def end_of_update(self) -> None:
        """Let go of device memory that is not meant for the next update as well."""
        if self._passing:
            self.release()

    def _attach(self, manifest: BucketManifest) -> torch.Tensor:
        if manifest.memory == "host":
            return shared_memory.attach(manifest.segment, manifest.size)
        memory = device_memory.attach(manifest.segment, manifest.size, self._device)
        self._passing = self._passing or not manifest.kept
        if not self._on_device():
            threading.Thread(target=self._watch_senders, name="roll_vllm-senders", daemon=True).start()
        return memory

    def _watch_senders(self) -> None:
        while True:
            time.sleep(_GONE_AFTER_S)
            with self.lock:
                if self._on_device() and not self._all_there():
                    self.release()
                if not self._on_device():
                    return

    def _on_device(self) -> bool:
        return any(memory.device.type != "cpu" for memory in self._segments.values())

    def _all_there(self) -> bool:
        return all(os.path.exists(path) for path in self._segments)
