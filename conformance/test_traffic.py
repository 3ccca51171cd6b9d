"""Requests, sleep, updates and other control calls at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from conformance.oracles import (
    assert_counts,
    assert_gone,
    assert_holds,
    ended,
    forward_passes,
    processes_of,
    tags_after,
    traffic,
)
from conformance.test_lora import CONFIG, ENGINE_ARGS, adapter, merged, reference_logprobs, send_bucket, shares_engine
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle, EnginePool
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.options import Settings
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import ConfigurationError, RollVllmError, WeightsNotReadyError, WeightsStatus
from roll_vllm.devices import Device
from roll_vllm.worker.checksums import checksum


@pytest.fixture
def vllm_model(vllm_model_factory: Callable[[str], Model]) -> Model:
    """Whose every token tells the version of the weights that it was made with."""
    return vllm_model_factory("counting")


no_forward = contract(
    "sl-no-forward-when-not-resident",
    "While weights or KV cache are given back, after a partial wake too, no forward pass is run or tried; requests "
    "that came meanwhile are answered after the full wake.",
    references=("vllm-project/vllm#44483", "vllm-project/vllm#45520", "vllm-project/vllm#28714"),
    needs=("runtime",),
)


@no_forward
@pytest.mark.parametrize(
    ("level", "steps"), [(1, ["weights", "kv_cache"]), (2, ["weights", "kv_cache"]), (2, ["kv_cache", "update"])]
)
async def test_no_forward_pass_while_asleep(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, prompts: list[list[int]], level: int, steps: list[str]
) -> None:
    version = vllm_trainer.reference_version

    async def idle(after: str) -> None:
        await asyncio.sleep(0.3)
        assert not vllm_engine.errored, f"after {after} a forward pass ended the engine"
        now = await forward_passes(vllm_engine)
        assert now[1] == refused, f"after {after} {now[1] - refused} forward passes were tried without their memory"
        assert now[0] == run, f"after {after} {now[0] - run} forward passes were run"

    async with traffic(vllm_engine, prompts[:4], max_tokens=48) as outputs:
        await asyncio.sleep(0.2)
        await vllm_engine.offload_states(level)
        run, refused = await forward_passes(vllm_engine)
        assert run > 0, "forward passes are not counted"
        await idle("sleep")
        for step in steps[:-1]:
            await vllm_engine.load_states([step])
            if await vllm_engine.is_sleeping():  # accelerators may have woken all
                await idle(f"waking {step}")
        if steps[-1] == "update":
            await vllm_trainer.push(vllm_engine, version)
        else:
            await vllm_engine.load_states(steps[-1:])
        if (await vllm_engine.state()).weights is WeightsStatus.DESTROYED:
            await idle("waking without an update")
            await vllm_trainer.push(vllm_engine, version)
        seen = len(outputs)
    assert len(outputs) > seen, "nobody was answered after the wake"
    for prompt, output in outputs:
        assert_counts(prompt, output.outputs[0].token_ids, version)


@contract(
    "sl-requests-around-sleep",
    "Sleep ends the requests that run, each with what it has; those that come meanwhile wait, and are answered right "
    "after the wake; the engine lives.",
    references=("vllm-project/vllm#31618", "vllm-project/vllm#45520", "vllm-project/vllm#45268"),
    needs=("runtime",),
)
@pytest.mark.parametrize("level", [1, 2])
async def test_requests_around_sleep(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, prompts: list[list[int]], level: int
) -> None:
    version = vllm_trainer.reference_version
    last: dict[int, Any] = {}

    async def follow(number: int) -> None:
        async for output in vllm_engine.stream(prompts[number], temperature=0.0, max_tokens=900):
            last[number] = output

    running = [asyncio.ensure_future(follow(number)) for number in range(8)]
    while len(last) < 8:
        assert not any(call.done() for call in running)
        await asyncio.sleep(0.01)
    assert await ended([vllm_engine.offload_states(level)], 30, "calls of sleep") == [None]
    assert await ended(running, 2, "requests that ran") == [None] * 8
    for number, output in last.items():
        assert output.finished
        assert output.outputs[0].finish_reason == "abort"
        assert output.outputs[0].token_ids, "what was generated before the sleep is lost"
        assert_counts(prompts[number], output.outputs[0].token_ids, version)
    assert await vllm_engine.is_sleeping()
    late = [asyncio.ensure_future(vllm_engine.complete(p, temperature=0.0, max_tokens=8)) for p in prompts[:4]]
    await asyncio.sleep(0.3)
    assert not any(call.done() for call in late), "a request was answered by a sleeping engine"
    await vllm_engine.load_states()
    if level == 2:
        version += 1
        await vllm_trainer.push(vllm_engine, version)
    for prompt, output in zip(prompts, await ended(late, 30, "requests that came during the sleep"), strict=False):
        assert not isinstance(output, BaseException), f"a request that came during the sleep got {output!r}"
        assert output.outputs[0].finish_reason == "length"
        assert_counts(prompt, output.outputs[0].token_ids, version)
    assert not vllm_engine.errored
    assert vllm_engine.unfinished_requests() == {"requests": 0, "parents": 0}
    await assert_holds(vllm_engine, vllm_trainer, version)


#: Updates by each policy in a test under load.
UPDATES = 50


@contract(
    "cf-update-during-traffic",
    "Updates under load are atomic: the tokens of every output follow, from first to last, the one version that it "
    "carries; each request finishes, or is aborted if that is the policy.",
    references=("vllm-project/vllm#48305", "vllm-project/vllm#48310", "NovaSky-AI/SkyRL#537"),
    needs=("runtime",),
)
@pytest.mark.parametrize("running", ["abort", "wait"])
async def test_updates_under_load(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, prompts: list[list[int]], running: str
) -> None:
    held = {vllm_engine.weight_version: vllm_trainer.reference_version}
    async with traffic(vllm_engine, prompts[:4], max_tokens=6) as outputs:
        for number in range(UPDATES):
            version = vllm_trainer.reference_version + 1 + number % 3
            seen = len(outputs)
            await vllm_trainer.push(vllm_engine, version, running=running)
            held[vllm_engine.weight_version] = version
            # An update that nobody was between would prove nothing.
            while not any(output.weight_version == vllm_engine.weight_version for _, output in outputs[seen:]):
                await asyncio.sleep(0.005)
    assert len(held) == UPDATES + 1
    reasons = {"length", "abort"} if running == "abort" else {"length"}
    for prompt, output in outputs:
        assert output.weight_version in held
        assert_counts(prompt, output.outputs[0].token_ids, held[output.weight_version])
        assert not output.finished or output.outputs[0].finish_reason in reasons
    first = min(held)
    assert {output.weight_version for _, output in outputs} >= held.keys() - {first}


# -- a random walk ------------------------------------------------------------------------------------------

#: A seed, or a script as a failure prints it: the walk to take.
WALK = os.environ.get("ROLL_VLLM_WALK", "")

#: Calls of one walk; after these the engine is reset, and the next walk begins.
CALLS = 24

#: The most calls of one moment, each of whose orders is possible.
TOGETHER = 3

#: Seconds for looking for a shorter script once one has failed.
SHRINKING_S = 30

#: How often a script that was given is taken: whether it fails may be a matter of timing.
REPLAYS = 20

#: What may happen at the same time: calls, each with the milliseconds after which it starts.
Moment = Sequence[tuple[str, int]]

#: What brings an engine back to where requests run.
RETURN: list[Moment] = [[("resume", 0)], [("wake", 0)], [("update 2", 0)]]


@dataclass(frozen=True)
class Known:
    """What an engine must be after some calls, one after the other.

    Attributes:
        sleeping: the tags that sleep.
        weights: what the parameters are.
        holds: the trainer's version of them, if they are complete.
        adapter: the number of the adapter that it holds; 0 for none.
        tensors: that of the adapter whose tensors it has kept, to be added; 0 for none.
        updates: complete updates so far.
        paused: whether generation is paused.
        outcomes: what each call of the last moment ended with: the name of an error, or nothing.
    """

    sleeping: frozenset[str]
    weights: WeightsStatus
    holds: int
    adapter: int = 0
    tensors: int = 0
    updates: int = 0
    paused: bool = False
    outcomes: tuple[tuple[int, str], ...] = field(default=())

    @property
    def ready(self) -> bool:
        """Whether requests run."""
        return self.weights is WeightsStatus.COMPLETE and not self.sleeping and not self.paused

    def after(self, number: int, call: str, kind: str) -> Known:
        """What follows from one more call, the one of that number in its moment."""
        name, _, argument = call.partition(" ")
        known, error = self, ""
        if name in ("sleep", "wake", "weights", "kv_cache"):
            known = replace(self, sleeping=frozenset(tags_after(set(self.sleeping), call, kind)))
            if call == "sleep 2":
                known = replace(known, weights=WeightsStatus.DESTROYED, adapter=0, tensors=0)
        elif name in ("update", "broadcast"):
            awake = self.sleeping - {"weights"}
            updates, version = self.updates + 1, int(argument)
            known = replace(self, sleeping=awake, weights=WeightsStatus.COMPLETE, holds=version, updates=updates)
        elif name in ("break", "cut"):
            known = replace(self, sleeping=self.sleeping - {"weights"}, weights=WeightsStatus.INCONSISTENT)
            error = "WeightUpdateError"
        elif name == "tensors":
            known = replace(self, tensors=int(argument))
        elif name in ("adapter", "process") and "weights" in self.sleeping:
            error = "EngineAsleepError"
        elif name == "adapter":
            error = "" if self.tensors else "ConfigurationError"
            known = replace(self, adapter=self.tensors or self.adapter, tensors=0)
        elif name in ("pause", "keep", "resume"):
            known = replace(self, paused=name != "resume")
        return replace(known, outcomes=tuple(sorted((*known.outcomes, (number, error)))))


@dataclass(frozen=True)
class Asked:
    """A request that was begun in a walk.

    Attributes:
        answer: its last output, some time.
        adapter: the id of the adapter that it names; 0 for none.
        meant: the numbers of the adapters that this can be.
    """

    answer: asyncio.Future[Any]
    adapter: int = 0
    meant: frozenset[int] = frozenset({0})


class Walk:
    """Moments of concurrent control calls, each of which must end as one order of its calls would.

    Args:
        engine: of the counting model, with adapters.
        trainer: of the counting model.
        prompt: what is asked at every moment, too.
        kind: the kind of device.

    Attributes:
        calls: the control calls that a moment may have.
        patience: seconds for whatever must end.
        taken: the moments of the walk that was taken last, up to the one where it failed.
    """

    def __init__(self, engine: EngineHandle, trainer: Trainer, prompt: list[int], kind: str) -> None:
        self.engine, self._trainer, self._prompt, self._kind = engine, trainer, prompt, kind
        versions = [trainer.reference_version + more for more in (1, 2, 3)]
        self.calls = ["sleep 1", "sleep 2", "wake", "weights", "kv_cache"]
        self.calls += [*(f"update {version}" for version in versions), f"break {versions[1]}"]
        self.calls += ["tensors 1", "tensors 2", "adapter", "adapter", "process", "reset"]
        self.calls += ["pause", "keep", "resume", "abort", "hang up"]
        if "update.collective" in engine.supported:
            self.calls += [*(f"broadcast {version}" for version in versions[:2]), f"cut {versions[2]}"]
        self.patience = 60
        self.taken: list[Moment] = []
        self._sums: dict[int, dict[str, str]] = {}
        self._adapters = {number: adapter(trainer.weights(trainer.reference_version), number) for number in (1, 2)}
        self._expected: dict[tuple[int, int, tuple[int, ...]], tuple[list[float], float]] = {}
        self._known: set[Known] = set()
        self._start = 0
        self._held: dict[int, set[int]] = {}
        self._asked: list[Asked] = []

    async def take(self, script: Sequence[Moment]) -> None:
        """Take a whole walk.

        Raises:
            AssertionError: the engine is not what any order of some moment's calls makes it.
        """
        self.taken = []
        await self.begin()
        try:
            for moment in script:
                self.taken.append(moment)
                await self.happen(moment)
            for moment in RETURN:
                await self.happen(moment)
            assert not self._asked, f"after {RETURN} requests do not run"
        finally:
            await self._hang_up()

    async def begin(self) -> None:
        """Bring the engine to where every walk begins: as every test finds it, with the first adapter."""
        await asyncio.wait_for(self._trainer.reset(self.engine), self.patience)
        await self._call("tensors 1", 0)
        await self._call("adapter", 0)
        self._start, reference = self.engine.weight_version, self._trainer.reference_version
        self._known = {Known(frozenset(), WeightsStatus.COMPLETE, reference, adapter=1)}
        self._held = {self._start: {reference}}

    async def happen(self, moment: Moment) -> None:
        """Begin requests, make the calls, see what the engine is then, and what requests got if they can run.

        Raises:
            AssertionError: it is not what any order of the calls makes it, or a request got what it should not.
        """
        self._ask()
        outcomes = await ended([self._call(*call) for call in moment], self.patience, "control calls")
        named = tuple(
            (number, type(result).__name__ if isinstance(result, BaseException) else "")
            for number, result in enumerate(outcomes)
        )
        possible = {state for one in self._known for state in self._orders(one, moment)}
        self._known = await self._found(possible, named, moment)
        versions = [int(call.split()[1]) for call, _ in moment if call.startswith(("update", "broadcast"))]
        for one in self._known:
            for number in range(one.updates - len(versions), one.updates):
                self._held.setdefault(self._start + number + 1, set(versions))
        if self._asked and all(one.ready for one in self._known):
            asked, self._asked = self._asked, []
            answers = await ended([request.answer for request in asked], self.patience, "requests")
            for request, answer in zip(asked, answers, strict=True):
                self._judge(request, answer)

    async def shut_down(self) -> list[tuple[str, Any]]:
        """Make all calls at once and end the engine meanwhile; returns what each of them, and each request, got."""
        self._ask()

        async def shutdown() -> None:
            await asyncio.sleep(0.005)
            await self.engine._call(self.engine.target.shutdown)

        asked, self._asked = [one.answer for one in self._asked], []
        calls = [self._call(call, number % 10) for number, call in enumerate(self.calls)]
        got = await ended([*calls, *asked, shutdown()], self.patience, "calls and requests")
        return list(zip([*self.calls, *(["request"] * len(asked)), "shutdown"], got, strict=True))

    def _ask(self) -> None:
        """Begin a request for the base model, and one for the adapter that there is."""

        def begin(**named: Any) -> asyncio.Future[Any]:
            return asyncio.ensure_future(self.engine.complete(self._prompt, temperature=0.0, max_tokens=4, **named))

        self._asked.append(Asked(begin()))
        request = self.engine.lora_request
        if request is not None:
            meant = frozenset(one.adapter for one in self._known)
            self._asked.append(Asked(begin(lora_request=request, logprobs=0), request.lora_int_id, meant))

    def _judge(self, asked: Asked, answer: Any) -> None:
        if isinstance(answer, WeightsNotReadyError):
            return
        now = self.engine.lora_request
        if isinstance(answer, ConfigurationError) and asked.adapter and (not now or now.lora_int_id != asked.adapter):
            return  # its adapter was replaced or destroyed before it was let in
        assert not isinstance(answer, BaseException), f"a request got {answer!r}"
        tokens, versions = list(answer.outputs[0].token_ids), self._held[answer.weight_version]
        if not asked.adapter:
            said = {version: self._counted(len(tokens), version) for version in versions}
            assert tokens in said.values(), f"version {answer.weight_version} says one of {said}, not {tokens}"
            return
        entries = answer.outputs[0].logprobs or []  # of one that was aborted before its first token
        logprobs = [entry[token].logprob for token, entry in zip(tokens, entries, strict=True)]
        fits = any(self._says(tokens, logprobs, *which) for which in itertools.product(versions, asked.meant))
        assert fits, (
            f"{tokens} with the log-probabilities {logprobs} is what none of the versions {versions} says with one of "
            f"the adapters {set(asked.meant)}"
        )

    def _counted(self, length: int, version: int) -> list[int]:
        return [(self._prompt[-1] + version * step) % 256 for step in range(1, length + 1)]

    def _says(self, tokens: list[int], logprobs: list[float], version: int, number: int) -> bool:
        """Whether a version says this with an adapter."""
        key = version, number, tuple(tokens)
        if key not in self._expected:
            weights = merged(self._trainer.weights(version), self._adapters[number])
            (wanted,), allowed = reference_logprobs(self._trainer, weights, [(self._prompt, tokens)])
            self._expected[key] = wanted, allowed
        wanted, allowed = self._expected[key]
        return all(abs(one - other) <= allowed for one, other in zip(wanted, logprobs, strict=True))

    def _orders(self, known: Known, moment: Moment) -> Iterable[Known]:
        for order in itertools.permutations(enumerate(call for call, _ in moment)):
            state = replace(known, outcomes=())
            for number, call in order:
                state = state.after(number, call, self._kind)
            yield state

    async def _found(self, possible: set[Known], outcomes: tuple[tuple[int, str], ...], moment: Moment) -> set[Known]:
        """Those of the possible states that the engine can be in."""
        assert not self.engine.errored, f"the engine died of {moment}"
        state = await asyncio.wait_for(self.engine.state(), self.patience)
        request = self.engine.lora_request
        found = Known(
            sleeping=state.sleeping,
            weights=state.weights,
            holds=0,
            adapter=request.lora_int_id if request else 0,
            updates=state.weight_version - self._start,
            paused=state.paused,
            outcomes=outcomes,
        )
        # What it holds shows in checksums and answers only.
        fitting = {
            one
            for one in possible
            if replace(one, holds=0, tensors=0, adapter=found.adapter) == found and bool(one.adapter) == bool(request)
        }
        assert fitting, f"no order of {moment} gives {found}; possible is {possible}"
        loaded = await self.engine.list_loras()
        assert loaded == ({found.adapter} if request else set()), f"after {moment} the adapters {loaded} are loaded"
        if state.weights is WeightsStatus.COMPLETE and "weights" not in state.sleeping:
            sums = (await self.engine.checksums())[0]
            # vLLM wraps the layers that adapters apply to.
            sums = {name.replace(".base_layer.", "."): value for name, value in sums.items()}
            fitting = {one for one in fitting if self._sums_of(one.holds).items() <= sums.items()}
            assert fitting, f"after {moment} the parameters are of no version that any order gives"
        return fitting

    def _sums_of(self, version: int) -> dict[str, str]:
        if version not in self._sums:
            tensors = self._trainer.engine_tensors(version)
            self._sums[version] = {name: checksum(tensor) for name, tensor in tensors.items()}
        return self._sums[version]

    async def _call(self, call: str, milliseconds: int) -> None:
        engine, (name, _, argument) = self.engine, call.partition(" ")
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "sleep": lambda: engine.offload_states(int(argument)),
            "wake": engine.load_states,
            "weights": lambda: engine.load_states(["weights"]),
            "kv_cache": lambda: engine.load_states(["kv_cache"]),
            "update": lambda: self._trainer.push(engine, int(argument)),
            "broadcast": lambda: self._trainer.push(engine, int(argument), transport="collective"),
            "break": lambda: self._break(int(argument), "bucket"),
            "cut": lambda: self._break(int(argument), "collective"),
            "tensors": lambda: send_bucket(engine, self._adapters[int(argument)]),
            "adapter": lambda: engine.add_lora(CONFIG),
            "abort": engine.abort_all,
            "reset": engine.reset_prefix_cache,
            "process": engine.process_weights_after_loading,
            "pause": engine.pause_generation,
            "keep": lambda: engine.pause_generation("keep"),
            "resume": engine.resume_generation,
            "hang": self._hang_up,
        }
        await asyncio.sleep(milliseconds / 1000)
        await calls[name]()

    async def _hang_up(self) -> None:
        """Let whoever asked walk away."""
        asked, self._asked = self._asked, []
        for one in asked:
            one.answer.cancel()

    async def _break(self, version: int, transport: str) -> None:
        weights = self._trainer.weights(version)
        async with self.engine.weight_update(transport) as update:
            await update.send({name: weights[name] for name in list(weights)[: len(weights) // 2]})


class Enough(BaseException):
    """Ends Hypothesis's search, whatever it was about to try."""


class Search:
    """Walks that Hypothesis makes up and shortens.

    A walk is made up before it is taken: Hypothesis gives up on data that depend on what a call, or its timing, does.

    Attributes:
        calls: how many control calls have been made so far.
        failure: the shortest script that failed, and how.
    """

    def __init__(self, walk: Walk) -> None:
        self.calls = 0
        self.failure: tuple[list[Moment], str] | None = None
        self._walk = walk
        self._wanted, self._until, self._times = 0, math.inf, 1

    def run(self, calls: int, seed: int | None) -> None:
        """Make at least so many calls, or find the shortest script that fails."""
        self._wanted = calls
        search, names = self, st.sampled_from(self._walk.calls)

        class Machine(RuleBasedStateMachine):
            def __init__(self) -> None:
                super().__init__()
                self.script: list[Moment] = []

            # One call a step, of which Hypothesis drops more easily than parts of longer steps.
            @rule(call=names, milliseconds=st.integers(0, 9), together=st.booleans())
            def call_comes(self, call: str, milliseconds: int, together: bool) -> None:
                if together and self.script and len(self.script[-1]) < TOGETHER:
                    self.script[-1] = [*self.script[-1], (call, milliseconds)]
                else:
                    self.script.append([(call, milliseconds)])

            def teardown(self) -> None:
                if sys.exc_info()[0] is None:  # else Hypothesis has dropped what it was making up
                    search.judge(self.script)

        how = settings(
            max_examples=2 * math.ceil(calls / CALLS),  # some may be shorter; the judge says when it is enough
            stateful_step_count=CALLS,
            phases=(Phase.generate, Phase.shrink),
            derandomize=seed is None,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        try:
            run_state_machine_as_test(Machine if seed is None else with_seed(seed)(Machine), settings=how)
        except Enough:
            pass
        except Exception:
            if not self.failure:
                raise

    def judge(self, script: list[Moment]) -> None:
        """Take a walk, several times if the one that has failed did not fail each time.

        Raises:
            AssertionError: it fails, or begins as the shortest one that has failed.
            Enough: there were calls enough, or there was time enough for shrinking.
        """
        if self.failure is None:
            if self.calls >= self._wanted:
                raise Enough
            try:
                self.take(script)
            except AssertionError:
                with contextlib.suppress(AssertionError):
                    self.take(self._walk.taken)
                    self._times = 4  # a matter of timing
                raise
            return
        if time.monotonic() > self._until:
            raise Enough
        shortest, why = self.failure
        if script[: len(shortest)] == shortest:
            self._fail(why)
        for _ in range(self._times):
            self.take(script)

    def take(self, script: list[Moment]) -> None:
        """Take a walk once.

        Raises:
            AssertionError: it fails.
            Enough: the engine is of no use any more.
        """
        self.calls += sum(map(len, script))
        try:
            self._walk.engine.run(self._walk.take(script))
            return
        except Exception as error:
            why = str(error) if isinstance(error, AssertionError) else repr(error)
        if self.failure and not self._walk.taken:
            raise Enough  # what failed before has left an engine that does not come back
        if self.failure is None:
            self._until, self._walk.patience = time.monotonic() + SHRINKING_S, 10
        if self.failure is None or _length(self._walk.taken) <= _length(self.failure[0]):
            self.failure = self._walk.taken, why
        if self._walk.engine.errored:
            raise Enough
        self._fail(why)

    def _fail(self, why: str) -> NoReturn:
        # One place for all failures: Hypothesis does not shrink one to another that was raised elsewhere.
        raise AssertionError(why)


def _length(script: Sequence[Moment]) -> tuple[int, int, int]:
    calls = list(itertools.chain(*script))
    return len(script), len(calls), sum(milliseconds for _, milliseconds in calls)


serialised = contract(
    "cf-serialised-control",
    "Sleep, wake, update, abort, pause and the other control calls may come at the same time: the engine is then, and "
    "each call has ended, as if they had come one after the other.",
    references=("vllm-project/vllm#48310", "modelscope/ms-swift#10204"),
    needs=("lora", "runtime"),
)


class TestWalk:
    pytestmark = shares_engine

    @pytest.fixture
    def vllm_engine_args(self, vllm_engine_args: dict[str, Any]) -> dict[str, Any]:
        return {**vllm_engine_args, **ENGINE_ARGS}

    @serialised
    def test_random_walk(
        self,
        vllm_engine: EngineHandle,
        vllm_trainer: Trainer,
        vllm_device: Device,
        vllm_settings: Settings,
        prompts: list[list[int]],
    ) -> None:
        search = Search(Walk(vllm_engine, vllm_trainer, prompts[1], vllm_device.kind))
        if WALK.startswith("["):
            with contextlib.suppress(AssertionError, Enough):
                for _ in range(REPLAYS):
                    search.take(json.loads(WALK))
        else:
            wanted = vllm_settings.calls_of_walk
            search.run(wanted, int(WALK) if WALK else None)
            assert search.failure or search.calls >= wanted, f"only {search.calls} calls were made"
        if search.failure:
            script, why = search.failure
            pytest.fail(f"{why}\nonce more: ROLL_VLLM_WALK='{json.dumps(script)}'", pytrace=False)

    @serialised
    @pytest.mark.vllm_on_request("walk_steps")
    async def test_shutdown_ends_a_walk(
        self,
        vllm_engine_factory: Callable[..., EngineHandle],
        vllm_engine_pool: EnginePool,
        vllm_trainer: Trainer,
        vllm_device: Device,
        prompts: list[list[int]],
    ) -> None:
        engine = vllm_engine_factory(worker_name="ended")
        family = processes_of(engine)
        walk = Walk(engine, vllm_trainer, prompts[1], vllm_device.kind)
        await walk.begin()
        for call in walk.calls:
            await walk.happen([(call, 0), ("wake", 1)])
        for call, got in await walk.shut_down():
            known = not isinstance(got, BaseException) or isinstance(got, RollVllmError)
            assert known, f"{call}: an engine that was shut down meanwhile ended it with {got!r}"
        vllm_engine_pool.end(engine)
        assert_gone(family, "shutdown")
