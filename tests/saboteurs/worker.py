"""Breakages inside the worker process, switched on and off by a remote call.

The proof starts its engines with :class:`SabotagedExtension`; until a breakage is switched on it is the
honest extension.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from roll_vllm.patches import process
from roll_vllm.worker.extension import RollVllmWorkerExtension

QUALNAME = f"{__name__}.SabotagedExtension"

#: Set for a whole engine, parents and children: no process watches its parent.
UNWATCHED = "ROLL_VLLM_SABOTAGE_UNWATCHED"


#: Set for a whole engine: its workers take the runtime's patches back.
UNPATCHED = "ROLL_VLLM_SABOTAGE_UNPATCHED"


class SabotagedExtension(RollVllmWorkerExtension):
    """The worker extension, with a switch."""

    def roll_vllm_init(self, initial: str, frontend: int) -> None:
        with patch("roll_vllm.worker.lifeline.watch_parent") if UNWATCHED in os.environ else ExitStack():
            super().roll_vllm_init(initial, frontend)
        if UNWATCHED in os.environ:
            _leave_a_child_behind()
        if UNPATCHED in os.environ:
            process.undo_here()

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


def skip_one_tensor(runtime: Any) -> Sequence[Any]:
    """One tensor of every replayed update stays as it was."""
    loader = runtime._loader
    replay = loader._replay
    return [
        patch.object(loader, "_replay", lambda pairs: replay([p for p in pairs if "layers.1.mlp.down" not in p[0]]))
    ]


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
    loader = runtime._loader
    replay = loader._replay

    def adding(pairs: Any) -> None:
        replay([(name, tensor + 0.001 * loader.loads) for name, tensor in pairs])
        loader.loads += 1

    loader.loads = 0
    return [patch.object(loader, "_replay", adding)]


def round_the_weights(runtime: Any) -> Sequence[Any]:
    """Weights arrive a little off, as after a wrong cast."""
    loader = runtime._loader
    replay = loader._replay
    return [patch.object(loader, "_replay", lambda pairs: replay([(name, tensor * 1.02) for name, tensor in pairs]))]


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
    return [patch.object(loader, "_replay", lambda pairs: None if memory.sleeping else replay(pairs))]


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


BREAKAGES: dict[str, Callable[[Any], Sequence[Any]]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        skip_one_tensor,
        swap_gate_and_up,
        add_instead_of_copy,
        round_the_weights,
        ignore_unknown_names,
        lose_updates_while_asleep,
        damage_weights_at_wake,
        forget_buffers,
        wake_every_tag,
        keep_the_memory,
        choke_on_the_second_sleep,
        call_destroyed_weights_complete,
    )
}
