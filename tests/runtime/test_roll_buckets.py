"""ROLL's pickled buckets: refused without the switch; with it their tensors are taken, and nothing is ever called."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import random
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from roll_vllm.errors import ConfigurationError, WeightUpdateError
from roll_vllm.transfer.manifest import ELEMENT_SIZE
from roll_vllm.transfer.roll_bucket import SWITCH, load
from roll_vllm.worker.runtime import WorkerRuntime

HANDLE: tuple[Any, ...] = (
    torch.Tensor, torch.Size([24]), (1,), 0, torch.storage.TypedStorage, torch.int8, 0, b"h" * 66, 24, 512, False,
    b"/torch_12_3_4", 7, b"e" * 64, True,
)  # fmt: skip


def packed(value: Any, protocol: int | None = None) -> bytes:
    """As ROLL's MultiprocessingSerializer does."""
    buffer = io.BytesIO()
    ForkingPickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def content_of(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The bucket, as int8, and tensors_meta."""
    meta, pieces, at = [], [], 0
    for name, tensor in tensors.items():
        flat = tensor.flatten().view(torch.int8)
        end = at + flat.numel()
        meta.append(
            {"name": name, "shape": list(tensor.shape), "dtype": tensor.dtype, "start_idx": at, "end_idx": end,
             "numel": flat.numel()}
        )  # fmt: skip
        pieces.append(flat)
        at = end
    return torch.cat(pieces), meta


def as_bytes(tensors: dict[str, torch.Tensor], protocol: int | None = None) -> bytes:
    bucket, meta = content_of(tensors)
    return packed(
        {"bucket_bytes": bytes(bucket.tolist()[i] & 255 for i in range(bucket.numel())), "tensors_meta": meta}, protocol
    )


class Rebuilt:
    """Is pickled as a call of a function with arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def as_handle(*arguments: Any) -> bytes:
    meta = [{"name": "a", "shape": [2, 3], "dtype": torch.float32, "start_idx": 0, "end_idx": 24, "numel": 24}]
    function = torch.multiprocessing.reductions.rebuild_cuda_tensor
    return packed({"bucket": Rebuilt(function, *arguments), "tensors_meta": meta})


TENSORS = {
    "first": torch.arange(6, dtype=torch.float32).view(2, 3),
    "second": torch.arange(8, dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "none": torch.empty(0, 4),
}


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")


@pytest.fixture
def traps(tmp_path: Path) -> tuple[dict[str, bytes], Path]:
    """Payloads that make a directory where they are unpickled, and which one."""
    sprung = tmp_path / "sprung"
    trap = Rebuilt(os.mkdir, str(sprung))
    bucket, meta = content_of(TENSORS)
    good = {"bucket_bytes": bytes(bucket.numel()), "tensors_meta": meta}
    values = {
        "alone": trap,
        "as the bucket": {"bucket": trap, "tensors_meta": meta},
        "as the bytes": {"bucket_bytes": trap, "tensors_meta": meta},
        "as a name": good | {"tensors_meta": [meta[0] | {"name": trap}]},
        "as a dtype": good | {"tensors_meta": [meta[0] | {"dtype": trap}]},
        "as a shape": good | {"tensors_meta": [meta[0] | {"shape": trap}]},
        "beside": good | {"more": trap},
        "in a handle": {"bucket": Rebuilt(torch.multiprocessing.reductions.rebuild_cuda_tensor, trap)},
    }
    payloads = {name: packed(value) for name, value in values.items()}
    text = str(sprung).encode()
    payloads["old opcodes"] = b"\x80\x02cos\nmkdir\n(S'" + text + b"'\ntR."
    payloads["an instance"] = b"\x80\x02(S'" + text + b"'\nios\nmkdir\n."
    return payloads, sprung


@pytest.mark.parametrize("switch", ["off", "on"])
def test_nothing_is_called(traps: tuple[dict[str, bytes], Path], monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    payloads, sprung = traps
    monkeypatch.setenv(SWITCH, "1" if switch == "on" else "0")
    reason = "no bucket of ROLL's format" if switch == "on" else f"set {SWITCH}=1"
    for name, payload in payloads.items():
        with pytest.raises(WeightUpdateError, match=reason):
            load(payload)
        assert not sprung.exists(), name
    for name, payload in payloads.items():
        try:
            pickle.loads(payload)
        except TypeError:  # of what comes after the trap
            pass
        assert sprung.exists(), f"{name}: the trap does not work"
        sprung.rmdir()


@pytest.mark.parametrize("value", [None, "", "0"])
def test_off_without_the_switch(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(SWITCH, value)
    with pytest.raises(WeightUpdateError, match=f"set {SWITCH}=1 where the engine starts"):
        load(as_bytes(TENSORS))


def test_a_switch_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "true")
    with pytest.raises(ConfigurationError, match=f"{SWITCH} must be 1 or 0, got 'true'"):
        load(as_bytes(TENSORS))


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_tensors_in_bytes(protocol: int) -> None:
    # Protocol 2 has no bytes: they are a call of _codecs.encode.
    if protocol == 2:
        with pytest.raises(WeightUpdateError, match="_codecs"):
            load(as_bytes(TENSORS, protocol))
        return
    found = dict(load(as_bytes(TENSORS, protocol)))
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("dtype", ELEMENT_SIZE)
def test_every_dtype(dtype: str) -> None:
    tensor = torch.ones(3).to(getattr(torch, dtype))
    ((name, found),) = load(as_bytes({"a": tensor}))
    assert (name, found.dtype, found.view(torch.uint8).tolist()) == (
        "a",
        tensor.dtype,
        tensor.view(torch.uint8).tolist(),
    )


@pytest.mark.usefixtures("allowed")
def test_a_worker_takes_them() -> None:
    taken: list[Any] = []
    worker: Any = SimpleNamespace(
        _worker=SimpleNamespace(rank=0),
        _finish_copies=lambda: None,
        _take=lambda pairs, is_lora: taken.append(pairs),
    )
    WorkerRuntime.receive_bucket(worker, [as_bytes(TENSORS)])
    assert [name for name, _ in taken[0]] == list(TENSORS)


@pytest.mark.usefixtures("allowed")
def test_a_handle_is_checked_before_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Any, ...]] = []
    storage = torch.arange(6, dtype=torch.float32).view(torch.int8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # stands for devices, which are not here
    properties = SimpleNamespace(uuid="0c3b")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: properties if index == 1 else SimpleNamespace(uuid="")
    )
    monkeypatch.setattr(
        torch.multiprocessing.reductions,
        "_rebuild",
        lambda *arguments: opened.append(arguments) or storage,
        raising=False,
    )
    payload, by_uuid = as_handle(*HANDLE), as_handle(*HANDLE[:6], "0c3b", *HANDLE[7:])
    wrong: dict[str, bytes] = {}
    for index, values in {
        0: [torch.nn.Parameter], 1: [torch.Size([25]), torch.Size([1, 24]), (), torch.Size([-1]), 24], 2: [(2,), ()],
        3: [1, -1, "0"], 4: [torch.FloatStorage], 5: [torch.float32], 6: [2, -1, "ffff", None],
        7: [b"", None, "h" * 66],
        8: [23, 2**63, None], 9: [-1, 2**64], 10: [True, 0], 11: [b"/etc/passwd", b"/torch_1/../x", None],
        12: [10_000, -1, 2**62], 13: [None, b"e" * 101], 14: [1, None],
    }.items():  # fmt: skip
        for value in values:
            wrong[f"{index}: {value}"] = as_handle(*HANDLE[:index], value, *HANDLE[index + 1 :])
    wrong |= {"short": as_handle(*HANDLE[:-1]), "long": as_handle(*HANDLE, 0)}
    monkeypatch.setattr(
        torch.multiprocessing.reductions, "rebuild_cuda_tensor", torch.multiprocessing.reductions._rebuild
    )
    for one in (payload, by_uuid):
        ((_, found),) = load(one)
        assert found.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert opened[0] == (*HANDLE[:4], torch.UntypedStorage, *HANDLE[5:])
    assert opened[1][6] == 1
    opened.clear()
    for name, one in wrong.items():
        with pytest.raises(WeightUpdateError):
            load(one)
        assert not opened, name


@pytest.mark.usefixtures("allowed")
def test_a_handle_that_torch_cannot_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if torch.cuda.is_available():
        pytest.skip("made up handles are for machines without a device")
    with pytest.raises(WeightUpdateError, match=r"device memory cannot be opened .*same device, keep the bucket"):
        load(as_handle(*HANDLE))


@pytest.mark.usefixtures("allowed")
def test_tensors_of_the_cpu_are_refused() -> None:
    bucket, meta = content_of(TENSORS)
    for payload in (
        packed({"bucket": bucket, "tensors_meta": meta}),
        pickle.dumps({"bucket": bucket, "tensors_meta": meta}),
    ):
        with pytest.raises(WeightUpdateError, match="no bucket of ROLL's format"):
            load(payload)


@pytest.mark.usefixtures("allowed")
def test_malformed_buckets() -> None:
    bucket, meta = content_of(TENSORS)
    good = {"bucket_bytes": bytes(bucket.numel()), "tensors_meta": meta}
    laughs: Any = "ha"
    for _ in range(60):
        laughs = (laughs, laughs)
    circle: list[Any] = []
    circle.append(circle)
    first = meta[0]
    wrong = {
        "a list": [], "empty": {}, "more": good | {"a": 1}, "both": good | {"bucket": b""},
        "text": good | {"bucket_bytes": "a"},
        "short": good | {"bucket_bytes": b"a"},
        "no list": good | {"tensors_meta": {}}, "entry": good | {"tensors_meta": [1]},
        **{f"without {key}": good | {"tensors_meta": [{k: v for k, v in first.items() if k != key}]}
           for key in ("name", "shape", "dtype", "start_idx", "end_idx")},
        **{f"{key} {value}": good | {"tensors_meta": [first | {key: value}]} for key, values in {
            "name": [None, 3, "\ud800", "a" * 1001], "shape": [None, [-1], [2, 4], 6, [2.0, 3], [True, 6]],
            "dtype": [None, "float32", torch.complex64, torch.Tensor], "start_idx": [-24, 2, None, "0", 10**30],
            "end_idx": [0, 25, None], "more": [1],
        }.items() for value in values},
        "twice": good | {"tensors_meta": [first, first]},
        "laughs": laughs, "laughing name": good | {"tensors_meta": [first | {"name": laughs}]},
        "laughing dtype": good | {"tensors_meta": [first | {"dtype": laughs}]},
        "laughing call": good | {"tensors_meta": [first | {"dtype": Rebuilt(torch.Size, laughs)}]},
        "circle": good | {"tensors_meta": circle},
        "circular shape": good | {"tensors_meta": [first | {"shape": circle}]},
    }  # fmt: skip
    payloads = {name: packed(value) for name, value in wrong.items()}
    payloads |= {
        "laughing key": b"\x80\x05})" + b"".join(b"\x94h%c\x86" % n for n in range(60)) + b"Ns.",
        "memory": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "memo": b"\x80\x05Nr\xff\xff\xff\xff.",
        "frame": b"\x80\x05\x95" + b"\xff" * 7 + b"\x7f",
        "no end": b"\x80\x05", "nothing on the stack": b"\x80\x05.",
        "no mark": b"\x80\x05t.", "short tuple": b"\x80\x05\x87.",
        "extension": b"\x80\x05\x82\x01.", "persistent": b"\x80\x05NQ.", "protocol": b"\x80\xff.",
    }  # fmt: skip
    for name, payload in payloads.items():
        with pytest.raises(WeightUpdateError) as info:
            load(payload)
        assert len(str(info.value)) < 5000, name
        str(info.value).encode()


@pytest.mark.usefixtures("allowed")
def test_damaged_buckets() -> None:
    payloads = [as_bytes(TENSORS), as_handle(*HANDLE), as_bytes(TENSORS, 3)]
    good = 0
    for number in range(20_000):
        source = random.Random(number)
        damaged = bytearray(source.choice(payloads))
        for _ in range(source.choice([1, 1, 2, 8])):
            damaged[source.randrange(1, len(damaged))] = source.randrange(256)
        del damaged[source.choice([len(damaged), len(damaged), source.randrange(1, len(damaged))]) :]
        try:
            load(bytes(damaged))
            good += 1
        except WeightUpdateError:
            pass
        except Exception as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}: {bytes(damaged)!r}") from error
    assert 100 < good < 10_000


def _send(connection: Any) -> None:
    bucket, meta = content_of({name: tensor.cuda() for name, tensor in TENSORS.items()})
    connection.send_bytes(packed({"bucket": bucket, "tensors_meta": meta}))
    connection.recv()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("allowed")
def test_device_memory_of_another_process() -> None:
    ours, theirs = multiprocessing.Pipe()
    sender = multiprocessing.get_context("spawn").Process(target=_send, args=(theirs,))
    sender.start()
    found = dict(load(ours.recv_bytes()))
    assert all(found[name].is_cuda and torch.equal(found[name].cpu(), tensor) for name, tensor in TENSORS.items())
    del found
    torch.cuda.synchronize()
    ours.send(None)
    sender.join(60)
    assert sender.exitcode == 0
