"""V1: an abort ends the caller's stream with what was generated, once, for every child of ``n > 1``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from roll_vllm.patches.patch import Patch


def abort_delivers(original: Callable[..., Any]) -> Callable[..., Any]:
    """``OutputProcessor.abort_requests`` that sends a last output with finish reason "abort" to each caller."""

    def end(self: Any, request_id: str) -> list[str]:
        from vllm.v1.engine import FinishReason

        state = self.request_states.get(request_id)
        if state is None:
            return []
        aborted = original(self, [request_id])
        output = state.make_request_output([], FinishReason.ABORT, None)
        if output is not None and state.queue is not None:
            state.queue.put(output)
        if state.parent_req is not None and not state.parent_req.child_requests:
            self.parent_requests.pop(state.parent_req.request_id, None)
        return aborted

    @wraps(original)
    def abort_requests(self: Any, request_ids: Iterable[str]) -> list[str]:
        aborted = []
        for request_id in request_ids:
            parent = self.parent_requests.get(request_id)
            # A copy: every child leaves the set when its last output is made. And a child's id may be another parent's.
            for one in [request_id] if parent is None else sorted(parent.child_requests):
                aborted += end(self, one)
            if parent is not None:
                self.parent_requests.pop(request_id, None)
        return aborted

    return abort_requests


def outputs_kept(original: Callable[..., Any]) -> Callable[..., Any]:
    """``RequestOutputCollector.put`` under which the outputs of several children do not replace each other."""

    @wraps(original)
    def put(self: Any, output: Any) -> None:
        waiting = self.output
        if waiting is None or self.aggregate:
            original(self, output)
            return
        new = {completion.index: completion for completion in output.outputs}
        kept = {completion.index: completion for completion in waiting.outputs}
        output.outputs = [completion for _, completion in sorted({**kept, **new}.items())]
        output.finished |= waiting.finished
        original(self, output)

    return put


def logprobs_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """``RequestState._new_completion_output`` that has no logprobs where it has no tokens."""

    @wraps(original)
    def _new_completion_output(self: Any, token_ids: list[int], *rest: Any, **named: Any) -> Any:
        completion = original(self, token_ids, *rest, **named)
        if completion.logprobs and not completion.token_ids:
            completion.logprobs = []
        return completion

    return _new_completion_output


PATCHES = (
    Patch(
        name="abort-delivers",
        target="vllm.v1.engine.output_processor:OutputProcessor.abort_requests",
        versions=">=0.8.4,<0.8.5",
        replacement=abort_delivers,
        why="An aborted generate() never returns: its state is dropped without a last output, and children of n > 1 "
        "keep running.",
        upstream="https://github.com/vllm-project/vllm/issues/22197, fixed by "
        "https://github.com/vllm-project/vllm/pull/22283",
        remove_when="0.8.4 is no longer supported",
        relies_on=(
            "vllm.v1.engine.output_processor:RequestState.make_request_output",
            "vllm.v1.engine.parallel_sampling:ParentRequest.get_outputs",
        ),
    ),
    Patch(
        name="parallel-outputs-kept",
        target="vllm.v1.engine.output_processor:RequestOutputCollector.put",
        versions=">=0.8.4,<0.8.5",
        replacement=outputs_kept,
        why="With n > 1 and cumulative outputs, a child's output replaces that of another one that nobody has read.",
        upstream="https://github.com/vllm-project/vllm/issues/16863",
        remove_when="0.8.4 is no longer supported",
        relies_on=("vllm.v1.engine.output_processor:RequestOutputCollector.get",),
    ),
    Patch(
        name="abort-logprobs-once",
        target="vllm.v1.engine.output_processor:RequestState._new_completion_output",
        versions=">=0.8.4,<0.13",
        replacement=logprobs_once,
        why="The last output of an aborted delta stream has no tokens, and repeats the logprobs of all earlier ones.",
        upstream="vllm/v1/engine/output_processor.py: logprobs[-len(token_ids):] where token_ids is empty",
        remove_when="vLLM takes no logprobs for no tokens",
    ),
)
