"""The bucket transport: what the engine reads is what the trainer holds, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from roll_vllm import BucketSender, serialize_named_weights
from roll_vllm.errors import ConfigurationError, WeightUpdateError
from roll_vllm.transfer import bucket, shared_memory
from roll_vllm.transfer.manifest import ELEMENT_SIZE, BucketManifest
from roll_vllm.transfer.session import WeightUpdate
from roll_vllm.transfer.shared_memory import Segment
from roll_vllm.worker.checksums import checksum

Tensors = dict[str, torch.Tensor]


def read(payload: bytes) -> Tensors:
    """The tensors of a payload, as a worker maps them."""
    manifest = BucketManifest.decode(payload)
    memory = shared_memory.attach(manifest.segment, manifest.size)
    return {
        p.spec.name: memory[p.offset : p.end].view(getattr(torch, p.spec.dtype)).view(p.spec.shape)
        for p in manifest.placements
    }


def sums(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    return {name: (str(t.dtype), checksum(t), tuple(t.shape)) for name, t in tensors.items()}


def received(payloads: Iterator[bytes]) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """What an engine would have, bucket by bucket; each is read before the next is packed."""
    result = {}
    for payload in payloads:
        result.update(sums(read(payload)))
    return result


def sums_there(payload: bytes, directory: str) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    os.environ["ROLL_VLLM_SHM_DIR"] = directory
    return sums(read(payload))


def random_tensor(dtype: str, *shape: int, seed: int = 0) -> torch.Tensor:
    count = torch.Size(shape).numel() * ELEMENT_SIZE[dtype]
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (count,), generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.uint8).view(getattr(torch, dtype)).view(shape)


def mixed() -> Tensors:
    """Every dtype beside every other, with odd sizes, a scalar, nothing at all."""
    tensors = {}
    for number, dtype in enumerate([*ELEMENT_SIZE, *list(ELEMENT_SIZE)[::-1]]):
        tensors[f"{number}.{dtype}"] = random_tensor(dtype, number % 5, 3, seed=number)
    tensors["scalar"] = torch.tensor(2.5)
    return tensors


@pytest.fixture
def sender() -> Iterator[BucketSender]:
    with BucketSender(bucket_bytes=4096) as sender:
        yield sender


# --- packing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_bytes", [1, 24, 64, 100, 1000, 10**6])
def test_every_dtype_in_buckets_of_any_size(bucket_bytes: int) -> None:
    tensors = mixed()
    with BucketSender(bucket_bytes) as sender:
        assert received(sender.payloads(tensors)) == sums(tensors)
        assert received(sender.payloads(iter(tensors.items()))) == sums(tensors)


def test_every_dtype_beside_every_other(sender: BucketSender) -> None:
    for first in ELEMENT_SIZE:
        for second in ELEMENT_SIZE:
            tensors = {"a": random_tensor(first, 1), "b": random_tensor(second, 3, seed=1), "c": torch.ones(2)}
            (payload,) = sender.payloads(tensors)
            assert sums(read(payload)) == sums(tensors)


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.T,
        lambda t: t[:, 1:3],
        lambda t: t[::2],
        lambda t: t[1:],
        lambda t: t[0].expand(3, 6),
        lambda t: t.unfold(1, 3, 1),
        lambda t: torch.nn.Parameter(t.T),
        lambda t: torch.nn.Parameter(t) * 2,
    ],
)
def test_tensors_of_any_layout(sender: BucketSender, layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = layout(torch.randn(4, 6))
    (payload,) = sender.payloads({"a": tensor})
    assert torch.equal(read(payload)["a"], tensor)
    assert read(payload)["a"].is_contiguous()


def test_the_bucket_s_size_is_the_limit(sender: BucketSender) -> None:
    tensors = {str(number): torch.full((100,), float(number)) for number in range(50)}
    manifests = [BucketManifest.decode(payload) for payload in sender.payloads(tensors)]
    assert len({manifest.segment for manifest in manifests}) == 1
    assert all(manifest.size <= 4096 for manifest in manifests)
    assert [len(manifest.placements) for manifest in manifests] == [9, 9, 9, 9, 9, 5]
    assert [p.spec.name for manifest in manifests for p in manifest.placements] == list(tensors)


def test_a_larger_tensor_gets_a_larger_bucket(sender: BucketSender, segments: Path) -> None:
    tensors = {"a": torch.randn(3), "large": torch.randn(5000), "b": torch.randn(3)}
    sizes = [BucketManifest.decode(payload).size for payload in sender.payloads(tensors)]
    assert sizes == [64, 20032, 20032]
    assert received(sender.payloads(tensors)) == sums(tensors)
    assert len(list(segments.iterdir())) == 1


def test_tensors_are_taken_when_needed(sender: BucketSender) -> None:
    """A trainer gathers its tensors one by one; only one bucket of them is held."""
    taken = 0

    def gathering() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal taken
        for number in range(30):
            taken += 1
            yield str(number), torch.zeros(1024)

    payloads = sender.payloads(gathering())
    for number in range(29):
        next(payloads)
        assert taken == number + 2


def test_nothing_to_send(sender: BucketSender, segments: Path) -> None:
    assert list(sender.payloads({})) == []
    assert list(segments.iterdir()) == []


@pytest.mark.parametrize("bucket_bytes", [0, -1])
def test_a_bucket_without_size(bucket_bytes: int) -> None:
    with pytest.raises(ConfigurationError, match="bucket_bytes must be a positive number of bytes"):
        BucketSender(bucket_bytes)


def test_a_dtype_that_cannot_travel(sender: BucketSender) -> None:
    with pytest.raises(WeightUpdateError, match=r"torch\.complex64 cannot be sent"):
        list(sender.payloads({"a": torch.zeros(1, dtype=torch.complex64)}))


def test_later_sends_see_new_values(sender: BucketSender) -> None:
    weight = torch.nn.Parameter(torch.zeros(10))
    for step in range(3):
        with torch.no_grad():
            weight.add_(1)
        assert received(sender.payloads({"w": weight})) == sums({"w": torch.full((10,), step + 1.0)})


# --- sharing ---------------------------------------------------------------------------------------------


class Trained(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.layer = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
        self.head = torch.nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3, dtype=torch.int64))


def test_shared_tensors_are_sent_where_they_lie(sender: BucketSender, segments: Path) -> None:
    model = Trained()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    before = sums(tensors)
    sender.share(tensors)
    assert sums(tensors) == before
    (payload,) = sender.payloads(tensors)
    assert sums(read(payload)) == before
    assert len(list(segments.iterdir())) == 1, "nothing was packed"
    read(payload)["embed.weight"][0, 0] = 77
    assert model.embed.weight[0, 0] == 77


def test_sharing_keeps_objects_ties_gradients_and_training(sender: BucketSender) -> None:
    model = Trained()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sender.share(model.named_parameters(remove_duplicate=False))
    assert dict(model.named_parameters()) == parameters
    assert model.head.weight is model.embed.weight
    for _ in range(3):
        before = sums(parameters)
        model.head(model.layer(model.embed(torch.tensor([1, 2])).bfloat16()).float()).sum().backward()
        optimizer.step()
        (payload,) = sender.payloads(parameters)
        assert sums(read(payload)) == sums(parameters)
        assert all(sums(parameters)[name] != before[name] for name in parameters)
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in model.parameters())


def test_tensors_of_one_storage_stay_together(sender: BucketSender) -> None:
    whole = torch.randn(4, 6)
    tensors = {"whole": whole, "row": whole[2], "column": whole[:, 1], "T": whole.T, "bits": whole.view(torch.int32)}
    before = sums(tensors)
    sender.share(tensors)
    assert sums(tensors) == before
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1
    whole.fill_(5)
    assert all(tensors[name].eq(5).all() for name in ("row", "column", "T"))
    assert received(sender.payloads(tensors)) == sums(tensors)


def test_sharing_again_changes_nothing(sender: BucketSender, segments: Path) -> None:
    whole = torch.randn(4, 6)
    tensors = {"whole": whole, "T": whole.T, "empty": torch.empty(0)}
    sender.share(tensors)
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    sender.share(tensors)
    sender.share([("T", tensors["T"])])
    assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == places
    assert len(list(segments.iterdir())) == 1
    late = torch.randn(3)
    sender.share(tensors | {"late": late})
    assert len(list(segments.iterdir())) == 2
    everything = tensors | {"late": late}
    assert received(sender.payloads(everything)) == sums(everything)


def test_every_dtype_can_be_shared(sender: BucketSender) -> None:
    tensors = mixed() | {"same": torch.ones(3)}
    before = sums(tensors)
    sender.share(tensors)
    assert sums(tensors) == before
    assert received(sender.payloads(tensors)) == before


def test_a_storage_with_a_rest(sender: BucketSender) -> None:
    tensor = torch.frombuffer(bytearray(range(10)), dtype=torch.uint8)[:8].view(torch.float32)
    before = sums({"a": tensor})
    sender.share({"a": tensor})
    assert sums({"a": tensor}) == before == received(sender.payloads({"a": tensor}))


def test_shared_and_other_tensors_in_one_update(sender: BucketSender) -> None:
    shared, other = {"a": torch.randn(5), "b": torch.randn(6)}, {"c": torch.randn(7)}
    sender.share(shared)
    payloads = list(sender.payloads(other | shared))
    assert [set(read(payload)) for payload in payloads] == [{"c"}, {"a", "b"}]
    assert received(sender.payloads(shared | other)) == sums(shared | other)


def test_only_cpu_tensors_can_be_shared(sender: BucketSender, segments: Path) -> None:
    first = torch.ones(2)
    place = first.data_ptr()
    with pytest.raises(ConfigurationError, match="only CPU tensors can be shared, got one on meta"):
        sender.share({"a": first, "b": torch.ones(2, device="meta")})
    assert first.data_ptr() == place
    assert list(segments.iterdir()) == []


# --- ROLL's call -----------------------------------------------------------------------------------------


def test_serialize_named_weights(sender: BucketSender, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = mixed()
    assert sums(read(serialize_named_weights(tensors, sender=sender))) == sums(tensors)
    monkeypatch.setattr(bucket, "_default_sender", None)
    first = serialize_named_weights(list(tensors.items()), "vllm")
    second = serialize_named_weights({"b": torch.ones(3)})
    assert BucketManifest.decode(first).segment == BucketManifest.decode(second).segment
    assert torch.equal(read(second)["b"], torch.ones(3))
    with pytest.raises(ConfigurationError, match="infer_strategy must be 'vllm', got 'sglang'"):
        serialize_named_weights(tensors, "sglang")
    with pytest.raises(WeightUpdateError, match="named_weights is empty"):
        serialize_named_weights([])


class FakeReceiver:
    """Stands for an engine of two ranks: reads each bucket as it comes."""

    def __init__(self) -> None:
        self.received: dict[str, Any] = {}

    async def device_identities(self) -> list[str]:
        return ["", ""]

    async def update_parameter_in_bucket(self, serialized_named_tensors: list[bytes]) -> None:
        first, second = serialized_named_tensors
        assert first == second
        await asyncio.sleep(0.001)
        self.received.update(sums(read(first)))


def test_an_update_waits_for_each_bucket(sender: BucketSender) -> None:
    tensors = {str(number): torch.full((500,), float(number)) for number in range(20)}
    engine: Any = FakeReceiver()
    asyncio.run(WeightUpdate(engine, sender).send(tensors))
    assert engine.received == sums(tensors)


# --- segments --------------------------------------------------------------------------------------------


def test_closing_deletes_the_files(segments: Path) -> None:
    weight = torch.randn(5)
    before = weight.clone()
    with BucketSender(100) as sender:
        sender.share({"w": weight})
        (_, payload) = sender.payloads({"p": torch.ones(3), "w": weight})
        assert len(list(segments.iterdir())) == 2
        mapped = read(payload)
    assert list(segments.iterdir()) == []
    assert torch.equal(weight, before)
    assert torch.equal(mapped["w"], before)
    with pytest.raises(WeightUpdateError, match=r"is gone .*: keep the sender open until"):
        read(payload)
    sender.close()
    assert received(sender.payloads({"w": weight})) == sums({"w": before})
    sender.close()


def test_a_forgotten_sender_deletes_its_files(segments: Path) -> None:
    sender = BucketSender(100)
    list(sender.payloads({"a": torch.ones(3)}))
    assert len(list(segments.iterdir())) == 1
    del sender
    gc.collect()
    assert list(segments.iterdir()) == []


def test_files_are_private(segments: Path) -> None:
    segment = Segment(100)
    assert segment.path.parent == segments
    assert segment.path.stat().st_mode & 0o777 == 0o600
    assert segment.path.stat().st_size == 100
    assert shared_memory.attach(str(segment.path), 60).nbytes == 60
    assert Segment(0).memory.nbytes == shared_memory.attach(str(segment.path), 0).nbytes == 0


def test_files_that_no_process_holds_are_swept(segments: Path) -> None:
    swept = ["roll_vllm-1-ab12", f"roll_vllm-{os.getpid()}-ab12", f"roll_vllm-{10**30}-ab12"]
    kept = ["roll_vllm-1-xyz", "other-1-ab12", "roll_vllm-1-ab12.new"]
    for name in swept + kept:
        (segments / name).touch()
    stubborn = segments / "roll_vllm-1-cd34"  # stands for another user's: cannot be deleted
    stubborn.mkdir()
    held, segment = Segment(1), Segment(1)
    assert {path.name for path in segments.iterdir()} == {*kept, stubborn.name, held.path.name, segment.path.name}


def test_another_process_keeps_its_file(segments: Path) -> None:
    program = "import sys; from roll_vllm.transfer.shared_memory import Segment; s = Segment(9); "
    program += "print(s.path, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        path = Path(owner.stdout.readline().decode().strip())
        shared_memory.sweep()
        assert path.exists()
        owner.kill()
        owner.wait()
    shared_memory.sweep()
    assert not path.exists()


@pytest.mark.parametrize("ending", ["raise SystemExit", "os._exit(1)", "os.kill(os.getpid(), 9)"])
def test_no_ending_leaves_files_for_long(segments: Path, ending: str) -> None:
    program = f"import os; from roll_vllm.transfer.shared_memory import Segment; s = Segment(9); {ending}"
    subprocess.run([sys.executable, "-c", program], check=False)
    if ending == "raise SystemExit":
        assert list(segments.iterdir()) == []
    segment = Segment(1)
    assert list(segments.iterdir()) == [segment.path]


def test_a_forked_child_deletes_nothing(segments: Path) -> None:
    segment = Segment(9)
    child = os.fork()
    if not child:
        segment.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert list(segments.iterdir()) == [segment.path]


@pytest.mark.parametrize("missing", [False, True])
def test_no_room(segments: Path, monkeypatch: pytest.MonkeyPatch, missing: bool) -> None:
    if missing:
        monkeypatch.setenv("ROLL_VLLM_SHM_DIR", str(segments / "missing"))
    with pytest.raises(ConfigurationError, match=r"cannot reserve \d+ bytes .* bucket_bytes, or point ROLL_VLLM_SHM"):
        Segment(2**60)
    assert list(segments.iterdir()) == []


def test_no_room_for_a_bucket(segments: Path) -> None:
    with BucketSender(2**60) as sender:
        with pytest.raises(ConfigurationError, match="cannot reserve"):
            list(sender.payloads({"a": torch.ones(1).expand(2**40)}))
        assert list(segments.iterdir()) == []


def test_where_segments_live(monkeypatch: pytest.MonkeyPatch, segments: Path) -> None:
    assert shared_memory.directory() == segments
    for value in ("", None):
        if value is None:
            monkeypatch.delenv("ROLL_VLLM_SHM_DIR")
        else:
            monkeypatch.setenv("ROLL_VLLM_SHM_DIR", value)
        assert shared_memory.directory() == Path("/dev/shm") or not Path("/dev/shm").is_dir()


def test_only_segments_are_attached(segments: Path, tmp_path: Path) -> None:
    outside = tmp_path / "roll_vllm-1-ab"
    outside.write_bytes(b"secret")
    (segments / "other").write_bytes(b"secret")
    (segments / "below").mkdir()
    (segments / "below" / "roll_vllm-1-ab").write_bytes(b"secret")
    wrong = ["/etc/passwd", str(outside), f"{segments}/other", f"{segments}/below/roll_vllm-1-ab"]
    wrong += [f"{segments}/../roll_vllm-1-ab", f"{segments}/roll_vllm-1-ab\n", f"{segments}\0/roll_vllm-1-ab"]
    (segments / "roll_vllm-1-aa").mkdir()
    (segments / "roll_vllm-1-bb").symlink_to(outside)
    os.mkfifo(segments / "roll_vllm-1-cc")
    wrong += [f"{segments}/roll_vllm-1-{name}" for name in ("aa", "bb", "cc")]
    wrong += ["/" * 5000 + f"{segments}/roll_vllm-1-ab", f"{segments}/" + "a/../" * 2000 + "roll_vllm-1-ab"]
    wrong += ["roll_vllm-1-ab", "", ".", "/", "\ud800/roll_vllm-1-ab"]
    for path in wrong:
        with pytest.raises(WeightUpdateError, match="is not a shared-memory segment of roll_vllm"):
            shared_memory.attach(path, 1)


def test_a_segment_that_cannot_be_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_file(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to open file: Permission denied (13)")

    segment = Segment(100)
    monkeypatch.setattr(torch, "from_file", from_file)  # the permission of root cannot be taken away
    with pytest.raises(WeightUpdateError, match=r"cannot map the segment .*Permission denied.* as one user"):
        shared_memory.attach(str(segment.path), 100)


def test_a_segment_shorter_than_promised() -> None:
    segment = Segment(100)
    with pytest.raises(WeightUpdateError, match="has 100 bytes, its metadata says 101: pack the bucket again"):
        shared_memory.attach(str(segment.path), 101)


def test_a_link_to_the_directory(segments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = Segment(10)
    (tmp_path / "link").symlink_to(segments)
    monkeypatch.setenv("ROLL_VLLM_SHM_DIR", str(tmp_path / "link"))
    assert shared_memory.attach(str(segment.path), 10).nbytes == 10


# --- two processes ---------------------------------------------------------------------------------------


def test_another_process_reads_the_same(
    sender: BucketSender, segments: Path, other_process: ProcessPoolExecutor
) -> None:
    shared, packed = {"shared": torch.randn(1000)}, mixed()
    sender.share(shared)
    for step in range(3):
        shared["shared"].add_(step)
        tensors = packed | shared
        there: dict[str, Any] = {}
        for payload in sender.payloads(tensors):
            there.update(other_process.submit(sums_there, payload, str(segments)).result(60))
        assert there == sums(tensors)
    assert len(list(segments.iterdir())) == 2


def test_another_process_hears_that_the_sender_is_gone(segments: Path, other_process: ProcessPoolExecutor) -> None:
    with BucketSender(100) as sender:
        (payload,) = sender.payloads({"a": torch.ones(3)})
    with pytest.raises(WeightUpdateError, match="keep the sender open"):
        other_process.submit(sums_there, payload, str(segments)).result(60)
