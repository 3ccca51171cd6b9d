"""The collective transport between two processes: it arrives, or it ends in time with one kind of error."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from roll_vllm import CollectiveSender
from roll_vllm.environment import free_port
from roll_vllm.errors import ConfigurationError, WeightUpdateError
from roll_vllm.transfer import collective
from roll_vllm.transfer.collective import CollectiveGroup, receive, timeout
from roll_vllm.transfer.manifest import ELEMENT_SIZE, specs_from
from roll_vllm.worker.checksums import checksum

#: What gloo can carry; the 8-bit floats and int16 are for the device backends.
DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8"]

Description = dict[str, list[Any]]
Join = Callable[..., CollectiveSender]

groups: dict[str, CollectiveGroup] = {}


def join_there(port: int, world_size: int, name: str, limit: str = "60") -> None:
    os.environ["ROLL_VLLM_COLLECTIVE_TIMEOUT"] = limit
    torch.set_num_threads(1)
    groups[name] = CollectiveGroup("127.0.0.1", port, 1, world_size, name, "gloo")


def receive_there(name: str, description: Description) -> dict[str, str]:
    received = receive(groups[name], specs_from(**description), torch.device("cpu"))
    return {tensor_name: checksum(tensor) for tensor_name, tensor in received}


def receive_there_without_memory(name: str, description: Description) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", no_memory)
        receive(groups[name], specs_from(**description), torch.device("cpu"))


def no_memory(*args: Any, **kwargs: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 28 bytes")


def take_part_there(port: int, name: str, rank: int, refuses: bool) -> None:
    torch.set_num_threads(1)
    groups[name] = CollectiveGroup("127.0.0.1", port, rank, 3, name, "gloo", timedelta(seconds=60))
    for _ in range(2):
        groups[name].broadcast([torch.zeros(3)])
    if refuses:
        groups[name].refuse("no room")
    else:
        groups[name].broadcast([torch.zeros(2**22)])


def leave_there(name: str) -> None:
    groups.pop(name).close()


def tidy_there() -> tuple[bool, int]:
    return dist.is_initialized(), len(dist.distributed_c10d._world.pg_map)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def join(port: int, name: str, other_process: ProcessPoolExecutor) -> Iterator[Join]:
    """Joins both ends of a new group; the limit (seconds) holds on both sides."""
    joined = []

    def both(limit: str = "60", name: str = name) -> CollectiveSender:
        there = other_process.submit(join_there, port, 2, name, limit)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ROLL_VLLM_COLLECTIVE_TIMEOUT", limit)
            sender = CollectiveSender("127.0.0.1", port, 2, name)
        there.result(60)
        joined.append(sender)
        return sender

    yield both
    for sender in joined:
        sender.close()


def fails_within(seconds: float, call: Callable[[], object], message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(WeightUpdateError, match=message):
        call()
    assert time.monotonic() - begun < seconds


def test_tensors_arrive(join: Join, name: str, other_process: ProcessPoolExecutor) -> None:
    sender = join()
    for step in range(2):
        tensors = {dtype: torch.randint(-9, 9, (4, 6)).abs().to(getattr(torch, dtype)) + step for dtype in DTYPES} | {
            "scalar": torch.tensor(1.5),
            "transposed": torch.randn(3, 5).T,
            "parameter": torch.nn.Parameter(torch.randn(7)),
        }
        description = CollectiveSender.describe(tensors)
        assert description["names"] == list(tensors)
        assert description["dtypes"][:2] == ["float64", "float32"]
        assert description["shapes"][-2:] == [[5, 3], [7]]
        there = other_process.submit(receive_there, name, description)
        sender.send(iter(tensors.items()))
        assert there.result(60) == {tensor_name: checksum(tensor) for tensor_name, tensor in tensors.items()}
    other_process.submit(leave_there, name).result(60)


def test_a_name_can_be_used_again(join: Join, name: str, other_process: ProcessPoolExecutor) -> None:
    for value in range(2):
        sender = join()
        tensors = {"a": torch.full((3,), float(value))}
        there = other_process.submit(receive_there, name, CollectiveSender.describe(tensors))
        sender.send(tensors)
        assert there.result(60) == {"a": checksum(tensors["a"])}
        sender.close()
        other_process.submit(leave_there, name).result(60)


def test_two_groups_beside_each_other(port: int, join: Join, other_process: ProcessPoolExecutor) -> None:
    first, second = f"one-{uuid.uuid4().hex}", f"two-{uuid.uuid4().hex}"
    senders = {name: join(name=name) for name in (first, second)}
    for value, name in enumerate([second, first, second]):
        tensors = {"a": torch.full((3,), float(value))}
        there = other_process.submit(receive_there, name, CollectiveSender.describe(tensors))
        senders[name].send(tensors)
        assert there.result(60) == {"a": checksum(tensors["a"])}
    for name in senders:
        other_process.submit(leave_there, name).result(60)


def test_the_default_group_is_left_alone(join: Join, name: str, other_process: ProcessPoolExecutor) -> None:
    before = len(dist.distributed_c10d._world.pg_map)
    sender = join()
    assert not dist.is_initialized()
    sender.close()
    sender.close()
    assert len(dist.distributed_c10d._world.pg_map) == before
    other_process.submit(leave_there, name).result(60)
    assert other_process.submit(tidy_there).result(60) == (False, 0)


def send_and_leave(ports: Connection, name: str, sends: bool) -> None:
    """One end of groups of two that end as soon as their tensors are over, in a process that switches threads often."""
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    for number in range(100):
        if sends:
            ports.send(free_port())
            sender = CollectiveSender("127.0.0.1", ports.recv(), 2, f"{name}-{number}")
            for _ in range(2):
                sender.send({str(place): torch.full((3,), place) for place in range(8)})
            sender.close()
        else:
            port = ports.recv()
            ports.send(port)
            group = CollectiveGroup("127.0.0.1", port, 1, 2, f"{name}-{number}", "gloo")
            for _ in range(2):
                group.broadcast([torch.empty(3, dtype=torch.int64) for _ in range(8)])
            group.close()


def test_leaving_waits_for_nobody(name: str) -> None:
    """Threads of torch 2.6 want the interpreter's lock when a group goes, and waited for it for ever."""
    spawn = multiprocessing.get_context("spawn")
    ports = zip(spawn.Pipe(), (True, False), strict=True)
    ends = [spawn.Process(target=send_and_leave, args=(port, name, sends), daemon=True) for port, sends in ports]
    for end in ends:
        end.start()
    for end in ends:
        end.join(240)  # of which torch may have to wait for a resolver several times
    stuck = [end for end in ends if end.exitcode is None]
    for end in stuck:
        end.kill()
    assert [end.exitcode for end in ends] == [0, 0]


@pytest.mark.parametrize("late", [0, 1])
def test_a_late_rank_goes_by_what_the_other_found(
    port: int, name: str, late: int, other_process: ProcessPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One waited for an agreement that the other, who had given up waiting for its note, knew nothing of."""
    monkeypatch.setattr(collective, "_NOTES_S", 0.2 if late else 60)
    monkeypatch.setattr(CollectiveGroup, "_compare", arriving(0.0 if late else 2))
    there = other_process.submit(join_there_late, port, name, 60 if late else 0.2, 2 if late else 0.0)
    sender = CollectiveSender("127.0.0.1", port, 2, name)
    there.result(60)
    tensors = {"a": torch.arange(5.0)}
    received = other_process.submit(receive_there, name, CollectiveSender.describe(tensors))
    sender.send(tensors)
    assert received.result(20) == {"a": checksum(tensors["a"])}
    sender.close()
    other_process.submit(leave_there, name).result(60)


def arriving(seconds: float) -> Callable[[CollectiveGroup, str], bool]:
    """A comparison that begins only then."""
    compare = CollectiveGroup._compare

    def late(group: CollectiveGroup, backend: str) -> bool:
        time.sleep(seconds)
        return compare(group, backend)

    return late


def join_there_late(port: int, name: str, patience: float, seconds: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collective, "_NOTES_S", patience)
        patch.setattr(CollectiveGroup, "_compare", arriving(seconds))
        join_there(port, 2, name)


# --- together --------------------------------------------------------------------------------------------


def join_as_others_do(port: int, world_size: int, name: str) -> None:
    """As ROLL's trainers and OpenRLHF's do: torch's own group, and nothing else in its store."""
    from torch.distributed import PrefixStore, distributed_c10d
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous(f"tcp://127.0.0.1:{port}", 1, world_size, timeout=timedelta(seconds=60)))
    prefixed = PrefixStore(name, store)
    limit = timedelta(seconds=60)
    group, _ = distributed_c10d._new_process_group_helper(world_size, 1, [], "gloo", prefixed, name, timeout=limit)
    others[name] = group


def receive_as_others_do(name: str, count: int) -> list[float]:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    tensor = torch.empty(count)
    others[name].broadcast([tensor], options).wait()
    return list(tensor.tolist())


others: dict[str, Any] = {}


def test_a_rank_of_another_library(
    port: int, name: str, other_process: ProcessPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLL_VLLM_COLLECTIVE_TIMEOUT", "30")
    there = other_process.submit(join_as_others_do, port, 2, name)
    sender = CollectiveSender("127.0.0.1", port, 2, name)
    there.result(60)
    received = other_process.submit(receive_as_others_do, name, 3)
    sender.send({"a": torch.tensor([1.0, 2.0, 3.0])})
    assert received.result(60) == [1.0, 2.0, 3.0]
    sender.close()


def test_settings_that_differ(
    port: int, name: str, other_process: ProcessPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_DEVICE_TRANSPORT", "TCP")
    there = other_process.submit(join_there, port, 2, name)
    for join, other in ((lambda: CollectiveSender("127.0.0.1", port, 2, name), 1), (lambda: there.result(60), 0)):
        with pytest.raises(ConfigurationError) as caught:
            join()
        assert "GLOO_DEVICE_TRANSPORT is" in str(caught.value)
        assert "'TCP' on rank 0" in str(caught.value)
        assert "not set on rank 1" in str(caught.value)
        assert f"on rank {other}" in str(caught.value)


@pytest.mark.parametrize("kept", [slice(0, 1), slice(0, 0)])
def test_sides_that_differ(join: Join, name: str, other_process: ProcessPoolExecutor, kept: slice) -> None:
    sender = join()
    tensors = [("a", torch.zeros(3)), ("b", torch.zeros(2, 2))]
    there = other_process.submit(receive_there, name, CollectiveSender.describe(tensors))
    message = "failed on rank 0: rank 1 expects 2 tensors, 28 bytes in all.*; given are [01] tensors"
    fails_within(20, lambda: sender.send(tensors[kept]), message)
    fails_within(20, lambda: there.result(60), "failed on rank 1: rank 0 sends [01] tensors.*; expected are 2 tensors")
    other_process.submit(leave_there, name).result(60)


def test_a_rank_without_memory(join: Join, name: str, other_process: ProcessPoolExecutor) -> None:
    sender = join()
    tensors = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    there = other_process.submit(receive_there_without_memory, name, CollectiveSender.describe(tensors))
    message = r"failed on rank 0: rank 1 refused: it cannot take the 2 tensors \(CUDA out of memory.*\). The group is"
    fails_within(20, lambda: sender.send(tensors), message)
    with pytest.raises(torch.OutOfMemoryError):
        there.result(60)
    other_process.submit(leave_there, name).result(60)


def test_nobody_waits_for_a_rank_that_refuses(port: int, name: str, other_process: ProcessPoolExecutor) -> None:
    """Rank 2 has room, and would wait for tensors that rank 0 does not send."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as third:
        one = other_process.submit(take_part_there, port, name, 1, True)
        two = third.submit(take_part_there, port, name, 2, False)
        fails_within(60, lambda: take_part_there(port, name, 0, False), "failed on rank 0: rank 1 refused: no room")
        one.result(60)
        fails_within(20, lambda: two.result(60), "failed on rank 2: rank 1 refused: no room")
        for process in (third, other_process):
            process.submit(leave_there, name).result(60)
    leave_there(name)


def test_the_store_listens_at_its_address(join: Join, name: str, port: int, other_process: ProcessPoolExecutor) -> None:
    join()
    connections = psutil.Process().net_connections(kind="inet")
    listening = {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN and one.laddr.port == port}
    assert listening == {"127.0.0.1"}
    other_process.submit(leave_there, name).result(60)


def test_interfaces() -> None:
    variable = "GLOO_SOCKET_IFNAME"
    assert collective._interface("127.0.0.1", {}) in ({variable: "lo"}, {})  # not every system calls it so
    assert collective._interface("127.0.0.1", {variable: "eth0"}) == {}
    assert collective._interface("10.0.0.7", {}) == {}
    assert collective._interface("10.0.0.7", {variable: "eth0"}) == {}
    assert collective._interface("10.0.0.7", {variable: "lo"}) == {variable: None}


# --- in time ---------------------------------------------------------------------------------------------


def test_nobody_joins_the_sender(port: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLL_VLLM_COLLECTIVE_TIMEOUT", "1")
    message = rf"rank 0 of 2 could not join collective group '{name}' at tcp://127\.0\.0\.1:{port} with gloo within 1 s"
    fails_within(5, lambda: CollectiveSender("127.0.0.1", port, 2, name), message)


def test_there_is_no_sender(port: int, name: str, other_process: ProcessPoolExecutor) -> None:
    there = other_process.submit(join_there, port, 2, name, "1")
    fails_within(10, lambda: there.result(60), "rank 1 of 2 could not join .* Start every rank with the same address")


def test_a_port_that_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLL_VLLM_COLLECTIVE_TIMEOUT", "1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        fails_within(10, lambda: CollectiveSender("127.0.0.1", port, 2, name), "rank 0 of 2 could not join")


def test_an_unknown_backend(port: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLL_VLLM_COLLECTIVE_TIMEOUT", "1")
    fails_within(5, lambda: CollectiveSender("127.0.0.1", port, 1, name, "pigeon"), "with pigeon within")


def test_nobody_receives(join: Join, name: str, other_process: ProcessPoolExecutor) -> None:
    sender = join("2")
    # More than the sockets buffer: a small broadcast leaves without anybody receiving it.
    large = {"a": torch.zeros(2**24)}
    message = rf"broadcast in collective group '{name}' failed on rank 0: .*under another group_name, then send a full"
    fails_within(10, lambda: sender.send(large), message)
    other_process.submit(leave_there, name).result(60)


def test_nobody_sends(join: Join, name: str, other_process: ProcessPoolExecutor) -> None:
    join("2")
    description = CollectiveSender.describe({"a": torch.zeros(3)})
    there = other_process.submit(receive_there, name, description)
    fails_within(10, lambda: there.result(60), "failed on rank 1")
    other_process.submit(leave_there, name).result(60)


def test_the_sender_leaves(join: Join, name: str, other_process: ProcessPoolExecutor) -> None:
    sender = join("20")
    description = CollectiveSender.describe({"a": torch.zeros(3)})
    there: Future[object] = other_process.submit(receive_there, name, description)
    threading.Timer(0.5, sender.close).start()
    fails_within(10, lambda: there.result(60), "failed on rank 1")
    other_process.submit(leave_there, name).result(60)


def test_sending_after_leaving(join: Join, name: str, other_process: ProcessPoolExecutor) -> None:
    sender = join()
    sender.close()
    fails_within(1, lambda: sender.send({"a": torch.zeros(1)}), rf"collective group '{name}' is closed")
    other_process.submit(leave_there, name).result(60)


# --- the limit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seconds"), [("1", 1), ("0.25", 0.25), (" 7 ", 7), ("1e3", 1000)])
def test_the_limit(monkeypatch: pytest.MonkeyPatch, text: str, seconds: float) -> None:
    monkeypatch.setenv("ROLL_VLLM_COLLECTIVE_TIMEOUT", text)
    assert timeout() == timedelta(seconds=seconds)


def test_the_limit_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROLL_VLLM_COLLECTIVE_TIMEOUT", raising=False)
    assert timeout() == timedelta(seconds=120)


@pytest.mark.parametrize("text", ["", "0", "-1", "soon", "nan", "inf", "-inf", "1e300", "1e-300", "1 s"])
def test_a_limit_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ROLL_VLLM_COLLECTIVE_TIMEOUT", text)
    with pytest.raises(ConfigurationError, match="must be a positive number of seconds, got"):
        timeout()


def test_a_dtype_that_cannot_travel() -> None:
    assert set(DTYPES) < set(ELEMENT_SIZE)
    with pytest.raises(WeightUpdateError, match="cannot be sent"):
        CollectiveSender.describe({"a": torch.zeros(1, dtype=torch.complex64)})
