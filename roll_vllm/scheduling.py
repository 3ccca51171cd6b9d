"""The scheduler of V1 engines (``scheduler_cls``): vLLM's own, which can stand still, and says what it could not do."""

from __future__ import annotations

from typing import Any, ClassVar

from roll_vllm import versions
from roll_vllm.patches import process

QUALNAME = f"{__name__}.RolloutScheduler"

#: Ids of no request: aborting one makes the scheduler stand still, or go on. Nothing else reaches it on every release.
FREEZE, THAW = "roll_vllm: freeze", "roll_vllm: thaw"


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
        """vLLM's scheduler, with two differences.

        A prefix cache that was not emptied is an error where the engine core says nothing. After :data:`FREEZE` it has
        nothing to do, whatever it holds, so that the engine core waits for messages until :data:`THAW`.
        """

        _frozen = False

        def finish_requests(self, request_ids: Any, *args: Any, **kwargs: Any) -> Any:
            names = [request_ids] if isinstance(request_ids, str) else list(request_ids)
            if FREEZE in names or THAW in names:
                self._frozen = FREEZE in names
            return super().finish_requests([name for name in names if name not in (FREEZE, THAW)], *args, **kwargs)

        def has_unfinished_requests(self) -> bool:
            return not self._frozen and super().has_unfinished_requests()

        def has_requests(self) -> bool:
            return not self._frozen and super().has_requests()

        def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
            done: bool = super().reset_prefix_cache(*args, **kwargs)
            if not done and core_drops_the_answer:
                raise BlocksInUseError(BlocksInUseError.TEXT)
            return done

    globals()[name] = RolloutScheduler
    return RolloutScheduler
