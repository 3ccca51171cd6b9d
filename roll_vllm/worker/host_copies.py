"""Page-locked host memory for one copy of the weights, in a fraction of the time that torch takes.

vLLM's pool asks torch for a page-locked tensor an allocation. torch rounds each size up to a power of two (29 GB for
the 15.2 GB of a 7B model), and one thread faults in and locks page by page. Here several threads fault the pages in,
huge ones where the system has them, and CUDA locks what is there already. A block is exactly as large as asked for,
and locked whole: a copy must not span two registrations.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

#: What a thread faults in at a time, and a stop waits for: 64 MiB.
_PIECE = 64 * 2**20
_HUGE_PAGE = 2 * 2**20
#: Of Linux 5.14 and later; Python does not know it.
_MADV_POPULATE_WRITE = 23

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
_LIBC.memset.restype = ctypes.c_void_p


class Pinning(Protocol):
    """Locks pages for a device. Every method raises OSError where the system refuses."""

    def attach(self) -> None:
        """Called once by every thread, before it locks anything."""

    def register(self, address: int, size: int) -> None:
        """Lock ``size`` bytes at ``address``."""

    def unregister(self, address: int) -> None:
        """Unlock what was locked at ``address``."""


class CudaPinning:
    """Locks pages for CUDA.

    Args:
        device: the index of the device whose context does it; any other would get a context of its own.
    """

    def __init__(self, device: int) -> None:
        self._device = device

    def attach(self) -> None:
        """Choose the device: a new thread has the first one."""
        import torch

        torch.cuda.set_device(self._device)

    def register(self, address: int, size: int) -> None:
        """Lock ``size`` bytes at ``address``."""
        import torch

        # A refusal stays pending as the last error, which CUDA keeps by thread: these threads launch nothing.
        code = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        if code:
            raise OSError(f"cudaHostRegister refused {size} bytes (CUDA error {code})")

    def unregister(self, address: int) -> None:
        """Unlock what was locked at ``address``."""
        import torch

        torch.cuda.cudart().cudaHostUnregister(address)


class _Block:
    """Memory of its own, which goes back when neither the block nor a tensor of it is left."""

    def __init__(self, size: int) -> None:
        self.size = size
        # Private: what is shared would be tmpfs, which has its own rules for huge pages and limits.
        self._map: Any = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._offset = -start % _HUGE_PAGE
        self.address = start + self._offset
        self.pieces = -(-size // _PIECE)  # those to be faulted in still
        self.ready = False
        _LIBC.madvise(self.address, size, mmap.MADV_HUGEPAGE)  # without huge pages it only takes longer
        # After a fork, what this process writes would go to pages that the device does not see.
        _LIBC.madvise(self.address, size, mmap.MADV_DONTFORK)

    def fault(self, number: int) -> None:
        """Have the pages of one piece."""
        start = number * _PIECE
        address, size = self.address + start, min(_PIECE, self.size - start)
        if _LIBC.madvise(address, size, _MADV_POPULATE_WRITE) == 0:
            return
        if ctypes.get_errno() != errno.EINVAL:
            raise OSError(ctypes.get_errno(), f"the host did not give {size} bytes")
        _LIBC.memset(address, 0, size)

    def tensor(self) -> torch.Tensor:
        """All bytes of the block."""
        import torch

        return torch.frombuffer(self._map, dtype=torch.uint8, count=self.size, offset=self._offset)


class _Workshop:
    """The blocks, and the threads that prepare them. Threads know only this, so that the owner can go before them."""

    def __init__(self, pinning: Pinning) -> None:
        self.pinning = pinning
        self.changed = threading.Condition()
        self.blocks: list[_Block] = []
        self.todo: deque[tuple[_Block, int]] = deque()
        self.threads: list[threading.Thread] = []
        self.working = 0  # threads that will look for more work
        self.failure: Exception | None = None
        self.closed = False

    def staff(self, count: int) -> None:
        """Have so many threads at work, if there is work."""
        with self.changed:
            self.threads = [thread for thread in self.threads if thread.is_alive()]
            while self.working < min(count, len(self.todo)):
                thread = threading.Thread(target=self._work, name="roll-vllm-host-copies", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # the process may have no more of them
                    if not self.working:
                        raise OSError(str(error)) from error
                    return
                self.threads.append(thread)
                self.working += 1

    def _work(self) -> None:
        try:
            self.pinning.attach()
            while (piece := self._next()) is not None:
                block, number = piece
                block.fault(number)
                with self.changed:
                    block.pieces -= 1
                    last = block.pieces == 0
                if last:
                    self.pinning.register(block.address, block.size)
                    with self.changed:
                        if self.closed:
                            self.pinning.unregister(block.address)
                            continue
                        block.ready = True
                        self.changed.notify_all()
        except Exception as error:
            with self.changed:
                self.working -= 1
                self.failure = self.failure or error
                self.todo.clear()
                self.changed.notify_all()

    def _next(self) -> tuple[_Block, int] | None:
        with self.changed:
            if self.todo:
                return self.todo.popleft()
            self.working -= 1  # at once, or a thread that is about to end would be counted on
            return None

    def discard(self, blocks: Sequence[_Block]) -> None:
        """Unlock blocks that no thread works on, and let their memory go."""
        gone = {id(block) for block in blocks}
        self.blocks = [block for block in self.blocks if id(block) not in gone]
        for block in blocks:
            if block.ready:
                self.pinning.unregister(block.address)

    def join(self) -> None:
        """Wait until all work is done, or given up."""
        for thread in self.threads:
            if thread is not threading.current_thread():  # where the owner may be collected
                thread.join()

    def close(self) -> None:
        """Stop the threads after the piece or block that they are at, and give everything back."""
        with self.changed:
            self.closed = True
            self.todo.clear()
            self.changed.notify_all()
        self.join()
        self.discard(self.blocks)


class HostCopies:
    """Page-locked blocks for one copy of the weights, kept from one use to the next.

    Nothing is taken until :meth:`prepare` or :meth:`blocks`, and never more than what the last of these calls asked
    for, each size rounded up to a page. All of it goes back by :meth:`close`, or with this object. Not for use from
    several threads at once.

    Args:
        pinning: how pages are locked.
        threads: how many threads fault in and lock at once, while somebody waits.
    """

    def __init__(self, pinning: Pinning, threads: int) -> None:
        self._threads = threads
        self._workshop = _Workshop(pinning)
        self._finalizer = weakref.finalize(self, self._workshop.close)

    @property
    def nbytes(self) -> int:
        """Bytes of the host that are taken, or about to be."""
        return sum(block.size for block in self._workshop.blocks)

    def prepare(self, sizes: Sequence[int]) -> None:
        """Begin to prepare blocks of these sizes (bytes) on one thread, which leaves the device to others mostly.

        Raises:
            OSError: the host has no room for them.
        """
        self._arrange(sizes)
        self._workshop.staff(1)

    def blocks(self, sizes: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Index and block of each of the sizes (bytes), as they become ready; all threads work on what is missing.

        What the blocks of an earlier call hold is lost.

        Raises:
            OSError: the host has no room for them, or they cannot be locked.
        """
        shop, waiting = self._workshop, dict(enumerate(self._arrange(sizes)))
        shop.staff(self._threads)
        while waiting:
            with shop.changed:
                while not (ready := [index for index, block in waiting.items() if block.ready]):
                    if shop.failure is not None or shop.closed:
                        raise OSError(str(shop.failure or "closed")) from shop.failure
                    shop.changed.wait()
            for index in ready:
                yield index, waiting.pop(index).tensor()

    def _arrange(self, sizes: Sequence[int]) -> list[_Block]:
        """A block for each size: those there are, and new ones, which threads are yet to prepare."""
        shop = self._workshop
        if shop.closed:
            raise OSError("closed")
        spare: dict[int, list[_Block]] = {}
        for block in reversed(shop.blocks):
            spare.setdefault(block.size, []).append(block)
        chosen = [spare[size].pop() if spare.get(size) else None for size in sizes]
        if surplus := [block for blocks in spare.values() for block in blocks]:
            shop.join()
            shop.discard(surplus)
        arranged = [block or _Block(size) for block, size in zip(chosen, sizes, strict=True)]
        new = [block for block, old in zip(arranged, chosen, strict=True) if old is None]
        shop.blocks += new
        with shop.changed:
            # The largest first: begun late, it would be waited for alone.
            for block in sorted(new, key=lambda block: -block.size):
                shop.todo.extend((block, number) for number in range(block.pieces))
        return arranged

    def close(self) -> None:
        """Give everything back; blocks still in use stay as memory, no longer locked."""
        self._finalizer()
