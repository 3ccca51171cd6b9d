"""Breakages inside the worker process, switched on and off by a remote call.

The proof starts its engines with :class:`SabotagedExtension`; until a breakage is switched on it is the
honest extension.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from typing import Any
from unittest.mock import patch

from conformance.worker import SuiteExtension
from roll_vllm import environment, factory
from roll_vllm.patches import process

QUALNAME = f"{__name__}.SabotagedExtension"

#: Set for a whole engine: its workers start processes that outlive them.
LITTERING = "ROLL_VLLM_SABOTAGE_LITTERING"


#: Set for a whole engine: its workers take the runtime's patches back.
UNPATCHED = "ROLL_VLLM_SABOTAGE_UNPATCHED"


#: Set for a whole engine: it takes this port, whoever has it.
SAME_PORT = "ROLL_VLLM_SABOTAGE_PORT"

#: Set for a whole engine: it has this seed, if it is given none.
ONE_SEED = "ROLL_VLLM_SABOTAGE_SEED"

# In a script, which imports this before it chooses.
if SAME_PORT in os.environ:
    environment.free_port = lambda: int(os.environ[SAME_PORT])
if ONE_SEED in os.environ:
    factory._own_seed = lambda: int(os.environ[ONE_SEED])


#: Set for a whole engine: the breakage that its workers begin with, for contracts that start engines themselves.
FROM_START = "ROLL_VLLM_SABOTAGE_FROM_START"

#: Set for a whole engine: its workers take the runtime's patches back before they profile their device's memory.
UNBEARING = "ROLL_VLLM_SABOTAGE_UNBEARING"

if UNBEARING in os.environ:  # in a worker, which has loaded its plugins when it imports this
    process.undo_here()


class SabotagedExtension(SuiteExtension):
    """The worker extension, with a switch."""

    def roll_vllm_init(self, initial: str, frontend: int) -> None:
        super().roll_vllm_init(initial, frontend)
        if LITTERING in os.environ:
            _leave_a_child_behind()
        if UNPATCHED in os.environ:
            process.undo_here()
        if FROM_START in os.environ:
            self.roll_vllm_sabotage(os.environ[FROM_START])

    def roll_vllm_sabotage(self, name: str) -> None:
        runtime = vars(self)["roll_vllm_runtime"]
        stack = vars(self)["roll_vllm_sabotage_stack"] = ExitStack()
        for context in BREAKAGES[name](runtime):
            stack.enter_context(context)

    def roll_vllm_heal(self) -> None:
        vars(self)["roll_vllm_sabotage_stack"].close()


def _leave_a_child_behind() -> None:
    import subprocess

    subprocess.Popen(["sleep", "60"])


def replaying(runtime: Any, change: Callable[[Any], Any]) -> Sequence[Any]:
    """What goes by route is what ``change`` makes of the pairs that were sent."""
    loader = runtime._loader
    replay = loader._replay
    return [patch.object(loader, "_replay", lambda plan: replay(loader._plan(change(plan.pairs))))]


def skip_one_tensor(runtime: Any) -> Sequence[Any]:
    """One tensor of every replayed update stays as it was."""
    return replaying(runtime, lambda pairs: [pair for pair in pairs if "layers.1.mlp.down" not in pair[0]])


def swap_gate_and_up(runtime: Any) -> Sequence[Any]:
    """gate_proj goes where up_proj belongs, and the other way round."""
    loader = runtime._loader
    load = loader.load

    def other(name: str) -> str:
        swapped = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        return next((name.replace(one, two) for one, two in swapped.items() if one in name), name)

    return [patch.object(loader, "load", lambda pairs: load([(other(name), tensor) for name, tensor in pairs]))]


def add_instead_of_copy(runtime: Any) -> Sequence[Any]:
    """Each further load adds a little of what was there before."""
    loads = itertools.count()

    def adding(pairs: Any) -> Any:
        more = 0.001 * next(loads)
        return [(name, tensor + more) for name, tensor in pairs]

    return replaying(runtime, adding)


def round_the_weights(runtime: Any) -> Sequence[Any]:
    """Weights arrive a little off, as after a wrong cast."""
    return replaying(runtime, lambda pairs: [(name, tensor * 1.02) for name, tensor in pairs])


def ignore_unknown_names(runtime: Any) -> Sequence[Any]:
    """Tensors that match nothing are dropped without a word, and what is missing is not missed."""
    loader = runtime._loader
    load = loader.load

    def lenient(pairs: Any) -> None:
        load([(name, tensor) for name, tensor in pairs if name in loader._routes])

    return [patch.object(loader, "load", lenient), patch.object(loader, "missing", list)]


def lose_updates_while_asleep(runtime: Any) -> Sequence[Any]:
    """An update that finds the engine asleep is acknowledged and forgotten."""
    loader, memory = runtime._loader, runtime._memory
    replay = loader._replay
    return [patch.object(loader, "_replay", lambda plan: None if memory.sleeping else replay(plan))]


def skip_updates_on_one_rank(runtime: Any) -> Sequence[Any]:
    """The last rank acknowledges every update and keeps its weights."""
    return [patch.object(runtime._loader, "_replay", lambda plan: None)] if runtime._worker.rank == 1 else []


def acknowledge_early_on_one_rank(runtime: Any) -> Sequence[Any]:
    """The last rank acknowledges a bucket, and copies it when the sender may have filled it with the next one."""
    loader, late = runtime._loader, []
    replay, finish = loader._replay, loader.finish

    def finishing() -> None:
        for plan in late:
            replay(plan)
        late.clear()
        finish()

    if runtime._worker.rank != 1:
        return []
    return [patch.object(loader, "_replay", late.append), patch.object(loader, "finish", finishing)]


def damage_weights_at_wake(runtime: Any) -> Sequence[Any]:
    """Waking writes over a weight that was never asleep."""
    wake = runtime._memory.wake

    def damaging(tags: Any) -> Any:
        woken = wake(tags)
        next(runtime._model.parameters()).data.view(-1)[:64] = 0.5
        return woken

    return [patch.object(runtime._memory, "wake", damaging)]


def forget_buffers(runtime: Any) -> Sequence[Any]:
    """Level 2 loses the rotary tables."""
    sleep = runtime._memory.sleep

    def forgetting(level: int) -> None:
        sleep(level)
        for buffer in runtime._model.buffers() if level == 2 else ():
            kept.append((buffer, buffer.clone()))
            buffer.zero_()

    kept: list[Any] = []
    return [patch.object(runtime._memory, "sleep", forgetting), _restoring(kept)]


class _restoring:
    """Puts tensors back on leaving."""

    def __init__(self, kept: list[Any]) -> None:
        self._kept = kept

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for tensor, before in reversed(self._kept):
            tensor.copy_(before)


def wake_every_tag(runtime: Any) -> Sequence[Any]:
    """Any wake wakes everything."""
    wake = runtime._memory.wake
    return [patch.object(runtime._memory, "wake", lambda tags: wake(["weights", "kv_cache"]))]


class _Pretender:
    """Notes what sleeps, and gives nothing back."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self._asleep: set[str] = set()

    @property
    def sleeping(self) -> frozenset[str]:
        return frozenset(self._asleep)

    def sleep(self, level: int) -> None:
        self._asleep.update(["kv_cache"] if level == 1 else ["kv_cache", "weights"])

    def wake(self, tags: Any) -> frozenset[str]:
        woken = self._asleep & set(tags)
        self._asleep -= woken
        return frozenset(woken)

    def resident_bytes(self) -> dict[str, int]:
        held = self._memory.resident_bytes()
        return {tag: 0 if tag in self._asleep else size for tag, size in held.items()}


def keep_the_memory(runtime: Any) -> Sequence[Any]:
    """Sleep notes that it slept, but gives nothing back."""
    return [patch.object(runtime, "_memory", _Pretender(runtime._memory))]


def choke_on_the_second_sleep(runtime: Any) -> Sequence[Any]:
    """Sleeping twice is an error of the allocator."""
    from roll_vllm.errors import EngineAsleepError

    sleep, memory = runtime._memory.sleep, runtime._memory

    def once(level: int) -> None:
        if memory.sleeping:
            raise EngineAsleepError("double free")
        sleep(level)

    return [patch.object(memory, "sleep", once)]


def call_destroyed_weights_complete(runtime: Any) -> Sequence[Any]:
    """After level 2 the worker still says that its weights are complete."""
    from roll_vllm.state import WeightsStatus

    sleep = runtime.sleep

    def lying(level: int) -> Any:
        sleep(level)
        runtime._status = WeightsStatus.COMPLETE
        return runtime.state()

    return [patch.object(runtime, "sleep", lying)]


def try_a_forward_pass_while_asleep(runtime: Any) -> Sequence[Any]:
    """Going to sleep ends with a step of the scheduler, as of one that nobody has stopped."""
    sleep = runtime.sleep

    def restless(level: int) -> Any:
        sleep(level)
        threading.Timer(0.1, step).start()
        return runtime.state()

    def step() -> None:
        with suppress(Exception):
            runtime._worker.execute_model(None)

    return [patch.object(runtime, "sleep", restless)]


def keep_one_expert(runtime: Any) -> Sequence[Any]:
    """One of the experts of every layer stays as it was."""
    return replaying(runtime, lambda pairs: [pair for pair in pairs if ".experts.2." not in pair[0]])


def swap_gate_and_up_of_experts(runtime: Any) -> Sequence[Any]:
    """The halves of stacked experts stand in the wrong order, as kernels want them that vLLM swaps them for."""
    finish = runtime.finish_update

    def swapping() -> Any:
        report = finish()
        for name, parameter in runtime._model.named_parameters():
            if name.endswith("w13_weight"):
                parameter.data.copy_(parameter.data.roll(parameter.shape[1] // 2, dims=1))
        return report

    return [patch.object(runtime, "finish_update", swapping)]


class _Moving:
    """Puts parameters back where they were."""

    def __init__(self, runtime: Any) -> None:
        self._before = [(parameter, parameter.data) for parameter in runtime._model.parameters()]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for parameter, data in self._before:
            parameter.data = data


def move_the_parameters(runtime: Any) -> Sequence[Any]:
    """After an update every parameter lies somewhere else."""
    finish = runtime.finish_update

    def moving() -> Any:
        report = finish()
        for parameter in runtime._model.parameters():
            parameter.data = parameter.data.clone()
        return report

    return [_Moving(runtime), patch.object(runtime, "finish_update", moving)]


def forget_the_drafter(runtime: Any) -> Sequence[Any]:
    """An update does not look whether there is a drafter."""
    begin, runner = runtime.begin_update, runtime._worker.model_runner

    def careless() -> Any:
        drafter = vars(runner).pop("drafter", None)
        try:
            return begin()
        finally:
            if drafter is not None:
                runner.drafter = drafter

    return [patch.object(runtime, "begin_update", careless)]


def keep_the_scales(runtime: Any) -> Sequence[Any]:
    """Quantised weights are taken over, their scales are not."""
    from roll_vllm.worker import refit

    pairs = refit._pairs
    return [patch.object(refit, "_pairs", lambda *models: [p for p in pairs(*models) if p[0].numel() > 1])]


def keep_a_quantised_weight(runtime: Any) -> Sequence[Any]:
    """Of the quantised weights one is left as it was."""
    from roll_vllm.worker import refit

    pairs = refit._pairs

    def without_one(*models: Any) -> Any:
        found = list(pairs(*models))
        del found[next(i for i, pair in enumerate(found) if "float8" in str(pair[0].dtype))]
        return found

    return [patch.object(refit, "_pairs", without_one)]


def keep_half_of_a_failed_wake(runtime: Any) -> Sequence[Any]:
    """A wake that fails leaves the state as if it had not."""
    from roll_vllm.errors import EngineOutOfMemoryError

    memory = runtime._memory
    wake, sizes = memory.wake, {}

    def half(tags: Any) -> Any:
        asleep = dict(memory._sizes)
        try:
            return wake(tags)
        except EngineOutOfMemoryError:
            sizes.update(asleep)
            memory._sizes.clear()
            raise

    return [patch.object(memory, "wake", half), _putting_back(memory._sizes, sizes)]


class _putting_back:
    """Adds entries to a mapping on leaving, as they are then."""

    def __init__(self, mapping: dict[Any, Any], entries: dict[Any, Any]) -> None:
        self._mapping, self._entries = mapping, entries

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._mapping.update(self._entries)


def leak_a_little_at_every_sleep(runtime: Any) -> Sequence[Any]:
    """Each sleep keeps eight MiB."""
    sleep, kept = runtime.sleep, []

    def leaking(level: int) -> Any:
        kept.append(b"\1" * (8 * 2**20))
        return sleep(level)

    return [patch.object(runtime, "sleep", leaking)]


def leave_a_descriptor_open_at_every_wake(runtime: Any) -> Sequence[Any]:
    """Each wake opens a file, and never closes it."""
    wake, files = runtime.wake, ExitStack()

    def opening(tags: Any) -> Any:
        files.enter_context(open(os.devnull))
        return wake(tags)

    return [patch.object(runtime, "wake", opening), files]


def stay_in_lost_groups(runtime: Any) -> Sequence[Any]:
    """The group of an update that failed is kept."""
    return [patch.object(runtime, "leave_group", lambda group_name: None)]


def compare_nothing(runtime: Any) -> Sequence[Any]:
    """Collective groups are made without a look at the other ranks."""
    return [patch("roll_vllm.transfer.collective.CollectiveGroup._compare", lambda *_: False)]


def explain_no_lack_of_memory(runtime: Any) -> Sequence[Any]:
    """Errors of the allocator come as they are."""
    return [patch(f"{type(runtime).__module__}.out_of_memory_explained", lambda action: nullcontext())]


def unpickle_payloads(runtime: Any) -> Sequence[Any]:
    """A payload that is not known is tried as a pickle, as ROLL's and SGLang's are."""
    import pickle

    receive = runtime.receive_bucket

    def trusting(payloads: Any, is_lora: bool = False) -> Any:
        with suppress(Exception):
            pickle.loads(payloads[0])
        return receive(payloads, is_lora)

    return [patch.object(runtime, "receive_bucket", trusting)]


def listen_everywhere(runtime: Any) -> Sequence[Any]:
    """The worker takes connections from any host."""
    import socket

    listener = socket.socket()
    listener.bind(("0.0.0.0", 0))
    listener.listen()
    return [listener]


def keep_what_was_sent(runtime: Any) -> Sequence[Any]:
    """What was loaded stays on the device a second time."""
    load, kept = runtime._load, []

    def keeping(pairs: Any) -> Any:
        kept.extend(tensor.to(runtime._device, copy=True) for _, tensor in pairs)
        return load(pairs)

    return [patch.object(runtime, "_load", keeping)]


def keep_senders_memory(runtime: Any) -> Sequence[Any]:
    """Device memory of senders stays mapped, whether they want it back or not."""
    attach, kept = runtime._mapped._attach, []

    def keeping(manifest: Any) -> Any:
        kept.append(attach(manifest))
        return kept[-1]

    return [patch.object(runtime._mapped, "_attach", keeping)]


def reset_scales_at_wake(runtime: Any) -> Sequence[Any]:
    """The scales of the KV cache are 1.0 after each wake."""
    from roll_vllm.worker.memory import _kv_scales

    wake = runtime._memory.wake

    def resetting(tags: Any) -> Any:
        woken = wake(tags)
        for scale in _kv_scales(runtime._worker) if "kv_cache" in woken else ():
            scale.fill_(1.0)
        return woken

    return [patch.object(runtime._memory, "wake", resetting)]


BREAKAGES: dict[str, Callable[[Any], Sequence[Any]]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        skip_one_tensor,
        swap_gate_and_up,
        add_instead_of_copy,
        round_the_weights,
        ignore_unknown_names,
        lose_updates_while_asleep,
        skip_updates_on_one_rank,
        acknowledge_early_on_one_rank,
        damage_weights_at_wake,
        forget_buffers,
        wake_every_tag,
        keep_the_memory,
        choke_on_the_second_sleep,
        call_destroyed_weights_complete,
        keep_one_expert,
        swap_gate_and_up_of_experts,
        move_the_parameters,
        forget_the_drafter,
        keep_the_scales,
        keep_a_quantised_weight,
        try_a_forward_pass_while_asleep,
        keep_half_of_a_failed_wake,
        leak_a_little_at_every_sleep,
        leave_a_descriptor_open_at_every_wake,
        stay_in_lost_groups,
        compare_nothing,
        explain_no_lack_of_memory,
        unpickle_payloads,
        listen_everywhere,
        keep_what_was_sent,
        keep_senders_memory,
        reset_scales_at_wake,
    )
} | {
    # The same for other engines.
    "damage-weights-at-every-wake": damage_weights_at_wake,
    "move-what-graphs-read": move_the_parameters,
    "skip-a-tensor-of-another-process": skip_one_tensor,
}
