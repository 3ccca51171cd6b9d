"""Breakages of generation, log-probabilities and abort, in the frontend."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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


@saboteur("abort-is-a-barrier", ranks=2)
@contextmanager
def returns_before_the_abort(engine: Any) -> Iterator[None]:
    """abort_all() returns at once, and aborts a moment later."""
    abort_all = engine.engine.abort_all
    later: set[asyncio.Task[None]] = set()

    async def abort() -> None:
        await asyncio.sleep(0.2)
        await abort_all()

    async def early() -> None:
        later.add(asyncio.ensure_future(abort()))

    with patch.object(engine.engine, "abort_all", early):
        yield


@saboteur("gen-no-serving-before-first-sync", "sl-level2-requires-reload", "wu-versioned-and-fail-closed")
def serves_whatever_it_holds(engine: Any) -> Any:
    """The gate lets every request in while the engine is awake."""
    stack = ExitStack()
    stack.enter_context(
        patch("roll_vllm.admission.AdmissionGate._open", lambda gate, waited: not gate._state.is_sleeping)
    )
    return stack


@saboteur("abort-effective-or-loud")
@contextmanager
def knows_ids_of_its_own_only(engine: Any) -> Iterator[None]:
    """The caller's id is not the one that the engine knows, and the abort says nothing."""

    async def by_internal_id(request_id: Any) -> list[str]:
        names = [request_id] if isinstance(request_id, str) else list(request_id)
        await abort([f"internal-{name}" for name in names])
        return names

    abort = engine.engine.abort
    with patch.object(engine.engine, "abort", by_internal_id):
        yield


@saboteur("abort-effective-or-loud")
@contextmanager
def swallows_errors_of_the_abort(engine: Any) -> Iterator[None]:
    """Whatever vLLM's abort raises is lost."""
    end = engine.engine._end

    async def silent(request_ids: Any) -> None:
        with suppress(Exception):
            await end(request_ids)

    with patch.object(engine.engine, "_end", silent):
        yield


@saboteur("abort-effective-or-loud")
@contextmanager
def aborts_whatever_is_named(engine: Any) -> Iterator[None]:
    """An id that matches nothing counts as aborted."""
    abort = engine.engine.abort

    async def pleased(request_id: Any) -> list[str]:
        await abort(request_id)
        return [request_id] if isinstance(request_id, str) else list(request_id)

    with patch.object(engine.engine, "abort", pleased):
        yield


@saboteur("gen-no-aliasing")
@contextmanager
def hands_out_what_it_works_on(engine: Any) -> Iterator[None]:
    """vLLM's own lists and statistics, which grow while the request runs."""
    with patch("roll_vllm.engine._detach", lambda output: None):
        yield


@saboteur("gen-no-aliasing")
@contextmanager
def spends_the_callers_budget(engine: Any) -> Iterator[None]:
    """What was generated is taken off the caller's sampling parameters."""
    generate = engine.engine.generate

    async def spending(prompt: Any, params: Any, **kwargs: Any) -> Any:
        async for output in generate(prompt, params, **kwargs):
            yield output
        params.max_tokens -= 1

    with patch.object(engine.engine, "generate", spending):
        yield


@saboteur("gen-seed-policy")
@contextmanager
def loses_request_seeds(engine: Any) -> Iterator[None]:
    """The seed of a request does not reach the sampler."""
    generate = engine.engine.generate

    async def unseeded(prompt: Any, params: Any, **kwargs: Any) -> Any:
        params = params.clone()
        params.seed = None
        async for output in generate(prompt, params, **kwargs):
            yield output

    with patch.object(engine.engine, "generate", unseeded):
        yield


@saboteur("lp-mode-explicit")
@contextmanager
def names_the_other_logprobs(engine: Any) -> Iterator[None]:
    """It says that temperature is in its log-probabilities, and it is not; or the other way round."""
    kind = type(engine.engine)
    other = {"raw_logprobs": "processed_logprobs", "processed_logprobs": "raw_logprobs"}[engine.engine.logprobs_mode]
    with patch.object(kind, "logprobs_mode", other):
        yield
