"""The scheduler of V1 engines (``scheduler_cls``): vLLM's own, which also says when it could not do what was asked."""

from __future__ import annotations

from typing import Any, ClassVar

from roll_vllm import versions
from roll_vllm.patches import process

QUALNAME = f"{__name__}.RolloutScheduler"


class BlocksInUseError(RuntimeError):
    """The prefix cache was not emptied, because running requests hold blocks of it."""

    TEXT: ClassVar[str] = "roll_vllm: blocks of the prefix cache are in use"


def __getattr__(name: str) -> Any:
    # Made when the engine core asks for it: the frontend, too, imports this module.
    if name != "RolloutScheduler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # The engine core of 0.8.4 loads no general plugins.
    process.load()
    from vllm import __version__
    from vllm.v1.core.sched.scheduler import Scheduler

    core_drops_the_answer = versions.satisfies(__version__, "<0.12")

    class RolloutScheduler(Scheduler):
        """vLLM's scheduler; a prefix cache that was not emptied is an error where the engine core says nothing."""

        def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
            done: bool = super().reset_prefix_cache(*args, **kwargs)
            if not done and core_drops_the_answer:
                raise BlocksInUseError(BlocksInUseError.TEXT)
            return done

    globals()[name] = RolloutScheduler
    return RolloutScheduler
