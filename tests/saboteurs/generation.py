"""Breakages of generation, log-probabilities and abort, in the frontend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from tests.saboteurs.base import saboteur


@contextmanager
def _outputs(engine: Any, change: Any) -> Iterator[None]:
    """Pass every output through ``change(output, state)``; ``state`` is one dict a request; None drops it."""
    generate = engine.engine.generate

    async def changed(*args: Any, **kwargs: Any) -> Any:
        state: dict[str, Any] = {"n": args[1].n, "request_id": kwargs.get("request_id")}
        async for output in generate(*args, **kwargs):
            output = change(output, state)
            if output is not None:
                yield output

    with patch.object(engine.engine, "generate", changed):
        yield


@saboteur("gen-one-terminal-output")
def loses_final_outputs(engine: Any) -> Any:
    """Requests with several completions never get their final output."""
    return _outputs(engine, lambda output, state: None if output.finished and state["n"] > 1 else output)


@saboteur("gen-one-terminal-output", "gen-n-by-output-kind")
def merges_children(engine: Any) -> Any:
    """All children of a request come back under index 0."""

    def merge(output: Any, state: Any) -> Any:
        for completion in output.outputs:
            completion.index = 0
        return output

    return _outputs(engine, merge)


@saboteur("gen-token-ids-verbatim")
def prepends_a_token(engine: Any) -> Any:
    """The prompt comes back with a token in front, as after decoding and encoding again."""

    def prepend(output: Any, state: Any) -> Any:
        output.prompt_token_ids = [0, *output.prompt_token_ids]
        return output

    return _outputs(engine, prepend)


@saboteur("lp-aligned-and-finite")
def drops_the_last_logprob(engine: Any) -> Any:
    """One log-probability fewer than tokens."""

    def drop(output: Any, state: Any) -> Any:
        for completion in output.outputs:
            if completion.logprobs:
                completion.logprobs = list(completion.logprobs)[:-1]
        return output

    return _outputs(engine, drop)


@saboteur("lp-parity-trainer", "lp-parity-after-update")
def cools_the_logprobs(engine: Any) -> Any:
    """Log-probabilities are those of another temperature."""

    def cool(output: Any, state: Any) -> Any:
        for completion in output.outputs:
            for row in completion.logprobs or ():
                for entry in row.values():
                    if not getattr(entry, "cooled", False):
                        entry.logprob, entry.cooled = entry.logprob * 0.9, True
        return output

    return _outputs(engine, cool)


@saboteur("abort-keeps-partial")
def drops_partial_tokens(engine: Any) -> Any:
    """An aborted request comes back empty."""

    def empty(output: Any, state: Any) -> Any:
        for completion in output.outputs:
            if completion.finish_reason == "abort":
                completion.token_ids, completion.logprobs = [], []
        return output

    return _outputs(engine, empty)


@saboteur("abort-unblocks-caller", "abort-keeps-partial")
@contextmanager
def swallows_aborts(engine: Any) -> Iterator[None]:
    """abort() returns and does nothing."""

    async def nothing(request_id: Any) -> None:
        pass

    try:
        with patch.object(engine.engine, "abort", nothing):
            yield
    finally:
        engine.run(engine.abort_all())


@saboteur("abort-leaves-no-state")
@contextmanager
def aborts_only_the_first_child(engine: Any) -> Iterator[None]:
    """Aborting a parent ends one of its children; the others run on."""
    processor = engine.engine.output_processor
    abort_requests = processor.abort_requests

    def first_child(request_ids: Any) -> Any:
        chosen: list[str] = []
        for request_id in request_ids:
            parent = processor.parent_requests.pop(request_id, None)
            chosen.extend(list(parent.child_requests)[:1] if parent else [request_id])
        return abort_requests(chosen)

    try:
        with patch.object(processor, "abort_requests", first_child):
            yield
    finally:
        engine.run(engine.abort_all())


@saboteur("gen-no-serving-before-first-sync", "sl-level2-requires-reload", "wu-versioned-and-fail-closed")
def serves_whatever_it_holds(engine: Any) -> Any:
    """The gate lets every request in while the engine is awake."""
    stack = ExitStack()
    stack.enter_context(
        patch("roll_vllm.admission.AdmissionGate._open", lambda gate, waited: not gate._state.is_sleeping)
    )
    return stack
