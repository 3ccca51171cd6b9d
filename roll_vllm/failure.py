"""How a process of an engine tells the frontend what ended it: a file in the directory that the engine has anyway.

vLLM's engine core ends with "see stack trace above" for its parent, whatever the reason was.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from roll_vllm import errors
from roll_vllm.errors import RollVllmError

_NAME = "failure"


def leave(directory: str | os.PathLike[str], error: RollVllmError) -> None:
    """Write the error down, unless an earlier one is there: what follows a failure is not its cause."""
    path = Path(directory, _NAME)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps({"error": type(error).__name__, "message": str(error)}), encoding="utf-8")
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
