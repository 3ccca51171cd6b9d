"""The worker extension, on a worker that is not vLLM's."""

from __future__ import annotations

from pathlib import Path

import pytest

from roll_vllm import failure
from roll_vllm.errors import EngineOutOfMemoryError
from roll_vllm.patches import process
from roll_vllm.worker.extension import RollVllmWorkerExtension, meeting_place


@pytest.mark.parametrize(
    ("method", "directory", "expected"),
    [
        ("tcp://127.0.0.1:29871", "/tmp/records", "file:///tmp/records/meeting:29871"),
        ("tcp://127.0.0.1:29871", "", "tcp://127.0.0.1:29871"),
        ("tcp://127.0.0.1:29871", "/tmp/what?", "tcp://127.0.0.1:29871"),
        ("tcp://10.0.0.7:29871", "/tmp/records", "tcp://10.0.0.7:29871"),
        ("env://", "/tmp/records", "env://"),
        (None, "/tmp/records", None),
    ],
)
def test_ranks_of_one_host_meet_in_a_file(method: str | None, directory: str, expected: str | None) -> None:
    environ = {process.VARIABLE: directory} if directory else {}
    assert meeting_place(method, environ) == expected


def test_what_a_worker_sets_is_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Extended(RollVllmWorkerExtension):
        def __init__(self, method: str) -> None:
            self.distributed_init_method = method

    monkeypatch.setenv(process.VARIABLE, str(tmp_path))
    assert Extended("tcp://127.0.0.1:1234").distributed_init_method == f"file://{tmp_path}/meeting:1234"
    monkeypatch.delenv(process.VARIABLE)
    assert Extended("tcp://127.0.0.1:1234").distributed_init_method == "tcp://127.0.0.1:1234"


def test_a_worker_tells_what_ends_its_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Worker:
        def init_device(self, rank: int) -> int:
            return rank

        def load_model(self) -> None:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    class Extended(Worker, RollVllmWorkerExtension):
        def __init__(self) -> None:
            self.distributed_init_method = "env://"

    monkeypatch.setenv(process.VARIABLE, str(tmp_path))
    worker = Extended()
    assert worker.init_device(rank=3) == 3
    assert not hasattr(worker, "initialize_cache")
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        worker.load_model()
    assert isinstance(failure.read(tmp_path), EngineOutOfMemoryError)
    monkeypatch.setattr(Worker, "load_model", lambda self: "patched later")
    assert worker.load_model() == "patched later"  # type: ignore[func-returns-value]
