"""Directories that are made once and then only read, by any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from roll_vllm.errors import ConfigurationError


def publish(cache_dir: Path, label: str, digest: str, fill: Callable[[Path], None]) -> Path:
    """Return the directory ``<cache_dir>/<label>-<digest>``; if it is missing, ``fill`` makes it.

    ``digest`` must cover everything that the content depends on: an existing directory is never looked into.
    ``fill`` writes into a private directory, which then appears under its final name in one step.

    Raises:
        ConfigurationError: ``cache_dir`` cannot be written.
    """
    final = cache_dir.resolve() / f"{label}-{digest[:16]}"
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        private = TemporaryDirectory(dir=final.parent, prefix=f".{label}-")
    except OSError as error:
        raise ConfigurationError(
            f"the model cache {cache_dir} cannot be written ({error}); choose a directory that can"
        ) from error
    with private as directory:
        draft = Path(directory, "draft")
        try:
            draft.mkdir()
            fill(draft)
        except OSError as error:
            raise ConfigurationError(
                f"the model cache {cache_dir} cannot be written ({error}); make room, or choose a directory that "
                "has some"
            ) from error
        try:
            draft.replace(final)
        except OSError:
            if not final.is_dir():  # else another process was faster: the same digest, the same content
                raise
    return final
