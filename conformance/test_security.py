"""Nothing that comes from outside is executed, and nobody outside is listened to."""

from __future__ import annotations

import asyncio
import os
import pickle
import stat
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest

from conformance.oracles import assert_holds, pids, processes_of
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import BucketSender, CollectiveSender, RollVllmError
from roll_vllm.devices import Device
from roll_vllm.environment import free_port


@pytest.fixture
def vllm_model(vllm_model_factory: Callable[[str], Model]) -> Model:
    return vllm_model_factory("counting")


class Trap:
    """Makes a directory wherever it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._path,)


no_pickle = contract(
    "sec-no-foreign-pickle",
    "Payloads and arguments of calls are never unpickled: what would be is refused, and vLLM's own pickled calls are "
    "off in every process.",
    references=("sgl-project/sglang#11909", "vllm-project/vllm#35928", "InternLM/lmdeploy#4698"),
    needs=("runtime",),
)


@no_pickle
@pytest.mark.parametrize("adapter", [False, True], ids=["weights", "adapter"])
async def test_pickled_payloads_are_refused(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, tmp_path: Path, adapter: bool
) -> None:
    sprung = tmp_path / "sprung"
    ranks = vllm_engine.vllm_config.parallel_config.world_size
    for protocol in (0, pickle.HIGHEST_PROTOCOL):
        payload = pickle.dumps(Trap(sprung), protocol)
        with pytest.raises(RollVllmError):
            await asyncio.wait_for(vllm_engine.update_parameter_in_bucket([payload] * ranks, is_lora=adapter), 30)
        assert not sprung.exists(), "a payload was unpickled"
    pickle.loads(payload)
    assert sprung.exists(), "the trap does not work, so this test would prove nothing"
    await assert_holds(vllm_engine, vllm_trainer, vllm_trainer.reference_version)


@no_pickle
async def test_objects_in_calls_are_refused(vllm_engine: EngineHandle, vllm_trainer: Trainer, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap, engine = Trap(sprung), vllm_engine
    ranks = engine.vllm_config.parallel_config.world_size
    port = free_port()
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "payload": lambda: engine.update_parameter_in_bucket([trap] * ranks),
        "name": lambda: engine.broadcast_parameter([trap], ["float32"], [[1]], "group"),
        "dtype": lambda: engine.broadcast_parameter(["a"], [trap], [[1]], "group"),
        "shape": lambda: engine.broadcast_parameter(["a"], ["float32"], [trap], "group"),
        "group": lambda: engine.broadcast_parameter(["a"], ["float32"], [[1]], trap),
        "address": lambda: engine.setup_collective_group(trap, port, 1, 2, "group", "gloo"),
        "backend": lambda: engine.setup_collective_group("127.0.0.1", port, 1, 2, "group", trap),
        "tags": lambda: engine.load_states([trap]),
        "level": lambda: engine.offload_states(trap),
        "adapter": lambda: engine.add_lora({"r": trap}),
        "variables": lambda: engine.worker_environment([trap]),
        "delays": lambda: engine.ping([trap]),
        "method": lambda: engine.collective_rpc(trap),
        "argument": lambda: engine.collective_rpc("roll_vllm_call", args=("ping", [trap])),
        "nested argument": lambda: engine.collective_rpc("roll_vllm_call", args=("ping", [{"a": (1, {2: trap})}])),
        "keyword argument": lambda: engine.collective_rpc("roll_vllm_call", kwargs={"method": "ping", "args": trap}),
    }
    for name, call in calls.items():
        try:
            result = await asyncio.wait_for(call(), 30)
        except RollVllmError:
            result = None
        except Exception as error:
            pytest.fail(f"{name}: refused by accident: {error!r}")
        else:
            pytest.fail(f"{name}: taken, and answered {result!r}")
        assert not sprung.exists(), f"{name}: the object was unpickled in another process"
    assert not engine.errored
    await assert_holds(engine, vllm_trainer, vllm_trainer.reference_version)


@no_pickle
async def test_pickled_calls_are_off_everywhere(vllm_engine: EngineHandle) -> None:
    name = "VLLM_ALLOW_INSECURE_SERIALIZATION"
    for values in await vllm_engine.worker_environment([name]):
        assert values[name] == "0"
    for process in processes_of(vllm_engine):
        variables = process.environ()  # empty where the process has given itself a title
        assert not variables or variables.get(name) == "0", f"process {process.pid} has {name}={variables.get(name)}"


exposed = contract(
    "sec-control-not-exposed",
    "An engine on one host listens on loopback addresses and unix sockets only, its collective sender too; shared "
    "memory is readable by its owner alone.",
    references=("vllm-project/vllm#15444", "vllm-project/vllm#12366"),
    needs=("runtime",),
)


def listening(processes: Iterable[psutil.Process]) -> set[tuple[int, str, int]]:
    """Where the processes listen: process, address, port."""
    return {
        (process.pid, connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }


def assert_private(sockets: set[tuple[int, str, int]], device_kind: str) -> None:
    """Other hosts cannot connect to any of these sockets; on accelerators, to none that is open on all interfaces."""
    wildcards = ("0.0.0.0", "::")
    others = {
        one for one in sockets
        if (one[1] in wildcards if device_kind != "cpu" else not one[1].startswith(("127.", "::1", "::ffff:127.")))
    }  # fmt: skip
    assert not others, f"other hosts can connect to {sorted(others)} (process, address, port)"


@exposed
async def test_engine_listens_here_only(vllm_engine: EngineHandle, vllm_device: Device) -> None:
    workers = [psutil.Process(pid) for pid in await pids(vllm_engine)]
    processes = {process.pid: process for process in [*processes_of(vllm_engine), *workers]}
    if "ray" in sys.modules:  # which listens in this process, where V0 has a rank
        processes.pop(os.getpid(), None)
    assert_private(listening(processes.values()), vllm_device.kind)


@exposed
@pytest.mark.vllm_generation("V1")
async def test_sender_listens_here_only(vllm_engine: EngineHandle, vllm_device: Device) -> None:
    group: dict[str, Any] = {
        "master_address": "127.0.0.1",
        "master_port": free_port(),
        "group_name": f"group-{uuid.uuid4().hex}",
    }
    processes = [psutil.Process(), *processes_of(vllm_engine)]
    before = listening(processes)
    joining = vllm_engine.setup_collective_group(rank_offset=1, world_size=2, backend="gloo", **group)
    _, sender = await asyncio.gather(joining, asyncio.to_thread(CollectiveSender, world_size=2, **group))
    opened = listening(processes) - before
    sender.close()
    assert group["master_port"] in {port for _, _, port in opened}
    assert_private(opened, vllm_device.kind)


@exposed
async def test_shared_memory_is_private(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    weights = vllm_trainer.weights(vllm_trainer.reference_version)
    with BucketSender() as sender:
        async with vllm_engine.weight_update(sender=sender) as update:
            await update.send(weights)
            (bucket,) = sender._buckets.values()
            assert stat.S_IMODE(bucket.path.stat().st_mode) == 0o600
    workers = [psutil.Process(pid) for pid in await pids(vllm_engine)]
    own = os.getuid()
    for process in [*processes_of(vllm_engine), *workers]:
        for mapped in process.memory_maps(grouped=True):
            path = Path(mapped.path)
            if mapped.path.startswith("/dev/shm") and path.exists():
                found = path.stat()
                assert found.st_uid == own
                assert not stat.S_IMODE(found.st_mode) & 0o077, f"{path} can be opened by other users"
