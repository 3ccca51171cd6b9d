"""What others import and call: names, signatures, and that importing stays cheap."""

from __future__ import annotations

import ast
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import roll_vllm
from roll_vllm import errors

ROOT = Path(roll_vllm.__file__).parent
HEAVY = "{'torch', 'vllm', 'ray', 'numpy', 'transformers', 'xxhash', 'pytest'}"

#: ROLL's calls, with the arguments that its strategies give by position or by name.
ROLL_CALLS = {
    "custom_init_worker": [],
    "load_states": [],
    "offload_states": ["level"],
    "setup_collective_group": [
        "master_address",
        "master_port",
        "rank_offset",
        "world_size",
        "group_name",
        "backend",
    ],
    "broadcast_parameter": ["names", "dtypes", "shapes", "group_name", "is_lora"],
    "update_parameter_in_bucket": ["serialized_named_tensors", "is_lora"],
    "add_lora": [],
    "process_weights_after_loading": [],
}

#: What is ours, beyond ROLL's and vLLM's.
OUR_CALLS = {
    "state": [],
    "checksums": [],
    "ping": ["delays", "timeout"],
    "worker_environment": ["names"],
    "abort_all": [],
    "weight_update": ["transport", "sender", "running"],
}

#: vLLM's own calls that the engine overrides; their arguments must stay vLLM's.
VLLM_CALLS = {
    "sleep": ["level"],
    "wake_up": ["tags"],
    "is_sleeping": [],
    "abort": ["request_id"],
    "pause_generation": ["mode", "wait_for_inflight_requests", "clear_cache"],
    "resume_generation": [],
    "is_paused": [],
    "list_loras": [],
}


def in_a_new_process(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- names -----------------------------------------------------------------------------------------------


def test_all_is_sorted_and_complete() -> None:
    names = roll_vllm.__all__
    assert len(set(names)) == len(names)
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined <= set(names)
    assert set(roll_vllm._LAZY) | defined == set(names)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        (alias.name, node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(roll_vllm._LAZY.items()) <= imported


@pytest.mark.parametrize("name", sorted(roll_vllm._LAZY))
def test_lazy_names_exist(name: str) -> None:
    """By their modules' source, because vLLM may be absent."""
    path = ROOT.parent / Path(*roll_vllm._LAZY[name].split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert name in {getattr(node, "name", None) for node in tree.body}


@pytest.mark.parametrize("name", [name for name in roll_vllm.__all__ if name != "RolloutEngine"])
def test_names_resolve(name: str) -> None:
    value = getattr(roll_vllm, name)
    assert value.__name__ == name
    assert value.__module__.startswith("roll_vllm.")
    assert value.__doc__
    assert getattr(roll_vllm, name) is value


def test_other_names_do_not() -> None:
    with pytest.raises(AttributeError, match=r"module 'roll_vllm' has no attribute 'nothing'"):
        _ = roll_vllm.nothing
    with pytest.raises(ImportError):
        exec("from roll_vllm import nothing")


def test_importing_is_cheap() -> None:
    program = f"import sys, roll_vllm; print(sorted(set(sys.modules) & {HEAVY}))"
    assert in_a_new_process(program) == "[]"


def test_the_trainer_s_side_needs_no_vllm() -> None:
    names = [name for name in roll_vllm.__all__ if name != "RolloutEngine"]
    program = f"import sys; from roll_vllm import {', '.join(names)}; print(sorted(set(sys.modules) & {HEAVY}))"
    assert in_a_new_process(program) == "[]"


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigurationError", ValueError),
        ("UnsupportedFeatureError", NotImplementedError),
        ("WeightUpdateError", ValueError),
        ("WeightsNotReadyError", RuntimeError),
        ("EngineAsleepError", RuntimeError),
        ("EngineOutOfMemoryError", MemoryError),
    ],
)
def test_errors_can_be_caught_by_either_name(name: str, builtin: type[Exception]) -> None:
    kind = getattr(roll_vllm, name)
    assert issubclass(kind, roll_vllm.RollVllmError)
    assert issubclass(kind, builtin)
    again = pickle.loads(pickle.dumps(kind("why")))
    assert (type(again), str(again)) == (kind, "why")


# --- signatures ------------------------------------------------------------------------------------------


def test_create_async_llm() -> None:
    signature = inspect.signature(roll_vllm.create_async_llm)
    parameters = list(signature.parameters.values())
    assert [parameter.name for parameter in parameters] == [
        "resource_placement_groups",
        "worker_name",
        "allow_dummy_weights",
        "engine_args",
    ]
    first, *options, rest = parameters
    assert first.default is None
    assert first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert [(option.kind, option.default) for option in options] == [
        (inspect.Parameter.KEYWORD_ONLY, None),
        (inspect.Parameter.KEYWORD_ONLY, False),
    ]
    assert rest.kind is inspect.Parameter.VAR_KEYWORD
    assert inspect.iscoroutinefunction(roll_vllm.create_async_llm)


def engine_class() -> ast.ClassDef:
    tree = ast.parse((ROOT / "engine.py").read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "RolloutEngine")


def methods() -> dict[str, ast.AsyncFunctionDef]:
    return {node.name: node for node in engine_class().body if isinstance(node, ast.AsyncFunctionDef)}


def arguments(function: ast.AsyncFunctionDef) -> list[str]:
    return [argument.arg for argument in (*function.args.args[1:], *function.args.kwonlyargs)]


@pytest.mark.parametrize(("generation", "engine"), [("v1", "AsyncLLM"), ("v0", "AsyncLLMEngine")])
def test_the_engine_is_vllm_s(generation: str, engine: str) -> None:
    tree = ast.parse((ROOT / "frontends" / f"{generation}.py").read_text(encoding="utf-8"))
    (frontend,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert [ast.unparse(base) for base in frontend.bases] == ["RolloutEngine", engine]


@pytest.mark.parametrize("name", [*ROLL_CALLS, *OUR_CALLS, *VLLM_CALLS])
def test_the_engine_s_calls(name: str) -> None:
    method = methods()[name]
    expected = {**ROLL_CALLS, **OUR_CALLS, **VLLM_CALLS}[name]
    assert arguments(method)[: len(expected)] == expected
    assert ast.get_docstring(method)


@pytest.mark.parametrize("name", ROLL_CALLS)
def test_roll_can_call_with_its_own_arguments_only(name: str) -> None:
    """Whatever ROLL does not give has a default."""
    if name == "add_lora":
        return  # ROLL's peft_config and vLLM's LoRARequest are one argument here
    method = methods()[name]
    required = arguments(method)[: len(method.args.args) - 1 - len(method.args.defaults)]
    assert set(required) <= set(ROLL_CALLS[name])
    defaults = dict(zip(reversed(arguments(method)), map(ast.unparse, reversed(method.args.defaults)), strict=False))
    if "is_lora" in ROLL_CALLS[name]:
        assert defaults["is_lora"] == "False"


def test_calls_that_pass_on_what_they_get() -> None:
    for name in ("generate", "add_request"):
        assert methods()[name].args.vararg, name
        assert methods()[name].args.kwarg, name


def test_every_public_method_says_what_it_does() -> None:
    functions = [node for node in engine_class().body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert [f.name for f in functions if not f.name.startswith("_") and not ast.get_docstring(f)] == []
