"""An abort delivers what was generated, once, to everybody who waits (V1)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest


def sampling(kind: str, n: int = 1, logprobs: int | None = None) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(n=n, max_tokens=50, detokenize=False, logprobs=logprobs, output_kind=RequestOutputKind[kind])


class Frontend:
    """0.8.4's output processor with its requests, and the engine core's answers by hand."""

    def __init__(
        self, kind: str, n: int, logprobs: int | None = None, name: str = "r", beside: Frontend | None = None
    ) -> None:
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
        from vllm.v1.engine.parallel_sampling import ParentRequest

        tokenizers = SimpleNamespace(get_lora_tokenizer=lambda request: None)
        self.processor = beside.processor if beside else OutputProcessor(tokenizers, log_stats=False)
        params = sampling(kind, n, logprobs)
        self.queue = RequestOutputCollector(params.output_kind)
        parent = ParentRequest(name, params) if n > 1 else None
        self.ids = []
        for index in range(n):
            child, one = parent.get_child_info(index) if parent else (name, params)
            request = EngineCoreRequest(
                request_id=child,
                prompt=None,
                prompt_token_ids=[1, 2],
                mm_inputs=None,
                mm_hashes=None,
                mm_placeholders=None,
                sampling_params=one,
                eos_token_id=None,
                arrival_time=0.0,
                lora_request=None,
            )
            self.processor.add_request(request, parent, index, self.queue)
            self.ids.append(child)

    def generate(self, index: int, tokens: list[int], finish: Any = None) -> None:
        from vllm.v1.engine import EngineCoreOutput
        from vllm.v1.outputs import LogprobsLists

        logprobs = None
        if self.processor.request_states[self.ids[index]].logprobs_processor.num_logprobs is not None:
            logprobs = LogprobsLists([[t] for t in tokens], [[-0.5] for _ in tokens], [0 for _ in tokens])
        output = EngineCoreOutput(
            request_id=self.ids[index], new_token_ids=tokens, new_logprobs=logprobs, finish_reason=finish
        )
        self.processor.process_outputs([output])

    def read(self) -> dict[int, tuple[list[int], str | None]]:
        output = self.queue.get_nowait()
        assert output is not None
        self.finished = output.finished
        return {one.index: (list(one.token_ids), one.finish_reason) for one in output.outputs}

    def empty(self) -> bool:
        return not (self.processor.request_states or self.processor.parent_requests)


@pytest.fixture
def frontend(patched: Callable[[str], Any]) -> Callable[..., Frontend]:
    patched("abort-delivers")
    patched("parallel-outputs-kept")
    patched("abort-logprobs-once")
    return Frontend


@pytest.mark.parametrize("kind", ["CUMULATIVE", "DELTA", "FINAL_ONLY"])
@pytest.mark.parametrize("by", ["r", "children"])
def test_every_child_is_delivered(frontend: Callable[..., Frontend], kind: str, by: str) -> None:
    one = frontend(kind, 3)
    one.generate(0, [10, 11])
    one.generate(2, [30])
    aborted = one.processor.abort_requests(["r"] if by == "r" else one.ids)
    assert sorted(aborted) == sorted(one.ids)
    assert one.read() == {0: ([10, 11], "abort"), 1: ([], "abort"), 2: ([30], "abort")}
    assert one.finished
    assert one.empty()


@pytest.mark.parametrize("kind", ["CUMULATIVE", "DELTA", "FINAL_ONLY"])
def test_a_single_request(frontend: Callable[..., Frontend], kind: str) -> None:
    one = frontend(kind, 1)
    one.generate(0, [10])
    if kind != "FINAL_ONLY":
        assert one.read() == {0: ([10], None)}
    assert one.processor.abort_requests(["r"]) == ["r"]
    assert one.read() == {0: ([10] if kind != "DELTA" else [], "abort")}
    assert one.finished
    assert one.empty()
    assert one.processor.abort_requests(["r", "unknown"]) == []


def test_a_childs_id_may_be_another_parents(frontend: Callable[..., Frontend]) -> None:
    one = frontend("CUMULATIVE", 2)
    other = frontend("CUMULATIVE", 2, name="0_r", beside=one)
    assert sorted(one.processor.abort_requests(["r"])) == ["0_r", "1_r"]
    assert one.read() == {0: ([], "abort"), 1: ([], "abort")}
    other.generate(0, [10])
    assert other.read() == {0: ([10], None)}
    assert sorted(one.processor.abort_requests(["0_r"])) == ["0_0_r", "1_0_r"]
    assert one.empty()


def test_one_child_ends_before_the_abort(frontend: Callable[..., Frontend]) -> None:
    from vllm.v1.engine import FinishReason

    one = frontend("CUMULATIVE", 2)
    one.generate(0, [10], FinishReason.LENGTH)
    one.generate(1, [20])
    assert one.read() == {0: ([10], "length"), 1: ([20], None)}
    assert not one.finished
    assert one.processor.abort_requests(["r"]) == ["1_r"]
    assert one.read() == {1: ([20], "abort")}
    assert one.finished
    assert one.empty()


def test_one_child_is_aborted_alone(frontend: Callable[..., Frontend]) -> None:
    one = frontend("FINAL_ONLY", 2)
    one.generate(0, [10])
    assert one.processor.abort_requests(["0_r"]) == ["0_r"]
    assert one.queue.get_nowait() is None
    assert list(one.processor.parent_requests) == ["r"]
    one.processor.abort_requests(["1_r"])
    assert one.read() == {0: ([10], "abort"), 1: ([], "abort")}
    assert one.empty()


def test_a_waiting_caller_wakes(frontend: Callable[..., Frontend]) -> None:
    async def scene() -> Any:
        one = frontend("CUMULATIVE", 1)
        caller = asyncio.create_task(one.queue.get())
        await asyncio.sleep(0)
        one.processor.abort_requests(["r"])
        return await asyncio.wait_for(caller, 2)

    assert asyncio.run(scene()).finished


def test_logprobs_of_a_delta_stream(frontend: Callable[..., Frontend]) -> None:
    one = frontend("DELTA", 1, logprobs=0)
    one.generate(0, [10, 11])
    output = one.queue.get_nowait()
    assert output is not None
    assert len(output.outputs[0].logprobs) == 2
    one.processor.abort_requests(["r"])
    output = one.queue.get_nowait()
    assert output is not None
    assert (list(output.outputs[0].token_ids), output.outputs[0].logprobs) == ([], [])


# --- every release ---------------------------------------------------------------------------------------


def completion(kind: str, tokens: list[int], logprobs: list[Any] | None) -> Any:
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import FinishReason
    from vllm.v1.engine.output_processor import RequestState

    state = SimpleNamespace(
        output_kind=RequestOutputKind[kind],
        request_index=0,
        detokenizer=SimpleNamespace(get_next_output_text=lambda *_: "", output_token_ids=[10, 11]),
        logprobs_processor=SimpleNamespace(logprobs=logprobs, cumulative_logprob=-1.0),
    )
    return RequestState._new_completion_output(state, tokens, FinishReason.ABORT, None)


def test_upstream_repeats_the_logprobs() -> None:
    """What the patch is for. Fails where vLLM has mended it."""
    assert completion("DELTA", [], ["a", "b"]).logprobs == ["a", "b"]


@pytest.mark.parametrize(
    ("kind", "tokens", "logprobs", "expected"),
    [
        ("DELTA", [], ["a", "b"], []),
        ("DELTA", [11], ["a", "b"], ["b"]),
        ("DELTA", [], None, None),
        ("CUMULATIVE", [], ["a", "b"], ["a", "b"]),
    ],
)
def test_no_tokens_have_no_logprobs(
    patched: Callable[[str], Any], kind: str, tokens: list[int], logprobs: Any, expected: Any
) -> None:
    patched("abort-logprobs-once")
    assert completion(kind, tokens, logprobs).logprobs == expected
