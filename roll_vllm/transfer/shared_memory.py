"""Memory that two processes of one host map at the same time.

A segment is a file, in ``/dev/shm`` where there is one, mapped by torch. ``multiprocessing.shared_memory``
is not used because before Python 3.13 every process that attaches also deletes the segment when it exits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import tempfile
import uuid
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from roll_vllm.errors import ConfigurationError, WeightUpdateError
from roll_vllm.transfer.manifest import shown

if TYPE_CHECKING:
    import torch

_PREFIX = "roll_vllm-"
_LONGEST_PATH = 4096  # characters; Linux takes no longer one
_OWNER = re.compile(rf"{_PREFIX}(\d+)-[0-9a-f]+")


def directory() -> Path:
    """Where segments live: ``$ROLL_VLLM_SHM_DIR``, else ``/dev/shm``, else the temporary directory."""
    chosen = os.environ.get("ROLL_VLLM_SHM_DIR")
    if chosen:
        return Path(chosen)
    shm = Path("/dev/shm")
    return shm if shm.is_dir() else Path(tempfile.gettempdir())


def sweep() -> None:
    """Delete the segments of processes that died without deleting their own.

    A living owner holds a lock on its file. Process ids would not do: containers may share the memory and not them.
    """
    for path in directory().glob(f"{_PREFIX}*"):
        if not _OWNER.fullmatch(path.name):
            continue
        # Locked: the owner lives. Any other error: another user's, or not ours after all.
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


class Segment:
    """A segment owned by this process.

    Args:
        size: length in bytes.

    Attributes:
        path: the file behind it; other processes map it with :func:`attach`.
        memory: uint8 tensor of shape ``[size]`` over the whole segment.

    Raises:
        ConfigurationError: the file system behind the segment has no room for it.
    """

    def __init__(self, size: int) -> None:
        sweep()
        self.path = directory() / f"{_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:12]}"
        unlocked = self.path.with_name(f"{self.path.name}.new")  # a name that no sweep looks at
        descriptor = -1
        try:
            descriptor = os.open(unlocked, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Reserve now: a sparse file would end in SIGBUS at the first write the file system has no room for.
            os.posix_fallocate(descriptor, 0, max(size, 1))
            unlocked.rename(self.path)
        except OSError as error:
            unlocked.unlink(missing_ok=True)
            if descriptor >= 0:
                os.close(descriptor)
            raise ConfigurationError(
                f"cannot reserve {size} bytes of shared memory in {self.path.parent}: {error}. Enlarge it (for a "
                "container, its shm size), use a smaller bucket_bytes, or point ROLL_VLLM_SHM_DIR elsewhere"
            ) from error
        self.memory: torch.Tensor = _map(self.path, size)
        self._finalizer = weakref.finalize(self, _delete, os.getpid(), self.path, descriptor)

    def close(self) -> None:
        """Delete the file. Mappings that exist stay valid until their tensors are gone."""
        self._finalizer()


def attach(path: str, size: int) -> torch.Tensor:
    """Map another process's segment.

    Returns:
        uint8 tensor of shape ``[size]``.

    Raises:
        WeightUpdateError: there is no such segment, or it is shorter than ``size`` bytes.
    """
    file = Path(path)
    try:
        ours = (
            len(path) <= _LONGEST_PATH
            and _OWNER.fullmatch(file.name)
            and file.parent.resolve() == directory().resolve()
            and (not os.path.lexists(file) or stat.S_ISREG(file.lstat().st_mode))
        )
    except (ValueError, OSError):  # characters that no path can have; a segment that goes away just now
        ours = False
    if not ours:
        raise WeightUpdateError(f"{shown(path)} is not a shared-memory segment of roll_vllm in {directory()}")
    try:
        found = file.stat().st_size
    except OSError as error:
        raise WeightUpdateError(
            f"the sender's segment {path} is gone ({error.strerror}): keep the sender open until the engine "
            "has confirmed the update, and run both on one host"
        ) from error
    if found < size:
        raise WeightUpdateError(
            f"the segment {path} has {found} bytes, its metadata says {size}: pack the bucket again"
        )
    try:
        return _map(file, size)
    except RuntimeError as error:  # torch has no type of its own for what the system refuses
        raise WeightUpdateError(
            f"cannot map the segment {path}: {error}. Run trainer and engine as one user, and on one host"
        ) from error


def _map(path: Path, size: int) -> torch.Tensor:
    import torch

    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def _delete(owner: int, path: Path, descriptor: int) -> None:
    # A forked child inherits the finalizer, but the segment is not its own.
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
        os.close(descriptor)
