"""How a process of an engine tells the frontend what went wrong: in its answer to a call, or where it ends, in a file.

The file lies in the directory that the engine has anyway: vLLM's engine core ends with "see stack trace above" for its
parent, whatever the reason was.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from roll_vllm import errors
from roll_vllm.errors import OUT_OF_MEMORY_REMEDY, EngineOutOfMemoryError, RollVllmError

_NAME = "failure"

#: What vLLM, torch and Python say where a start lacks memory.
_OUT_OF_MEMORY_SIGNS = (
    "out of memory",
    "can't allocate memory",  # torch's CPU allocator
    "No available memory",
    "MemoryError",
    "less than desired GPU memory",
    "larger than the available KV cache memory",
    "larger than the maximum number of tokens that can be stored in KV cache",  # V0
)


def out_of_memory(error: BaseException) -> EngineOutOfMemoryError | None:
    """What to raise instead of an error that ended a start, if it is one of too little memory."""
    if isinstance(error, EngineOutOfMemoryError):
        return error
    kinds = [kind.__name__ for kind in type(error).__mro__]  # torch's has a name of its own
    # vLLM breaks its messages where its source has lines, not all of them at a space.
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if "OutOfMemoryError" not in kinds and not any(sign in text for sign in _OUT_OF_MEMORY_SIGNS):
        return None
    return EngineOutOfMemoryError(f"the engine could not start: {text.rstrip('. ')}. {OUT_OF_MEMORY_REMEDY}")


@contextlib.contextmanager
def out_of_memory_left(directory: str | None) -> Iterator[None]:
    """Leave word of too little memory in an engine's directory, where it is on this machine; the error goes on."""
    try:
        yield
    except Exception as error:
        known = out_of_memory(error)
        if known is not None and directory and Path(directory).is_dir():
            leave(directory, known)
        raise


def leave(directory: str | os.PathLike[str], error: RollVllmError) -> None:
    """Write the error down, unless an earlier one is there: what follows a failure is not its cause."""
    path = Path(directory, _NAME)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    kind = next(kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    draft.write_text(json.dumps({"error": kind, "message": str(error)}), encoding="utf-8")
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def read(directory: str | os.PathLike[str] | None) -> RollVllmError | None:
    """The error that a process left, as an exception of its own type; None if there is none."""
    if directory is None:
        return None
    try:
        content = json.loads(Path(directory, _NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    kind: type[RollVllmError] = getattr(errors, content["error"], RollVllmError)
    return kind(content["message"])


def values(answers: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What the workers' runtimes answered, one value a rank.

    Raises:
        RollVllmError: one rank's error, of its own type. A rank without memory takes part in nothing, which the others
            only see as a call that came to nothing: so its error before theirs, otherwise that of the first rank.
    """
    failed = [answer for answer in answers if "error" in answer]
    if failed:
        cause = next((each for each in failed if each["error"] == EngineOutOfMemoryError.__name__), failed[0])
        kind: type[RollVllmError] = getattr(errors, cause["error"])
        raise kind(f"{cause['message']} [rank {cause['rank']}]")
    return [answer["value"] for answer in answers]
