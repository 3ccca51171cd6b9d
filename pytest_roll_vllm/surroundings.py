"""What else is installed and set where tests run, as far as it may be published.

Only what is named here goes into a report: the environment of a CI job holds secrets, and their names follow no rule.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

PACKAGES = (
    "flashinfer-python",
    "numpy",
    "pytest",
    "pytest-asyncio",
    "pytest-xdist",
    "ray",
    "safetensors",
    "tokenizers",
    "transformers",
    "triton",
    "vllm-ascend",
    "xformers",
)
"""Packages that decide what an engine does, besides vLLM and torch."""

VARIABLES = (
    "ASCEND_RT_VISIBLE_DEVICES",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "HIP_VISIBLE_DEVICES",
    "LD_PRELOAD",
    "NCCL_CUMEM_ENABLE",
    "NCCL_NVLS_ENABLE",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
    "PYTORCH_NPU_ALLOC_CONF",
    "ROCR_VISIBLE_DEVICES",
    "ROLL_VLLM_CPU_REFERENCE",
    "ROLL_VLLM_PLACEMENT_TIMEOUT",
    "TORCHDYNAMO_DISABLE",
    "VLLM_ATTENTION_BACKEND",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_LOGGING_LEVEL",
    "VLLM_NO_USAGE_STATS",
    "VLLM_PLUGINS",
    "VLLM_SLEEP_WHEN_IDLE",
    "VLLM_USE_V1",
    "VLLM_WORKER_MULTIPROC_METHOD",
)
"""Variables that decide what an engine does, and never hold a secret."""

_SOUNDS_SECRET = r"token(?!iz)|passw|passphrase|secret|credential|(api|access|private)[_-]?key"
_SECRET = re.compile(rf"--?[\w-]*({_SOUNDS_SECRET})[\w-]*", re.IGNORECASE)
_SECRET_NAME = re.compile(rf"[\w-]*({_SOUNDS_SECRET})[\w-]*|\w+_(key|auth)", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|sk-[\w-]{20,}|AKIA[A-Z0-9]{16})\b"
    r"|(?<=Bearer )[\w.~+/=-]{8,}"
)
_SHORTEST = 8  # characters of a value that is looked for; shorter ones are words, and numbers


def surroundings(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the system, the installed versions of :data:`PACKAGES`, and those of :data:`VARIABLES` that are set."""
    return {
        "system": platform.platform(),
        "packages": dict(_installed(PACKAGES)),
        "variables": {name: environ[name] for name in VARIABLES if name in environ},
    }


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Return a command line without the values of options that sound secret, and without passwords in URLs."""
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        secret = _SECRET.fullmatch(option) is not None
        if hide_next and not argument.startswith("-"):
            argument = "***"
        elif secret and equals:
            argument = f"{option}=***"
        hide_next = secret and not equals
        shown.append(_without_passwords(argument))
    return shown


def redacted(value: Any, environ: Mapping[str, str]) -> Any:
    """Return what JSON can hold without secrets, wherever they are in it, such as in the message of an error.

    Secrets are the values of variables whose names sound secret, texts under such keys, tokens of well-known services,
    and passwords in URLs. A secret that is none of these is not recognised.
    """
    secrets = {text for name, text in environ.items() if len(text) >= _SHORTEST and _SECRET_NAME.fullmatch(name)}
    return _redacted(value, sorted(secrets, key=len, reverse=True))


def _redacted(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "***")
        return _SECRET_TEXT.sub("***", _without_passwords(value))
    if isinstance(value, Mapping):
        return {
            _redacted(key, secrets): "***" if _holds_secret(key, one) else _redacted(one, secrets)
            for key, one in value.items()
        }
    return [_redacted(one, secrets) for one in value] if isinstance(value, (list, tuple)) else value


def _holds_secret(key: object, value: object) -> bool:
    return bool(isinstance(value, str) and value and isinstance(key, str) and _SECRET_NAME.fullmatch(key))


def _without_passwords(text: str) -> str:
    return re.sub(r"(\w://)[^/@\s]+@", r"\1***@", text)


def _installed(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
